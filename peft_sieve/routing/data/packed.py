"""Packed rows -> their samples.

Training keeps the samples of a row apart; a row that is read as one sample would have them attend to each other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import SieveError
from ..encoder_decoder import IGNORED
from ..masks import attended, real_tokens
from .cutting import has_only_tokens, part_of

# What says where samples lie, besides the mask and the positions.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "seq_lengths")


def samples_of(
    mask: Sequence[int], positions: Sequence[int] | None = None, ends: Sequence[int] = (), ids: Sequence[int] = ()
) -> list[slice]:
    """Where the samples of a row are, without the padding around them.

    Args:
        mask: 0 for padding; where it is 1, 2, ..., each number is a sample.
        positions: of its tokens; they start again with each sample. Those that are all the same say nothing.
        ends: where samples end.
        ids: tokens of a row whose padding the mask does not show: the last ones, if they are all the same and each has
            the position of a first token.
    """
    real = [index for index, value in enumerate(mask) if value]
    if positions is not None and len({positions[index] for index in real}) < 2:
        positions = None
    if positions is not None:
        real = _without_last(real, positions, ids)
    found: list[list[int]] = []
    borders = set(ends)
    for before, index in zip([-1, *real], real, strict=False):
        new = before < 0 or mask[index] != mask[before] or any(n in borders for n in range(before + 1, index + 1))
        if new or (positions is not None and positions[index] <= positions[before]):
            found.append([])
        found[-1].append(index)
    return [slice(sample[0], sample[-1] + 1) for sample in found]


def _without_last(real: list[int], positions: Sequence[int], ids: Sequence[int]) -> list[int]:
    """What is left without padding that has the position of a first token."""
    stop = len(real)
    while ids and stop > 1 and positions[real[stop - 1]] == positions[0] and ids[real[stop - 1]] == ids[-1]:
        stop -= 1
    return real[:stop] if len(real) - stop > 1 else real


def separated(batch: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A batch that is ready for the model; if its rows are packed, batches of their samples: one per row, padded on the
    right, and none with more tokens than the one that came.

    Inputs that cannot be split, such as images, keep a batch together.

    Args:
        batch: its inputs.
        where: names it in error texts.

    Raises:
        SieveError: samples of a row would attend to each other, and cannot be separated.
    """
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    segments = _segments(mask, batch["input_ids"])
    if positions is None and segments.max(initial=0) < 2 and not any(name in batch for name in _PACKING):
        return [batch]
    found = [_samples_in_row(batch, segments, row) for row in range(len(segments))]
    if all(samples == samples_of((row != 0).tolist()) for samples, row in zip(found, segments, strict=True)):
        return [batch]
    inputs = {key: value for key, value in batch.items() if key not in _PACKING}
    places = [(slice(row, row + 1), tokens) for row, samples in enumerate(found) for tokens in samples]
    parts = [part_of(inputs, row, tokens) for row, tokens in places] if has_only_tokens(inputs) else [None]
    samples = [_with_plain_mask(part) for part in parts if part is not None]
    if len(samples) < len(parts):
        if isinstance(mask, Tensor) and mask.ndim == 2 and int(mask.max()) > 1:
            raise SieveError(
                f"{where} has packed rows, and beside them inputs that cannot be split with them, such as images. Pass "
                "one sample per row."
            )
        return [batch]
    return _together(samples, batch["input_ids"].numel())


def _segments(mask: Any, input_ids: Tensor) -> Any:
    """The number of the sample of each token, as far as the mask says it, 0 for padding: (batch, length)."""
    if isinstance(mask, Mapping):
        mask = next((item for item in mask.values() if isinstance(item, Tensor)), None)
    attends, real = attended(mask), real_tokens(mask)
    if attends is not None and real is not None:
        linked = (attends | attends.transpose(-1, -2)) & real.unsqueeze(-1) & real.unsqueeze(-2)
        # From a token on, no token is linked to one before it: there a sample begins.
        first = linked.int().argmax(-1).where(real, torch.arange(real.shape[-1]))
        begins = first.flip(-1).cummin(-1).values.flip(-1) >= torch.arange(real.shape[-1])
        mask = begins.cumsum(-1) * real
    segments = torch.ones_like(input_ids) if mask is None else mask.expand_as(input_ids)
    return segments.numpy()


def _samples_in_row(batch: Mapping[str, Any], segments: Any, row: int) -> list[slice]:
    positions: Any = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 3:
        # Three, of time, height and width, jump at images; the first of four is the place in the text.
        positions = positions[0] if len(positions) == 4 else None
    if positions is not None:
        positions = positions[min(row, len(positions) - 1)].tolist()
    ends: list[int] = []
    if isinstance(batch.get("cu_seq_lens_q"), Tensor) and len(segments) == 1:
        ends += batch["cu_seq_lens_q"].tolist()
    if isinstance(batch.get("seq_idx"), Tensor):
        ends += (batch["seq_idx"][row].diff().nonzero().flatten() + 1).tolist()
    ids = batch["input_ids"][row].tolist() if batch.get("attention_mask") is None else ()
    return samples_of(segments[row].tolist(), positions, ends, ids)


def _with_plain_mask(sample: dict[str, Any]) -> dict[str, Any]:
    """One sample with a mask of zeros and ones, if that says the same."""
    mask = sample.get("attention_mask")
    attends = attended(mask)
    if isinstance(mask, Tensor) and attends is not None:
        causal = torch.ones_like(mask, dtype=torch.bool).tril()
        # Additive masks may hold more than what is masked, such as distances, and heads may differ.
        plain = mask if mask.dtype == torch.bool else mask == 0
        if not (torch.equal(attends, causal[:, 0]) and torch.equal(plain, causal)):
            return sample
        mask = None
    if isinstance(mask, Mapping):
        return sample
    real = torch.ones_like(sample["input_ids"]) if mask is None else (mask != 0).long()
    return {**sample, "attention_mask": real}


def _together(samples: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Batches of samples, the longest first, of at most `budget` tokens; what cannot be padded stays alone."""
    alone = [sample for sample in samples if not _can_be_padded(sample)]
    rest = sorted(filter(_can_be_padded, samples), key=lambda sample: -sample["input_ids"].shape[1])
    batches = []
    while rest:
        width = rest[0]["input_ids"].shape[1]
        group, rest = rest[: budget // width], rest[budget // width :]
        batches.append({key: _column(key, [sample[key] for sample in group], width) for key in group[0]})
    return batches + alone


def _can_be_padded(sample: Mapping[str, Any]) -> bool:
    shape = sample["input_ids"].shape
    return not isinstance(sample["attention_mask"], Mapping) and all(
        value.shape == shape or value.ndim == 0 for value in sample.values() if isinstance(value, Tensor)
    )


def _column(key: str, values: list[Any], width: int) -> Any:
    if not isinstance(values[0], Tensor) or values[0].ndim == 0:
        return values[0]
    filling = IGNORED if key == "labels" else 0
    return torch.cat([pad(value, (0, width - value.shape[1]), value=filling) for value in values])
