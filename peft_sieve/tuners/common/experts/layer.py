"""An adapter layer around the routed experts of a MoE block: what all layouts share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ....kernels.groups import Slots
from ....moe.families.family import PROJECTIONS
from ....moe.placement import execution_device
from ....moe.topology import MoELayer
from ..adapter_layer import AdapterLayer
from ..patterns import ranks_and_alphas
from .factors import (
    FACTOR_NAMES,
    OUTER_FACTORS,
    AdapterPlan,
    ExpertDeltas,
    ExpertFactors,
    ExpertSlots,
    Pack,
    initialize,
)
from .hellori import random_share
from .merging import ExpertMerging
from .saved import check_saved_experts

# The projections that read the layer's input share one packed A; down_proj has its own.
INPUT_PROJECTIONS = PROJECTIONS[:2]
# Name of the packed factors -> the projections in them.
FACTOR_GROUPS = {"lora_gate_up": INPUT_PROJECTIONS, "lora_down": PROJECTIONS[2:]}


class SieveExpertLayer(nn.Module, ExpertMerging, AdapterLayer, LoraLayer):
    """LoRA on some of the experts of one layer.

    Args:
        base_layer: the experts module.
        layer: its description.

    Per adapter it holds `lora_gate_up_A`, `lora_gate_up_B`, `lora_down_A`, `lora_down_B` (`ExpertFactors`, only those
    of the adapted projections) and `lora_experts` (`ExpertSlots`); one that tunes the experts fully holds
    `lora_gate_up_delta` and `lora_down_delta` (`ExpertDeltas`) in place of the factors.
    """

    # Whether `forward` is what the model calls, and takes `adapter_names`, one for each token.
    supports_mixed_batches = False
    adapter_layer_names = FACTOR_NAMES
    second_factor_names = ("lora_gate_up_B", "lora_down_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "lora_experts", "plans")

    def __init__(self, base_layer: nn.Module, layer: MoELayer) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.path = layer.path
        self.family = layer.family
        self.shape = layer.shape
        self.plans: dict[str, AdapterPlan] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.lora_experts = nn.ModuleDict()
        # (projection, expert) -> the weight before merging, bit for bit.
        self._before_merge: dict[tuple[str, int], torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        # A MoE block may read attributes of its experts (num_experts, act_fn, ...).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None

    def update_layer(
        self, adapter_name: str, experts: Sequence[int], config: Any, without_values: bool = False
    ) -> None:
        """Add an adapter for `experts` (ascending ids), initialised as `config.init_lora_weights` says.

        Args:
            without_values: leave the factors on the meta device, for `allocate`, since saved ones will follow.
        """
        ranks, alphas = ranks_and_alphas(config, self.path, self.family, self.shape, self.get_base_layer())
        scaling = _scaling(config.lora_alpha, config.r, config.use_rslora)
        relative = {n: _scaling(alphas[n], ranks[n], config.use_rslora) / scaling for n in ranks}
        others = sorted(set(range(self.shape.num_experts)) - set(experts))
        cold = tuple(others) if config.cold_experts == "shared" else ()
        plan = AdapterPlan(tuple(experts), ranks, relative, cold=cold, share_outer=config.share_outer)
        self.plans[adapter_name] = self._new_plan(plan, config)
        self.r[adapter_name] = config.r
        self.lora_alpha[adapter_name] = config.lora_alpha
        self.scaling[adapter_name] = scaling
        if config.expert_tuning == "full":
            self._plan_full(adapter_name)
        self.use_rslora[adapter_name] = config.use_rslora
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_experts[adapter_name] = self._new_slots(adapter_name, config)
        # Filled where they are used: those of a large model take a while on the CPU.
        device = torch.device("meta") if without_values else execution_device(self.get_base_layer())
        add = self._add_deltas if self.plans[adapter_name].full else self._add_factors
        for name in FACTOR_GROUPS:
            add(adapter_name, name, config.init_lora_weights, device)
        if config.hellori_density is not None:
            self._train_a_share(adapter_name, config.hellori_density, config.hellori_seed)
        self.place_new(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new_plan(self, plan: AdapterPlan, config: Any) -> AdapterPlan:
        return plan

    def _new_slots(self, adapter_name: str, config: Any) -> ExpertSlots:
        plan = self.plans[adapter_name]
        return ExpertSlots(self.shape.num_experts, plan.experts, plan.cold)

    def _add_factors(self, adapter_name: str, name: str, init: bool | str, device: torch.device) -> None:
        group = FACTOR_GROUPS[name]
        plan = self.plans[adapter_name]
        ranks = [plan.ranks[p] for p in group if p in plan.ranks]
        if not ranks:
            return
        in_features, out_features = self.shape.projections[next(p for p in group if p in plan.ranks)]
        factor_a, factor_b = (
            ExpertFactors(self._num_slots(plan, f"{name}_{side}"), sum(ranks), features, device)
            for side, features in (("A", in_features), ("B", out_features))
        )
        # On the meta device, saved values follow: drawing some before them would take longer than reading those.
        if not factor_a.weight.is_meta:
            initialize(factor_a.weight.data, factor_b.weight.data, ranks, init)
        getattr(self, f"{name}_A")[adapter_name] = factor_a
        getattr(self, f"{name}_B")[adapter_name] = factor_b

    @staticmethod
    def _num_slots(plan: AdapterPlan, factor: str) -> int:
        return 1 if plan.share_outer and factor in OUTER_FACTORS else plan.num_slots

    def _plan_full(self, adapter_name: str) -> None:
        """As planned, but with differences of full size, which neither rank nor alpha scales."""
        plan = self.plans[adapter_name]
        widths = {projection: self.shape.projections[projection][1] for projection in plan.ranks}
        self.plans[adapter_name] = AdapterPlan(plan.experts, widths, dict.fromkeys(widths, 1.0), full=True)
        # So that `set_scale` is a factor on the difference.
        self.r[adapter_name], self.lora_alpha[adapter_name] = 1, 1
        self.scaling[adapter_name], self.use_rslora[adapter_name] = 1.0, False

    def _add_deltas(self, adapter_name: str, name: str, init: bool | str, device: torch.device) -> None:
        group = FACTOR_GROUPS[name]
        plan = self.plans[adapter_name]
        found = [projection for projection in group if projection in plan.ranks]
        if not found:
            return
        in_features = self.shape.projections[found[0]][0]
        deltas = ExpertDeltas(len(plan.experts), sum(plan.ranks[p] for p in found), in_features, device)
        if not deltas.weight.is_meta:
            bound = 1 / math.sqrt(in_features) if init is False else 0.0
            nn.init.uniform_(deltas.weight.data, -bound, bound) if bound else nn.init.zeros_(deltas.weight.data)
        getattr(self, f"{name}_delta")[adapter_name] = deltas

    def _train_a_share(self, adapter_name: str, density: float, seed: int) -> None:
        """HELLoRI: all of A is frozen, and all of B but a share (`random_share`)."""
        plan = self.plans[adapter_name]
        owners: list[int | str] = [*plan.experts, *(["cold"] if plan.cold else [])]
        for name in ("lora_gate_up", "lora_down"):
            if adapter_name in getattr(self, f"{name}_B"):
                factor = getattr(self, f"{name}_B")[adapter_name]
                shape = factor.weight.shape[1], factor.weight.shape[2]
                factor.kept = random_share(owners, shape, density, seed=seed, name=f"{self.path}.{name}_B")
                if not factor.weight.is_meta:
                    factor.weight.data.mul_(factor.kept.to(factor.weight.device))
        # A new mapping: PEFT's is one for all layers.
        self.frozen_peft_weight_names = self.frozen_peft_weight_names | {
            adapter_name: ("lora_gate_up_A", "lora_down_A")
        }

    def allocate(self, adapter_name: str) -> None:
        """Give memory to the factors of an adapter that was added without values."""
        for factors in self.parts(adapter_name):
            factors.allocate(execution_device(self.get_base_layer()))

    # PEFT's two look for the factors where linear layers have them.

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for name in self.those_here(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters; None sets them to their first one."""
        for name in self.those_here(self.active_adapters):
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                self.scaling[name] /= scale

    # What is active

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; merged ones are unmerged when switched off, as PEFT's layers do."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def applied_adapters(self) -> list[str]:
        """The active adapters to add in a forward: none while they are disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return self.those_here(self.active_adapters)

    def those_here(self, adapter_names: Sequence[str]) -> list[str]:
        """Those of the adapters that this layer has."""
        return [name for name in adapter_names if name in self.plans]

    def slots_module(self, adapter_name: str) -> ExpertSlots:
        """The map between experts and slots of one adapter."""
        module = self.lora_experts[adapter_name]
        assert isinstance(module, ExpertSlots)
        return module

    def check_saved(self, adapter_name: str, saved: Mapping[str, torch.Tensor]) -> None:
        """Refuse tensors of other experts than those that the adapter has here; see `check_saved_experts`."""
        check_saved_experts(self, adapter_name, saved)

    def factors(self, adapter_name: str, projection: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """One projection's factors: A (slots, rank, in), B (slots, rank, out) and the scaling; None if not adapted.

        With `share_outer`, the outer one of the two has one slot.
        """
        plan = self.plans[adapter_name]
        if projection not in plan.ranks or plan.full:
            return None
        name, rows = self._packed(adapter_name, projection)
        scaling = self.scaling[adapter_name] * plan.relative_scaling[projection]
        a, b = (getattr(self, f"{name}_{side}")[adapter_name].used()[:, rows] for side in "AB")
        return a, b, scaling

    def full_delta(self, adapter_name: str, projection: str) -> tuple[torch.Tensor, float] | None:
        """One projection's difference of full size, (slots, out, in), and the scaling; None if it has none."""
        plan = self.plans[adapter_name]
        if projection not in plan.ranks or not plan.full:
            return None
        name, rows = self._packed(adapter_name, projection)
        return getattr(self, f"{name}_delta")[adapter_name].weight[:, rows], self.scaling[adapter_name]

    def _packed(self, adapter_name: str, projection: str) -> tuple[str, slice]:
        """Which group of packed tensors holds a projection, and where."""
        ranks, name = self.plans[adapter_name].ranks, group_of(projection)
        group = FACTOR_GROUPS[name]
        start = sum(ranks.get(p, 0) for p in group[: group.index(projection)])
        return name, slice(start, start + ranks[projection])

    def expert_factors(
        self, adapter_name: str, projection: str, expert: int
    ) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A (rank, in), B (rank, out) and the scaling of one projection of one expert; None if it is not adapted."""
        factors, slot = self.factors(adapter_name, projection), self.plans[adapter_name].slot_of.get(expert)
        if factors is None or slot is None:
            return None
        a, b, scaling = factors
        a, b = (factor[slot if len(factor) > 1 else 0] for factor in (a, b))
        return a, b, scaling

    def packs(self, adapter_name: str, name: str) -> list[Pack]:
        """The factors of `lora_gate_up` or `lora_down` in packs of one rank; none if no projection is adapted there."""
        if adapter_name not in getattr(self, f"{name}_A"):
            return []
        plan = self.plans[adapter_name]
        ranks = {p: plan.ranks[p] for p in FACTOR_GROUPS[name] if p in plan.ranks}
        a, b = (getattr(self, f"{name}_{side}")[adapter_name].used() for side in "AB")
        _, ids = self.slots_module(adapter_name).placed(a.device)
        return [Pack(Slots(plan.slot_of, ids, len(plan.experts)), ranks, a, b)]

    def with_deltas(self, projection: str, expert: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What one projection of one expert gives with the active adapters.

        Args:
            x: its input, (rows, in).
            output: what its own weight gives, (rows, out).

        Returns:
            (rows, out); `output` itself where nothing is added.
        """
        for name in self.applied_adapters():
            full, slot = self.full_delta(name, projection), self.plans[name].slot_of.get(expert)
            if full is not None and slot is not None:
                delta, scaling = full
                output = output + scaling * (x.to(output) @ delta[slot].to(output).T)
                continue
            factors = self.expert_factors(name, projection, expert)
            if factors is None:
                continue
            a, b, scaling = factors
            # In the type of the output, under autocast the lower one, and where that is.
            inner = self.lora_dropout[name](x).to(output) @ a.to(output).T  # (rows, rank)
            output = output + scaling * (inner @ b.to(output))
        return output

    def __repr__(self) -> str:
        return "sieve." + super().__repr__()


def expert_layers(model: nn.Module) -> list[tuple[str, SieveExpertLayer]]:
    """(path in the base model, layer) of every layer of expert adapters in `model`."""
    return [(module.path, module) for module in model.modules() if isinstance(module, SieveExpertLayer)]


def group_of(projection: str) -> str:
    """The name of the packed factors that a projection is in."""
    return next(name for name, group in FACTOR_GROUPS.items() if projection in group)


def _scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank)
