"""What training would cost, from a model's configuration alone: no weights are read or made."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from .adapters.skeleton import skeleton_maker
from .checks import is_whole, listed, must_be, share
from .errors import SieveError
from .moe.topology import find_moe_layers
from .routing.comparison import coverage_curves
from .routing.profile import RoutingProfile
from .routing.selection import select_experts
from .routing.strategies import experts_per_layer
from .table import Table
from .tuners.common.experts.factors import OUTER_FACTORS
from .tuners.common.experts.layer import expert_layers
from .tuners.sieve.config import SieveLoraConfig

DEFAULT_FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_ADAM_STATES = 2  # numbers that AdamW keeps for each trainable one, in its type


@dataclass(frozen=True)
class PlannedAdapter:
    """One size of adapter.

    Attributes:
        experts: layer -> experts with an adapter of their own there.
        trainable_parameters: numbers that are trained.
        adapter_bytes: size of the saved tensors; the file has a header of some kilobytes besides.
        gradient_bytes, optimizer_bytes: memory for their gradients, and for the states of AdamW.
        coverage: mean over layers of the score's share that these experts, the hottest, get; None without a profile.
        lowest_coverage: of the layer with the lowest.
    """

    experts: dict[str, int]
    trainable_parameters: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    coverage: float | None = None
    lowest_coverage: float | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """What adapters of several sizes cost, the smallest first and the one on all experts last.

    Attributes:
        model: its name.
        model_parameters: numbers in it.
        num_experts: layer -> its experts.
        r: rank.
        options: the adapters.
        cold_experts, share_outer: what experts share (see `SieveLoraConfig`).
    """

    model: str
    model_parameters: int
    num_experts: dict[str, int]
    r: int
    options: tuple[PlannedAdapter, ...]
    cold_experts: str = "frozen"
    share_outer: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self)

    def to_table(self) -> Table:
        """One row an adapter. Sizes are in units of 1,000."""
        with_coverage = any(option.coverage is not None for option in self.options)
        full = self.options[-1].trainable_parameters
        rows = []
        for option in self.options:
            row = [
                _experts_text(option.experts, self.num_experts),
                f"{option.trainable_parameters:,}",
                f"{option.trainable_parameters / self.model_parameters:.2%}",
                f"{option.trainable_parameters / full:.1%}",
                size_text(option.adapter_bytes),
                size_text(option.gradient_bytes),
                size_text(option.optimizer_bytes),
            ]
            if with_coverage:
                row += [f"{option.coverage:.1%}", f"{option.lowest_coverage:.1%}"]
            rows.append(row)
        header = ["experts a layer", "trainable", "of model", "of all experts'", "adapter", "gradients", "AdamW states"]
        return Table(header + (["coverage", "lowest layer"] if with_coverage else []), rows)

    def _repr_html_(self) -> str:
        return self.to_table().to_html()


def plan_training(
    model: Any,
    *,
    top_k: Sequence[int] = (),
    top_k_frac: Sequence[float] = (),
    config: SieveLoraConfig | None = None,
    profile: RoutingProfile | None = None,
) -> TrainingPlan:
    """Count what `SieveLoraConfig` would train, for several numbers of experts.

    The model is built on the meta device from its configuration, and the adapter is really injected there, so the
    numbers are those of `get_peft_model`.

    Args:
        model: path or Hub id of a model or of its `config.json`, or a model of transformers.
        top_k: numbers of experts a layer to count for.
        top_k_frac: shares of each layer's experts to count for. Without either: 1/16, 1/8, 1/4 and 1/2. All experts
            always come last.
        config: the other options (rank, projections, what experts share, what else is trained, score); default
            `SieveLoraConfig()`.
        profile: routing of this model, for the coverage of the hottest experts. No expert of a layer that no token
            reached gets an adapter of its own then, as in calibration.

    Raises:
        SieveError: no such model, one without experts, an option that cannot be, or a profile of another model.
    """
    config = SieveLoraConfig() if config is None else copy.copy(config)
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    # A configuration without adapter: what it needs of one is the class to build.
    make, base_name = skeleton_maker(model if name is None else name, LoraConfig(), [])
    base = make()
    sizes = {layer.path: layer.num_experts for layer in find_moe_layers(base)}
    if profile is not None:
        _check_profile(profile, sizes)
    choices = _choices(sizes, top_k, top_k_frac)
    model_parameters = sum(parameter.numel() for parameter in base.parameters())
    counted = [_hottest(profile, numbers, config.score) if profile is not None else numbers for numbers in choices]
    adapted = [path for path, number in counted[0].items() if config.adapts(range(number))]
    cost = _Cost.of(base, adapted, config)
    return TrainingPlan(
        model=name or base_name,
        model_parameters=model_parameters,
        num_experts=sizes,
        r=config.r,
        options=tuple(cost.planned(numbers, profile, config.score) for numbers in counted),
        cold_experts=config.cold_experts,
        share_outer=config.share_outer,
    )


@dataclass(frozen=True)
class _Cost:
    """Sizes: of what every adapter has, and of each slot of the experts' factors by layer.

    A size is a vector: trainable numbers, their bytes, bytes of all saved tensors.
    """

    fixed: torch.Tensor
    per_slot: dict[str, torch.Tensor]
    # Layer -> its experts, where those without an adapter of their own have one slot together.
    sharing: dict[str, int]

    @classmethod
    def of(cls, base: nn.Module, paths: list[str], config: SieveLoraConfig) -> _Cost:
        """Measured on an adapter with one expert in each layer: factors have a matrix for each slot, or one for all."""
        config.selected_experts = {path: [0] for path in paths}
        model = get_peft_model(base, config)
        total = _size(model.parameters())
        total[2] = _size(get_peft_model_state_dict(model).values())[2]
        for_all, shared = OUTER_FACTORS if config.share_outer else (), config.cold_experts == "shared"
        per_slot, sharing = {}, {}
        for path, layer in expert_layers(base):
            factors = {name: p for name, p in layer.named_parameters() if name.startswith("lora_")}
            per_slot[path] = _size(p[:1] for name, p in factors.items() if not name.startswith(for_all))
            sharing[path] = layer.shape.num_experts if shared else 0
        slots = cls(torch.zeros_like(total), per_slot, sharing)
        return replace(slots, fixed=total - slots.size(dict.fromkeys(paths, 1)))

    def size(self, experts: dict[str, int]) -> torch.Tensor:
        """Of an adapter for so many experts of each layer."""
        slots = {path: experts[path] + (experts[path] < self.sharing[path]) for path in self.per_slot}
        return sum((slots[path] * one for path, one in self.per_slot.items()), self.fixed)

    def planned(self, experts: dict[str, int], profile: RoutingProfile | None, score: str) -> PlannedAdapter:
        numbers, size, saved = self.size(experts).tolist()
        coverage = _coverages(profile, experts, score) if profile is not None else []
        return PlannedAdapter(
            experts=experts,
            trainable_parameters=numbers,
            adapter_bytes=saved,
            gradient_bytes=size,
            optimizer_bytes=_ADAM_STATES * size,
            coverage=sum(coverage) / len(coverage) if coverage else None,
            lowest_coverage=min(coverage, default=None),
        )


def size_text(size: int) -> str:
    """Bytes in the largest unit of 1,000 that leaves a digit before the point."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        del units[0]
    digits = 0 if units[0] == "B" or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {units[0]}"


def _size(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """How many trainable numbers tensors have, how many bytes these are, and how many bytes all."""
    sizes = [(x.numel() * x.requires_grad, x.nbytes * x.requires_grad, x.nbytes) for x in tensors]
    return torch.tensor(sizes, dtype=torch.int64, device="cpu").view(-1, 3).sum(0)


def _choices(sizes: dict[str, int], top_k: Sequence[int], top_k_frac: Sequence[float]) -> list[dict[str, int]]:
    """The numbers of experts a layer to count for: each once, rising, all experts last."""
    for number in top_k:
        if not is_whole(number) or not 1 <= number <= min(sizes.values()):
            kind = f"whole numbers from 1 to {min(sizes.values())}, the experts of the smallest layer"
            raise must_be("top_k", kind, number)
    for fraction in top_k_frac:
        share("top_k_frac", fraction)
    fractions = top_k_frac if top_k or top_k_frac else DEFAULT_FRACTIONS
    wanted = [dict.fromkeys(sizes, int(number)) for number in top_k]
    wanted += [{path: experts_per_layer(n, fraction) for path, n in sizes.items()} for fraction in (*fractions, 1.0)]
    distinct = {tuple(numbers.values()): numbers for numbers in wanted}
    return sorted(distinct.values(), key=lambda numbers: sum(numbers.values()))


def _check_profile(profile: RoutingProfile, sizes: dict[str, int]) -> None:
    profiled = {path: len(counts) for path, counts in profile.counts.items()}
    different = [path for path in {**sizes, **profiled} if sizes.get(path) != profiled.get(path)]
    if different:
        raise SieveError(
            f"The profile differs from the model in the experts of {listed(different)}. Profile this model."
        )


def _hottest(profile: RoutingProfile, numbers: dict[str, int], score: str) -> dict[str, int]:
    """`numbers`, with none for layers that get no experts."""
    reached = select_experts(profile, top_k=1, score=score)
    return {path: number if reached[path] else 0 for path, number in numbers.items()}


def _coverages(profile: RoutingProfile, experts: dict[str, int], score: str) -> list[float]:
    """By layer, of those that get experts."""
    curves = coverage_curves(profile, score=score)
    return [curve[experts[path] - 1] for path, curve in curves.items() if experts[path]]


def _experts_text(experts: dict[str, int], sizes: dict[str, int]) -> str:
    numbers, of = sorted(set(experts.values()) - {0}), sorted(set(sizes.values()))
    first, second = (str(n[0]) if len(n) == 1 else f"{n[0]}-{n[-1]}" for n in (numbers, of))
    return f"{first} of {second}"
