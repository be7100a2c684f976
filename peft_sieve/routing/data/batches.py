"""A calibration data set in any of the contract's forms -> token batches ready for a model."""

import hashlib
import operator
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import SieveError
from .rows import RowFormatter, TokenIds, find_text_tokenizer, read_row, tokenise
from .sources import ModelBatches, choose, is_model_batch, read_source


@dataclass(frozen=True)
class CalibrationData:
    """Token batches, and what they were made of.

    Attributes:
        batches: CPU tensors by name: `input_ids` and `attention_mask`, int64, shape `(batch, seq)`, right padded,
            longest samples first. Batches that came ready for the model keep their order, their padding and their
            other inputs; they have no `attention_mask` if they came with `position_ids` in its stead.
        num_samples: rows of `batches`: this process's share.
        num_tokens: tokens of `batches` that are not padding: this process's share.
        name: data set name or path as given, else the type of the data. Same on every process.
        fingerprint: SHA-256 over the token ids of all shares, in sample order. Same on every process, whatever the
            batch size and the number of processes.
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
    """Tokens of a batch that are not padding. A mask per query, as for packed samples, says nothing of padding."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) and mask.ndim == 2 else batch["input_ids"].numel()


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
) -> CalibrationData:
    """Reads calibration data and makes batches of tokens for the model.

    Leaves the random states of Python, NumPy and torch, the tokenizer and the data as they were; an iterator is
    consumed as far as it is read.

    Args:
        data: one of
            - str or path: a file `.jsonl`, `.json`, `.csv`, `.txt` (one sample a line), also compressed, or
              `.parquet`; a folder that `datasets` reads; otherwise a Hub id;
            - a `datasets.Dataset`, `IterableDataset`, or a dict of either, from which `split` is taken;
            - a sequence or an iterator of rows: str, or dicts with `text`, `messages`, `prompt` + `completion`,
              `input_ids` (and `attention_mask`) or `conversations` (ShareGPT);
            - an iterable of batches that are ready for the model: dicts with 2-D `input_ids`. They pass as they are,
              `labels` included, until they cover `max_samples` rows; `max_length` does not cut them.
        tokenizer: tokenizer or processor; needed for text. Messages need its chat template.
        formatting_func: takes one row and returns its text, a list of texts (several samples) or a list of messages,
            as for TRL's `SFTTrainer`. Wins over the row's columns.
        split: which split, where the data have several.
        max_samples: samples used at most; of more, a subset drawn with `seed`. A stream is drawn from its beginning:
            1,000 rows or twice `max_samples`, whichever is more.
        max_length: tokens kept of a sample, from its beginning.
        batch_size: samples a batch, in one process.
        seed: which samples; also how a shuffling `DataLoader` shuffles.
        shard: `(rank, world_size)`: this process takes every `world_size`-th sample in order of length (of batches
            that came ready: every `world_size`-th batch). The shares of all ranks are disjoint and make up what a
            single process would take; a share may be empty.

    Raises:
        SieveError: the data, the settings or the tokenizer do not fit; the text says how to put it right.
    """
    max_samples = _positive("max_samples (calib_samples)", max_samples)
    max_length = _positive("max_length (calib_max_length)", max_length)
    batch_size = _positive("batch_size (calib_batch_size)", batch_size)
    seed = _integer("seed (calib_seed)", seed)
    rank, world_size = _checked_shard(shard)
    if formatting_func is not None and not callable(formatting_func):
        raise SieveError(
            f"calib_formatting_func is of type {type(formatting_func).__name__}; expected a function that takes one "
            "row and returns its text."
        )
    pad_id = _pad_token_id(find_text_tokenizer(tokenizer))

    with _seeded_global_rng(seed):
        source = read_source(
            data, split=split, max_samples=max_samples, seed=seed, all_columns=formatting_func is not None
        )
        if isinstance(source, ModelBatches):
            if formatting_func is not None:
                raise SieveError(
                    f"the calibration data, a {source.name}, are batches ready for the model, which "
                    "calib_formatting_func cannot change; drop it, or pass rows."
                )
            return _pass_through(source, max_samples, rank, world_size)
        samples = [
            sample
            for position, row in zip(source.positions, source.rows, strict=True)
            for sample in read_row(row, f"row {position}", formatting_func)
        ]
        samples = [samples[i] for i in choose(len(samples), max_samples, seed)]  # a row may give several
        tokens = tokenise(samples, tokenizer, max_length)

    kept = [sample for sample in tokens if sample.num_tokens > 0]
    if not kept:
        raise SieveError(
            f"all {len(tokens)} samples of the calibration data set {source.name!r} are empty after tokenisation; "
            "expected some text: check the columns or calib_formatting_func."
        )
    share = sorted(kept, key=lambda sample: -len(sample.ids))[rank::world_size]  # stable: ties in sample order
    return CalibrationData(
        batches=[_pad(share[start : start + batch_size], pad_id) for start in range(0, len(share), batch_size)],
        num_samples=len(share),
        num_tokens=sum(sample.num_tokens for sample in share),
        name=source.name,
        fingerprint=_fingerprint(sample.used_ids() for sample in kept),
        num_dropped_empty=len(tokens) - len(kept),
    )


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


def _fingerprint(samples: Iterable[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for ids in samples:
        digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())  # the length tells samples apart
    return digest.hexdigest()


# --- batches that are ready for the model ----------------------------------------------------------------------------


def _pass_through(source: ModelBatches, max_samples: int, rank: int, world_size: int) -> CalibrationData:
    batches: list[dict[str, Any]] = []
    used: list[list[list[int]]] = []  # the ids of each row of each batch
    missing = max_samples
    for position, item in enumerate(source.batches):
        if not is_model_batch(item):
            raise SieveError(
                f"item {position} of the calibration data, a {source.name}, is no batch that is ready for the model "
                f"as those before it are, but of type {type(item).__name__}; expected dicts with 2-D `input_ids`."
            )
        batch = _first_rows(_as_inputs(item, position), missing)
        if batch["input_ids"].numel() == 0:
            continue
        batches.append(batch)
        used.append(_used_ids(batch))
        missing -= len(batch["input_ids"])
        if missing <= 0:
            break
    if not any(ids for rows in used for ids in rows):
        raise SieveError(
            f"all {sum(map(len, used))} samples of the calibration data, a {source.name}, are empty: their "
            "`attention_mask` leaves no token."
        )
    share = used[rank::world_size]
    return CalibrationData(
        batches=batches[rank::world_size],
        num_samples=sum(map(len, share)),
        num_tokens=sum(len(ids) for rows in share for ids in rows),
        name=source.name,
        fingerprint=_fingerprint(ids for rows in used for ids in rows),
        num_dropped_empty=0,
    )


def _as_inputs(item: Mapping[str, Any], position: int) -> dict[str, Any]:
    """A batch of its own for the CPU; tensors that are there already are shared, never written to."""
    batch = {
        key: torch.as_tensor(value).detach().cpu() if isinstance(value, (Tensor, np.ndarray)) else value
        for key, value in item.items()
    }
    if batch["input_ids"].is_floating_point():
        raise SieveError(
            f"item {position} of the calibration data has `input_ids` of {batch['input_ids'].dtype}; expected token "
            "ids, which are integers."
        )
    input_ids = batch["input_ids"] = batch["input_ids"].to(torch.int64)
    if input_ids.numel() and int(input_ids.min()) < 0:
        raise SieveError(
            f"item {position} of the calibration data has the negative token id {int(input_ids.min())} in "
            "`input_ids`; expected ids of the vocabulary."
        )
    mask = batch.get("attention_mask")
    if mask is None:
        batch.pop("attention_mask", None)
        # With positions of their own, packed samples are told apart only while there is no mask.
        if "position_ids" not in batch:
            batch["attention_mask"] = torch.ones_like(input_ids)
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        if mask.shape != input_ids.shape:
            raise SieveError(
                f"item {position} of the calibration data has `input_ids` of shape {tuple(input_ids.shape)} but an "
                f"`attention_mask` of shape {tuple(mask.shape)}; expected the same shape."
            )
        batch["attention_mask"] = mask.to(torch.int64)
    return batch


def _first_rows(batch: dict[str, Any], limit: int) -> dict[str, Any]:
    """Trims a batch to `limit` rows, or leaves it whole if one of its inputs is not laid out by rows."""
    rows = len(batch["input_ids"])
    if rows <= limit:
        return batch
    trimmed = {}
    for key, value in batch.items():
        if not isinstance(value, (Tensor, list, tuple)) or (isinstance(value, Tensor) and value.ndim == 0):
            trimmed[key] = value
        elif key == "position_ids" and isinstance(value, Tensor) and value.ndim == 3:
            trimmed[key] = value[:, :limit]  # (3, batch, seq): time, height, width
        elif key == "position_ids" and len(value) == 1:  # (1, seq): the same for all rows
            trimmed[key] = value
        elif len(value) == rows:
            trimmed[key] = value[:limit]
        else:
            return batch
    return trimmed


def _used_ids(batch: dict[str, Any]) -> list[list[int]]:
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return batch["input_ids"].tolist()
    return [ids[kept].tolist() for ids, kept in zip(batch["input_ids"], mask != 0, strict=True)]


# --- settings --------------------------------------------------------------------------------------------------------


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


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise SieveError(f"{name} is {value!r}; expected an int.") from None


def _positive(name: str, value: Any) -> int:
    number = _integer(name, value)
    if number < 1:
        raise SieveError(f"{name} is {number}; expected a positive int.")
    return number


def _checked_shard(shard: Any) -> tuple[int, int]:
    try:
        rank, world_size = shard
        valid = 0 <= operator.index(rank) < operator.index(world_size)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise SieveError(f"shard is {shard!r}; expected (rank, world_size) with 0 <= rank < world_size.")
    return rank, world_size
