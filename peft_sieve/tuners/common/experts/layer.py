"""An adapter layer around the routed experts of a MoE block: what all layouts share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ....errors import SieveError
from ....moe.families.family import PROJECTIONS
from ....moe.placement import execution_device, first_tensor, is_offloaded, onloaded_for_change
from ....moe.storage import quantisation_of
from ....moe.topology import MoELayer
from ..patterns import ranks_and_alphas
from .factors import AdapterPlan, ExpertDeltas, ExpertFactors, ExpertSlots, Pack, initialize, slots_of
from .hellori import random_share

# The projections that read the layer's input share one packed A; down_proj has its own.
INPUT_PROJECTIONS = PROJECTIONS[:2]
# Name of the packed factors -> the projections in them.
FACTOR_GROUPS = {"lora_gate_up": INPUT_PROJECTIONS, "lora_down": PROJECTIONS[2:]}


class SieveExpertLayer(nn.Module, LoraLayer):
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
    adapter_layer_names = (
        *("lora_gate_up_A", "lora_gate_up_B", "lora_down_A", "lora_down_B"),
        *("lora_gate_up_delta", "lora_down_delta"),
    )
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
        self._unverified: set[str] = set()

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
        self.plans[adapter_name] = self._new_plan(AdapterPlan(tuple(experts), ranks, relative), config)
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
        for name, group in FACTOR_GROUPS.items():
            add = self._add_deltas if self.plans[adapter_name].full else self._add_factors
            add(adapter_name, name, group, config.init_lora_weights, device)
        if config.hellori_density is not None:
            self._train_a_share(adapter_name, config.hellori_density, config.hellori_seed)
        self._unverified.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        dtype = first_tensor(self.get_base_layer()).dtype
        if dtype.is_floating_point and dtype.itemsize > 1:
            for factors in self._factors_of(adapter_name):
                factors.to(dtype)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new_plan(self, plan: AdapterPlan, config: Any) -> AdapterPlan:
        return plan

    def _new_slots(self, adapter_name: str, config: Any) -> ExpertSlots:
        return ExpertSlots(self.shape.num_experts, self.plans[adapter_name].experts)

    def _add_factors(
        self, adapter_name: str, name: str, group: Sequence[str], init: bool | str, device: torch.device
    ) -> None:
        plan = self.plans[adapter_name]
        ranks = [plan.ranks[p] for p in group if p in plan.ranks]
        if not ranks:
            return
        in_features, out_features = self.shape.projections[next(p for p in group if p in plan.ranks)]
        factor_a = ExpertFactors(len(plan.experts), sum(ranks), in_features, device)
        factor_b = ExpertFactors(len(plan.experts), sum(ranks), out_features, device)
        # On the meta device, saved values follow: drawing some before them would take longer than reading those.
        if not factor_a.weight.is_meta:
            initialize(factor_a.weight.data, factor_b.weight.data, ranks, init)
        getattr(self, f"{name}_A")[adapter_name] = factor_a
        getattr(self, f"{name}_B")[adapter_name] = factor_b

    def _plan_full(self, adapter_name: str) -> None:
        """As planned, but with differences of full size, which neither rank nor alpha scales."""
        plan = self.plans[adapter_name]
        widths = {projection: self.shape.projections[projection][1] for projection in plan.ranks}
        self.plans[adapter_name] = AdapterPlan(plan.experts, widths, dict.fromkeys(widths, 1.0), full=True)
        # So that `set_scale` is a factor on the difference.
        self.r[adapter_name], self.lora_alpha[adapter_name] = 1, 1
        self.scaling[adapter_name], self.use_rslora[adapter_name] = 1.0, False

    def _add_deltas(
        self, adapter_name: str, name: str, group: Sequence[str], init: bool | str, device: torch.device
    ) -> None:
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
        experts = self.plans[adapter_name].experts
        for name in ("lora_gate_up", "lora_down"):
            if adapter_name in getattr(self, f"{name}_B"):
                factor = getattr(self, f"{name}_B")[adapter_name]
                shape = factor.weight.shape[1], factor.weight.shape[2]
                factor.kept = random_share(experts, shape, density, seed=seed, name=f"{self.path}.{name}_B")
                if not factor.weight.is_meta:
                    factor.weight.data.mul_(factor.kept.to(factor.weight.device))
        # A new mapping: PEFT's is one for all layers.
        self.frozen_peft_weight_names = self.frozen_peft_weight_names | {
            adapter_name: ("lora_gate_up_A", "lora_down_A")
        }

    def allocate(self, adapter_name: str) -> None:
        """Give memory to the factors of an adapter that was added without values."""
        for factors in self._factors_of(adapter_name):
            factors.allocate(execution_device(self.get_base_layer()))

    def _factors_of(self, adapter_name: str) -> list[ExpertFactors]:
        held = (getattr(self, name) for name in self.adapter_layer_names)
        return [modules[adapter_name] for modules in held if adapter_name in modules]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The type stays: PEFT calls this after loading, too, where a half-precision base would round loaded values.
        if adapter_name not in self.plans:  # as it calls it for every layer of the model
            return
        device = device or execution_device(self.get_base_layer())
        for module in (*self._factors_of(adapter_name), self.slots_module(adapter_name)):
            if not any(parameter.is_meta for parameter in module.parameters()):
                module.to(device)

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
        return self.verified(self.active_adapters)

    def verified(self, adapter_names: Sequence[str]) -> list[str]:
        """Those of the adapters that this layer has, their slots compared with the mask."""
        names = [name for name in adapter_names if name in self.plans]
        for name in self._unverified.intersection(names):
            self.verify_slots(name)
        return names

    def slots_module(self, adapter_name: str) -> ExpertSlots:
        """The map between experts and slots of one adapter."""
        module = self.lora_experts[adapter_name]
        assert isinstance(module, ExpertSlots)
        return module

    def verify_slots(self, adapter_name: str) -> None:
        """Loaders that assign without asking (transformers' `load_adapter`) may bring the tensors of other experts."""
        expected = slots_of(self.shape.num_experts, self.plans[adapter_name].experts)
        if not torch.equal(self.slots_module(adapter_name).slots.cpu(), expected):
            raise SieveError(
                f"the weights of adapter '{adapter_name}' in {self.path} belong to other experts than its "
                "selected_experts name, expected the same: load adapter_config.json and weights of one save"
            )
        self._unverified.discard(adapter_name)

    def factors(self, adapter_name: str, projection: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """One projection's factors: A (slots, rank, in), B (slots, rank, out) and the scaling; None if not adapted."""
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
        factors, slots = self.factors(adapter_name, projection), self.plans[adapter_name].experts
        if factors is None or expert not in slots:
            return None
        a, b, scaling = factors
        slot = slots.index(expert)
        return a[slot], b[slot], scaling

    def packs(self, adapter_name: str, name: str) -> list[Pack]:
        """The factors of `lora_gate_up` or `lora_down` in packs of one rank; none if no projection is adapted there."""
        if adapter_name not in getattr(self, f"{name}_A"):
            return []
        plan = self.plans[adapter_name]
        ranks = {p: plan.ranks[p] for p in FACTOR_GROUPS[name] if p in plan.ranks}
        a, b = (getattr(self, f"{name}_{side}")[adapter_name].used() for side in "AB")
        return [Pack(plan.experts, self.slots_module(adapter_name).ids, ranks, a, b)]

    def with_deltas(self, projection: str, expert: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What one projection of one expert gives with the active adapters.

        Args:
            x: its input, (rows, in).
            output: what its own weight gives, (rows, out).

        Returns:
            (rows, out); `output` itself where nothing is added.
        """
        for name in self.applied_adapters():
            full = self.full_delta(name, projection)
            if full is not None and expert in self.plans[name].experts:
                delta, scaling = full
                output = output + scaling * (x.to(output) @ delta[self.plans[name].experts.index(expert)].to(output).T)
                continue
            factors = self.expert_factors(name, projection, expert)
            if factors is None:
                continue
            a, b, scaling = factors
            # In the type of the output, under autocast the lower one, and where that is.
            inner = self.lora_dropout[name](x).to(output) @ a.to(output).T  # (rows, rank)
            output = output + scaling * (inner @ b.to(output))
        return output

    # Merging

    def expert_weight(self, projection: str, expert: int) -> torch.Tensor:
        """The base weight of one projection of one expert: a view, (out, in)."""
        return self.family.expert_weight(self.get_base_layer(), projection, expert)

    def get_delta_weight(self, adapter_name: str, projection: str, expert: int) -> torch.Tensor:
        """What the adapter adds to one projection of one adapted expert: (out, in), in float32 or wider."""
        full = self.full_delta(adapter_name, projection)
        if full is not None:
            weight, scaling = full
            slot = self.plans[adapter_name].experts.index(expert)
            return scaling * weight[slot].detach().to(torch.promote_types(weight.dtype, torch.float32))
        factors = self.expert_factors(adapter_name, projection, expert)
        assert factors is not None
        a, b, scaling = factors
        dtype = torch.promote_types(a.dtype, torch.float32)
        return scaling * (b.detach().to(dtype).T @ a.detach().to(dtype))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weights of their experts; the weights before it are kept for `unmerge`.

        Raises:
            SieveError: the weights take no sum (`check_mergeable`), or `safe_merge` and a merged weight is not finite;
                nothing was changed then.
        """
        self.check_mergeable()
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.plans:
                with onloaded_for_change(self):
                    self._merge_one(adapter_name, safe_merge)

    def check_mergeable(self) -> None:
        """Refuse to merge into quantised weights, where the sum would be rounded to what little they can say, and into
        offloaded ones of several modules, which nobody would write back.

        Raises:
            SieveError: the experts are either.
        """
        experts = self.get_base_layer()
        method = quantisation_of(experts)
        if method is not None:
            raise SieveError(
                f"merging was asked for, and the experts of {self.path} are quantised ({method}), expected weights in "
                "a floating-point type: load the adapter on the model without quantisation and merge there"
            )
        names = self.family.parameter_names(experts, list(self.shape.projections))
        if is_offloaded(experts) and any("." in name for name in names):
            raise SieveError(
                f"merging was asked for, and the experts of {self.path} are in separate modules that are offloaded, "
                "expected them in memory: load the model without offload and merge there"
            )

    def _merge_one(self, adapter_name: str, safe_merge: bool) -> None:
        plan = self.plans[adapter_name]
        slices = [(projection, expert) for projection in plan.ranks for expert in plan.experts]
        if safe_merge:
            for key in slices:
                self._check_finite(key, adapter_name)
        for key in slices:
            weight = self.expert_weight(*key)
            # In main memory: a quarter of the experts would not fit on the device a second time.
            self._before_merge.setdefault(key, weight.detach().to("cpu", copy=True))
            weight.copy_(self._merged(weight, adapter_name, key))
        self.merged_adapters.append(adapter_name)

    def _merged(self, weight: torch.Tensor, adapter_name: str, key: tuple[str, int]) -> torch.Tensor:
        delta = self.get_delta_weight(adapter_name, *key)
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def _check_finite(self, key: tuple[str, int], adapter_name: str) -> None:
        weight = self.expert_weight(*key)
        if not torch.isfinite(self._merged(weight, adapter_name, key)).all():
            raise SieveError(
                f"merging adapter '{adapter_name}' gives values that are not finite in {key[0]} of expert {key[1]} of "
                f"{self.path}, expected finite weights: the adapter is broken, train or load it again"
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weights back, bit for bit."""
        with onloaded_for_change(self):
            for key, weight in self._before_merge.items():
                self.expert_weight(*key).copy_(weight)
        self._before_merge.clear()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts module without adapters, with their weights added if `merge`."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._before_merge.clear()
        return self.get_base_layer()

    def __repr__(self) -> str:
        return "sieve." + super().__repr__()


def group_of(projection: str) -> str:
    """The name of the packed factors that a projection is in."""
    return next(name for name, group in FACTOR_GROUPS.items() if projection in group)


def _scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank)
