"""The parameters of an expert adapter: packed low-rank factors, and the map that says whose they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ....errors import SieveError
from ....kernels.groups import Slots
from ..bookkeeping import Bookkeeping

# In the keys of tensors that are not factors, but say whose those are; the first of them has the experts' slots.
BOOKKEEPING_KEY = ".lora_experts."
SLOTS_KEY = f"{BOOKKEEPING_KEY}slots"
# What is between the dots of an expert layer's keys, besides what LoRA's have.
FACTOR_NAMES = (
    *("lora_gate_up_A", "lora_gate_up_B", "lora_down_A", "lora_down_B"),
    *("lora_gate_up_delta", "lora_down_delta"),
)
EXPERT_KEY_PARTS = (*FACTOR_NAMES, "lora_experts", "slots")
# Those that `share_outer` makes one per layer.
OUTER_FACTORS = ("lora_gate_up_A", "lora_down_B")
# In a map of slots: no adapter, and the slot after those of the experts.
_NO_SLOT, _LAST_SLOT = -1, -2


@dataclass(frozen=True)
class AdapterPlan:
    """What one adapter adds to one layer of experts.

    Attributes:
        experts: ascending ids of the experts that have an adapter of their own.
        ranks: projection -> rank; its output width if the experts are fully tuned.
        relative_scaling: projection -> its scaling as a multiple of the layer's.
        full: whether the experts get differences of full size in place of low-rank factors.
        cold: ascending ids of the experts that use one adapter together.
        share_outer: whether A of gate and up, and B of down, are one for all of them.
    """

    experts: tuple[int, ...]
    ranks: dict[str, int]
    relative_scaling: dict[str, float]
    full: bool = field(default=False, kw_only=True)
    cold: tuple[int, ...] = field(default=(), kw_only=True)
    share_outer: bool = field(default=False, kw_only=True)

    @property
    def adapted(self) -> tuple[int, ...]:
        """All experts that have an adapter, of their own or together, by their slots."""
        return (*self.experts, *self.cold)

    @property
    def num_slots(self) -> int:
        return len(self.experts) + bool(self.cold)

    @cached_property
    def slot_of(self) -> Mapping[int, int]:
        """Adapted expert -> its slot, its place in packed factors. Cold experts have the last one together."""
        return {expert: min(place, len(self.experts)) for place, expert in enumerate(self.adapted)}


@dataclass(frozen=True)
class Pack:
    """Factors of one rank for some of a layer's experts, for the projections that share an input.

    Attributes:
        slots: the experts' places in them, on the layer's device.
        ranks: projection -> rank; the projections' ranks lie one after the other.
        a: (slots, ranks, in); one slot where A is one for all.
        b: (slots, ranks, out); one slot where B is one for all.
    """

    slots: Slots
    ranks: dict[str, int]
    a: torch.Tensor
    b: torch.Tensor


class ExpertFactors(nn.Module):
    """Low-rank factors of all adapted experts of a layer, for the projections that share an input.

    `weight` has shape (slots, rank, features): `features` is the input width for A and the output width for B, and the
    ranks of several projections (gate, then up) lie one after the other. Both factors keep the wide axis last, so the
    grouped products take them as they are.

    `kept`, if there is one, says which entries are used and trained; the others count as zero.
    """

    kept: torch.Tensor | None

    def __init__(self, num_slots: int, rank: int, features: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_slots, rank, features, device=device))
        # Not a buffer: averages of models compute with those.
        self.kept = None

    def used(self) -> torch.Tensor:
        """The weight, zero where it is not kept; so is its gradient."""
        if self.kept is None:
            return self.weight
        self.kept = self.kept.to(self.weight.device)
        return self.weight * self.kept

    def allocate(self, device: torch.device) -> None:
        """Give factors made on the meta device memory, without values."""
        empty = torch.empty_like(self.weight, device=device)
        self.weight = nn.Parameter(empty, requires_grad=self.weight.requires_grad)

    def extra_repr(self) -> str:
        return "slots={}, rank={}, features={}".format(*self.weight.shape)


class ExpertDeltas(ExpertFactors):
    """Differences to the weights of all adapted experts of a layer, for the projections that share an input.

    `weight` has shape (slots, out, in): the outputs of several projections (gate, then up) lie one after the other.
    """


class ExpertSlots(Bookkeeping):
    """Which expert has which slot.

    `slots` has shape (num_experts,), int32: the slot of each expert, -1 for those without an adapter, -2 for those that
    use the last slot together. It is saved with the weights, so that loading can tell when they belong to other
    experts. `ids`, its inverse, is not.
    """

    slots: torch.Tensor

    def __init__(self, num_experts: int, experts: Sequence[int], cold: Sequence[int] = ()) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.cold = tuple(cold)
        self.register_buffer("slots", slots_of(num_experts, experts, cold))
        self._say(experts, experts)

    def _say(self, experts: Sequence[int], stored: Sequence[int]) -> None:
        """Take over the experts, by their slots and in the order in which their factors lie."""
        self.experts = tuple(experts)
        self.ids = torch.tensor([*stored, *self.cold], dtype=torch.int64, device="cpu")
        self._placed = self._map(), self.ids

    def _map(self) -> torch.Tensor:
        return slots_of(self.num_experts, self.experts, self.cold)

    def integers(self) -> dict[str, torch.Tensor]:
        return {"slots": self._map()}

    def placed(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`slots` and `ids` on a device, as they are, whatever has been done to the buffers."""
        if self._placed[0].device != device:
            self._placed = self._map().to(device), self.ids.to(device)
        return self._placed

    def extra_repr(self) -> str:
        return f"adapted={self.ids.numel()}, num_experts={self.num_experts}"


def slots_of(num_experts: int, experts: Sequence[int], cold: Sequence[int] = ()) -> torch.Tensor:
    """The slot of each expert, as `ExpertSlots` has them: int32, shape (num_experts,)."""
    # Named device: under `init_empty_weights` and the like, a map of integers must still be real.
    slots = torch.full((num_experts,), _NO_SLOT, dtype=torch.int32, device="cpu")
    slots[list(experts)] = torch.arange(len(experts), dtype=torch.int32, device="cpu")
    slots[list(cold)] = _LAST_SLOT
    return slots


def experts_in(slots: torch.Tensor) -> list[int] | None:
    """Ids of the experts that have a slot of their own, by slot; None if these are not the slots of any experts.

    The others have none, or use the last slot, all of them.
    """
    used, others = slots[slots >= 0], slots[slots < 0]
    order = used.argsort()
    known = not others.numel() or (bool((others == others[0]).all()) and others[0].item() in (_NO_SLOT, _LAST_SLOT))
    if slots.dim() != 1 or used[order].tolist() != list(range(used.numel())) or not known:
        return None
    return (slots >= 0).nonzero().squeeze(-1)[order].tolist()


def cold_in(slots: torch.Tensor) -> list[int]:
    """Ids of the experts that use the last slot together, ascending."""
    return (slots == _LAST_SLOT).nonzero().squeeze(-1).tolist()


def no_map(where: Any) -> SieveError:
    """The error for saved slots that are none."""
    return SieveError(
        f"The slots in {where} are not those of any experts. Average adapters of the same experts only, and do not "
        "round what is saved as integers."
    )


def initialize(
    factor_a: torch.Tensor, factor_b: torch.Tensor, ranks: Sequence[int], init_lora_weights: bool | str
) -> None:
    """Fill the factors as PEFT fills those of a linear layer.

    Args:
        factor_a, factor_b: (slots, ranks, features), without a gradient; not necessarily of equally many slots.
        ranks: rank of each projection packed in the factors.
        init_lora_weights: True: A uniform in +-1/sqrt(in), B zero; "gaussian": A normal with deviation 1/rank, B zero;
            False: both uniform, so that the adapter is not a no-op (for debugging).
    """
    start = 0
    for rank in ranks:
        a, b = factor_a[:, start : start + rank], factor_b[:, start : start + rank]
        if init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            bound = 1 / math.sqrt(a.shape[-1])
            nn.init.uniform_(a, -bound, bound)
        if init_lora_weights is False:
            nn.init.uniform_(b, -1 / math.sqrt(rank), 1 / math.sqrt(rank))
        else:
            nn.init.zeros_(b)
        start += rank
