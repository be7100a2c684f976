"""Integers that say whose an adapter's factors are, saved with them: what they mean is not lost in arithmetic.

Teachers that follow a student, averages of checkpoints and the like compute with all tensors of a state dict, and some
with all buffers of a module. A weighted sum of maps that are all the same is that map times the sum of the weights, up
to rounding, and is taken for it. One of different maps never is: maps of equally many experts hold the same numbers in
other places, so all have one sum and one length, and an average of several has that sum and less length.

Nor is it lost on the meta device: buffers that were moved there have their values back afterwards. What shards a model
there (accelerate's FSDP2 with `cpu_ram_efficient_loading`) takes every entry of its state dict for a parameter that it
sharded, so that they are in none until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ...errors import SieveError
from .hooks import hang

_NAME = "bookkeeping"


class Bookkeeping(nn.Module):
    """A module with buffers that carry numbers to and from files. What those of `integers` should hold is known without
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        # Of buffers that were moved to the meta device.
        self._values: dict[str, torch.Tensor] = {}

    def integers(self) -> dict[str, torch.Tensor]:
        """Name of a buffer -> what it should hold, on the CPU."""
        raise NotImplementedError

    def restore(self) -> None:
        """Have the buffers hold what they should."""
        for name, value in self.integers().items():
            setattr(self, name, value.to(getattr(self, name).device))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Bookkeeping:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in dict(self.named_buffers(recurse=False)).items():
            if buffer.is_meta and not before[name].is_meta:
                self._values[name] = before[name]
            elif not buffer.is_meta and name in self._values:
                setattr(self, name, self._values.pop(name).to(buffer.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self.integers().items():
            destination[prefix + name] = value.to(getattr(self, name).device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check(state_dict, prefix)
        own = {prefix + name: value for name, value in self.integers().items()}
        state_dict.update({key: value for key, value in own.items() if key in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def away(self) -> Iterable[str]:
        """The buffers that were moved to the meta device."""
        return self._values.keys()

    def put_back(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Give buffers that were moved to the meta device their values again, and return those by name."""
        values = {name: value.to(device) for name, value in self._values.items()}
        self._values.clear()
        for name, value in values.items():
            setattr(self, name, value)
        return values

    def check(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Refuse the state dict of a model whose adapter belongs to other experts.

        Raises:
            SieveError: it does.
        """
        for name, own in self.integers().items():
            given = state_dict.get(prefix + name)
            if given is not None and not scale_of(given, own):
                raise SieveError(
                    f"{prefix}{name} of the state dict is not that of the model's adapter, whose factors belong to "
                    "other experts. Load it into an adapter with the configuration that it was saved with."
                )


def checked_by(model: nn.Module) -> None:
    """Have `load_state_dict` of `model`, or of what it is in, refuse before it loads anything, and `state_dict` leave
    out what is on the meta device while the model is sharded there.
    """
    before_loading = model.register_load_state_dict_pre_hook(_check_all)
    hang(model, _NAME, before_loading, model.register_state_dict_post_hook(_leave_out_what_is_away))


def _check_all(model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    found = {f"{prefix}{name}.": part for name, part in model.named_modules() if isinstance(part, Bookkeeping)}
    for at, part in found.items():
        part.check(state_dict, at)
    # Engines take a model from the meta device by loading what they sharded.
    device = next((value.device for value in state_dict.values()), torch.device("cpu"))
    for at, part in found.items():
        for name, value in part.put_back(device).items():
            state_dict.setdefault(at + name, value)


def _leave_out_what_is_away(model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if any(isinstance(value, DTensor) for value in state_dict.values()):
        for name, part in model.named_modules():
            for buffer in part.away() if isinstance(part, Bookkeeping) else ():
                del state_dict[f"{prefix}{name}.{buffer}"]


def settled(saved: Mapping[str, torch.Tensor], integers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Saved tensors of one layer, those integers put back that arithmetic on a state dict has moved.

    Args:
        saved: by attribute and key.
        integers: what the adapter has of them.
    """
    found = dict(saved)
    empty = not any(bool(value.any()) for value in saved.values() if value.is_floating_point())
    for key, own in integers.items():
        scale = scale_of(saved[key], own) if key in saved else None
        # Zeros are everybody's: a teacher may begin with them.
        if scale or (scale == 0 and empty):
            found[key] = own
    return found


def scale_of(given: torch.Tensor, own: torch.Tensor) -> float | None:
    """The number, not negative, that `given` is `own` times; None if there is none.

    Integers are compared exactly, other numbers up to the rounding that an average over many steps adds up.
    """
    counts = not given.is_complex() and (given.itemsize > 1 or not given.is_floating_point())
    if given.shape != own.shape or given.is_meta or not counts:
        return None
    found, expected = given.detach().cpu().double(), own.cpu().double()
    tolerance = 0.0
    if given.is_floating_point():
        # Half precision cannot tell large numbers from their neighbours.
        tolerance = 1 / 512 if given.dtype.itemsize > 2 else 1 / 32

    def is_near(scale: float) -> bool:
        slack = scale * tolerance * (1 + expected.clamp(min=0)) + 1e-9
        return bool(((found - scale * expected).abs() <= slack).all())

    if is_near(1.0):
        return 1.0
    scale = float((found * expected).sum() / (expected * expected).sum())
    # An average of different maps can be a shorter one, but has the sum of each.
    total, sum_ = float(found.sum()), float(expected.sum())
    scaled = scale >= 0 and abs(total - scale * sum_) < abs(total - sum_)
    return scale if scaled and is_near(scale) else None
