"""A calibration data set in any of the contract's forms -> token batches ready for a model."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import is_whole, must_be, whole
from ...errors import SieveError
from ..masks import token_mask
from .images import has_images, image_batches
from .ready_batches import ModelBatches, used_ids
from .rows import RowFormatter, TokenIds, read_row
from .sources import Choice, read_source, reading
from .tokenising import find_text_tokenizer, tokenise


@dataclass(frozen=True)
class CalibrationData:
    """Token batches, and what they were made of.

    Attributes:
        batches: CPU tensors by name: `input_ids` and `attention_mask`, int64, shape `(batch, seq)`, right padded,
            longest samples first; then those with images, in their order, with what the processor made of these.
            Batches that came ready for the model keep their order, their padding and their other inputs, unless their
            rows were packed; they have no `attention_mask` if they came with `position_ids` in its stead.
        num_samples: rows of `batches`: this process's share.
        num_tokens: tokens of `batches` that are not padding: this process's share.
        name: data set name or path as given, else the type of the data. Same on every process.
        fingerprint: SHA-256 over the token ids of all shares, in sample order, those with images last. Same on
            every process, whatever the batch size and the number of processes.
        num_dropped_empty: samples without a token, over all shares.
    """

    batches: list[dict[str, Any]]
    num_samples: int
    num_tokens: int
    name: str
    fingerprint: str
    num_dropped_empty: int

    def part(self, batches: list[dict[str, Any]]) -> "CalibrationData":
        """Some of the batches alone; name and fingerprint stay those of the whole data that was read."""
        return replace(
            self,
            batches=batches,
            num_samples=sum(len(batch["input_ids"]) for batch in batches),
            num_tokens=sum(map(tokens_in, batches)),
        )


def tokens_in(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding."""
    real = token_mask(batch.get("attention_mask"), batch)
    return batch["input_ids"].numel() if real is None else int(real.sum())


def calibration_batches(
    data: Any,
    *,
    tokenizer: Any = None,
    formatting_func: RowFormatter | None = None,
    split: str = "train",
    max_samples: int = 512,
    max_length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    image_dtype: torch.dtype | None = None,
) -> CalibrationData:
    """Reads calibration data and makes batches of tokens for the model.

    Leaves the random states of Python, NumPy and torch, the tokenizer and the data as they were; an iterator is
    consumed as far as it is read.

    Args:
        data: one of
            - str or path: a file `.jsonl`, `.json`, `.csv`, `.txt` (one sample per line), also compressed, or
              `.parquet`; a folder that `datasets` reads; otherwise a Hub id;
            - a `datasets.Dataset`, `IterableDataset`, or a dict of either, from which `split` is taken;
            - a sequence or an iterator of rows: str, or dicts with `text`, `messages`, `prompt` + `completion`,
              `input_ids` (and `attention_mask`) or `conversations` (ShareGPT), the texts also with `images` or `image`;
              a packed row is several samples;
            - an iterable of batches that are ready for the model: dicts with 2-D `input_ids`. They pass as they are,
              `labels` included, until they cover `max_samples` rows; `max_length` does not cut them. Packed rows are
              replaced by their samples, one per row.
        tokenizer: tokenizer or processor; needed for text. Messages need its chat template. Images need a processor, or
            one saved beside the tokenizer.
        formatting_func: takes one row and returns its text, a list of texts (several samples) or a list of messages,
            as for TRL's `SFTTrainer`. Wins over the row's columns.
        split: which split, where the data have several.
        max_samples: samples used at most; of more, a subset drawn with `seed`. A stream is drawn from its beginning:
            1,000 rows or twice `max_samples`, whichever is more.
        max_length: tokens kept of a sample, from its beginning.
        batch_size: samples per batch, in one process.
        seed: which samples; also how a shuffling `DataLoader` shuffles.
        shard: `(rank, world_size)`: this process takes every `world_size`-th sample in order of length (of batches
            that came ready: every `world_size`-th batch). The shares of all ranks are disjoint and make up what a
            single process would take; a share may be empty.
        image_dtype: floating type of what the processor makes of images; None leaves it.

    Raises:
        SieveError: the data, the settings or the tokenizer do not fit; the text says how to put it right.
    """
    max_samples = whole("max_samples (calib_samples)", max_samples)
    max_length = whole("max_length (calib_max_length)", max_length)
    batch_size = whole("batch_size (calib_batch_size)", batch_size)
    seed = whole("seed (calib_seed)", seed, least=None)
    if not isinstance(split, str) and not type(split).__module__.startswith("datasets."):
        raise must_be("split (calib_split)", "the name of a split", split)
    rank, world_size = _checked_shard(shard)
    if formatting_func is not None and not callable(formatting_func):
        raise must_be("calib_formatting_func", "a function that takes one row and returns its text", formatting_func)
    pad_id = _pad_token_id(find_text_tokenizer(tokenizer))
    choice = Choice(max_samples, seed, split, all_columns=formatting_func is not None)

    with _seeded_global_rng(seed):
        source = read_source(data, choice)
        if isinstance(source, ModelBatches):
            if formatting_func is not None:
                raise SieveError(
                    f"The calibration data, a {source.name}, are batches ready for the model, which "
                    "calib_formatting_func cannot change. Leave it out, or pass rows."
                )
            with reading(source.name):
                ready = source.take(max_samples)
            return _with_provenance(source.name, ready[rank::world_size], [ids for b in ready for ids in used_ids(b)])
        samples = [
            sample
            for position, row in zip(source.positions, source.rows, strict=True)
            for sample in read_row(row, f"row {position} of the calibration data", formatting_func)
        ]
        samples = [samples[i] for i in choice(len(samples))]  # a row may give several
        tokens = tokenise([sample for sample in samples if not has_images(sample)], tokenizer, max_length)
        pictured = [sample for sample in samples if has_images(sample)]
        made = image_batches(pictured, tokenizer, max_length, batch_size, image_dtype)
        ready = ModelBatches(source.name, made).take(len(pictured))

    kept = [sample for sample in tokens if sample.num_tokens > 0]
    share = sorted(kept, key=lambda sample: -len(sample.ids))[rank::world_size]  # stable: ties in sample order
    batches = [_pad(share[start : start + batch_size], pad_id) for start in range(0, len(share), batch_size)]
    used = [sample.used_ids() for sample in kept] + [ids for batch in ready for ids in used_ids(batch)]
    return _with_provenance(source.name, batches + ready[rank::world_size], used, len(tokens) - len(kept))


def _with_provenance(
    name: str, share: list[dict[str, Any]], used: list[list[int]], num_dropped_empty: int = 0
) -> CalibrationData:
    """What this process's batches and the token ids of all samples make; an error if there is no token at all."""
    if not any(used):
        raise SieveError(
            f"All {len(used) + num_dropped_empty} samples of the calibration data {name!r} are empty. Pass others, or "
            "check their columns, calib_formatting_func, or `attention_mask`."
        )
    digest = hashlib.sha256()
    for ids in used:
        digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())  # the length tells samples apart
    whole_data = CalibrationData([], 0, 0, name, digest.hexdigest(), num_dropped_empty)
    return whole_data.part(share)


def _pad(samples: Sequence[TokenIds], pad_id: int) -> dict[str, Tensor]:
    """Pads on the right to the longest sample: `(batch, seq)`."""
    shape = (len(samples), max(len(sample.ids) for sample in samples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        input_ids[row, :length] = torch.tensor(sample.ids)
        attention_mask[row, :length] = 1 if sample.mask is None else torch.tensor(sample.mask)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _pad_token_id(tokenizer: Any) -> int:
    """Padding is masked, so any id will do that the embedding has: some tokenizers say -1."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if isinstance(token, int) and 0 <= token < (len(tokenizer) if hasattr(tokenizer, "__len__") else token + 1):
            return token
    return 0


@contextmanager
def _seeded_global_rng(seed: int) -> Iterator[None]:
    """Code of others (a shuffling `DataLoader`, a formatting function) draws from `seed`, and leaves no trace."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed % 2**32)  # not torch.manual_seed, which reseeds accelerators
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _checked_shard(shard: Any) -> tuple[int, int]:
    fine = isinstance(shard, Sequence) and len(shard) == 2 and all(map(is_whole, shard))
    if not fine or not 0 <= shard[0] < shard[1]:
        raise must_be("shard", "(rank, world_size) with 0 <= rank < world_size", shard)
    return shard[0], shard[1]
