"""An adapter layer whose experts have ranks of their own, which move from one to another during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from ...errors import SieveError
from ...kernels.groups import Slots
from ...moe.topology import MoELayer
from ...routing.counting import DispatchCounter
from ..common.experts.factors import AdapterPlan, ExpertSlots, Pack, initialize
from ..common.experts.fused import FusedSieveExperts
from ..common.experts.layer import FACTOR_GROUPS, SieveExpertLayer, group_of
from ..common.experts.module_list import ModuleListSieveExperts
from ..common.experts.parallel import ParallelSieveExperts
from ..sieve.config import SieveLoraConfig
from .allocation import AllocationRule, share_of
from .config import EpngConfig
from .growth import generator_for, orthogonal_rows
from .ledger import Ledger, blocks_after, first_experts
from .ragged import RaggedFactors, RaggedPlan, RowMove
from .states import tensors_by_row

_ADVICE = "Train with per_device_train_batch_size=1, or use a SieveLoraConfig"
_BOOKKEEPING = ("slots", "blocks", "importance", "ledger")


class RankedSlots(ExpertSlots):
    """Which expert has which slot, and what the schedule knows of each; all of it is saved with the weights.

    `blocks`, int32, (num_experts,): the blocks of each expert, 0 without an adapter. `importance`, float64,
    (num_experts,): gate weight of the tokens routed to each, decayed. `ledger`, int32, (events, 3): step, expert, its
    blocks from then on. `ids` are in the order of the factors' rows.

    `plan`, and `first` and `first_blocks`, the experts that were adapted at the beginning and the blocks of each then,
    are there on the meta device, too.
    """

    blocks: torch.Tensor
    importance: torch.Tensor
    ledger: torch.Tensor

    def __init__(self, num_experts: int, plan: RaggedPlan, ledger: Ledger, first_blocks: int) -> None:
        super().__init__(num_experts, plan.experts)
        self.register_buffer("blocks", torch.zeros(num_experts, dtype=torch.int32, device="cpu"))
        self.register_buffer("importance", torch.zeros(num_experts, dtype=torch.float64, device="cpu"))
        self.register_buffer("ledger", _ledger_tensor(ledger))
        self.first, self.first_blocks = first_experts(plan.experts, ledger), first_blocks
        self.show(plan, self.ledger)

    def show(self, plan: RaggedPlan, events: torch.Tensor) -> None:
        """Take over the experts and blocks of a plan, and the ledger that led there."""
        self.plan, self.events = plan, events.to("cpu", torch.int32, copy=True)
        self._say(plan.experts, plan.stored)
        self.restore()

    def integers(self) -> dict[str, torch.Tensor]:
        blocks = blocks_tensor(self.num_experts, self.plan)
        return {**super().integers(), "blocks": blocks, "ledger": self.events.clone()}

    def record(self, step: int, before: RaggedPlan, after: RaggedPlan) -> None:
        """Take over a plan, and enter what changed into the ledger."""
        now = after.blocks_of
        rows = [[step, e, now.get(e, 0)] for e, number in before.blocks_of.items() if now.get(e, 0) != number]
        self.show(after, torch.cat((self.events, _ledger_tensor(rows))))

    def blocks_in(self, saved: Mapping[str, torch.Tensor]) -> dict[int, int] | None:
        """Adapted expert -> its blocks, of saved tensors that updates of this adapter can have come to."""
        saved = {name: saved[f"lora_experts.{name}"] for name in _BOOKKEEPING if f"lora_experts.{name}" in saved}
        if len(saved) < len(_BOOKKEEPING) or saved["blocks"].numel() != self.num_experts:
            return None
        if saved["ledger"].dim() != 2 or saved["ledger"].shape[1] != 3:
            return None
        blocks = {expert: number for expert, number in enumerate(saved["blocks"].tolist()) if number}
        played = blocks_after(self.first, saved["ledger"].tolist(), self.first_blocks)
        same_budget = sum(blocks.values()) == len(self.first) * self.first_blocks
        return blocks if blocks == played and same_budget else None


class EpngExpertLayer(SieveExpertLayer):
    """LoRA on some of the experts of one layer, of ranks that differ by expert.

    Attributes:
        traffic: what the router sent where since the last step.
    """

    def __init__(self, base_layer: nn.Module, layer: MoELayer) -> None:
        super().__init__(base_layer, layer)
        self.traffic = self._new_counter()

    def _new_plan(self, plan: AdapterPlan, config: SieveLoraConfig) -> AdapterPlan:
        assert isinstance(config, EpngConfig)
        return RaggedPlan.of(plan, config.blocks_in(self.path), block_ranks(plan.ranks, config, self.path))

    def _new_slots(self, adapter_name: str, config: SieveLoraConfig) -> ExpertSlots:
        assert isinstance(config, EpngConfig)
        ledger = (config.ledger or {}).get(self.path, ())
        return RankedSlots(self.shape.num_experts, self.plan(adapter_name), ledger, config.first_blocks)

    def _add_factors(self, adapter_name: str, name: str, init: bool | str, device: torch.device) -> None:
        group = FACTOR_GROUPS[name]
        plan = self.plan(adapter_name)
        adapted = list(plan.group_ranks(group))
        if not adapted:
            return
        in_features, out_features = self.shape.projections[adapted[0]]
        for side, features in (("A", in_features), ("B", out_features)):
            getattr(self, f"{name}_{side}")[adapter_name] = RaggedFactors(plan.num_rows(group), features, device)
        if device.type != "meta":
            for pack in self.packs(adapter_name, name):
                initialize(pack.a.detach(), pack.b.detach(), list(pack.ranks.values()), init)

    # Reading

    def plan(self, adapter_name: str) -> RaggedPlan:
        """The plan of one adapter."""
        plan = self.plans[adapter_name]
        assert isinstance(plan, RaggedPlan)
        return plan

    def slots_module(self, adapter_name: str) -> RankedSlots:
        module = self.lora_experts[adapter_name]
        assert isinstance(module, RankedSlots)
        return module

    def check_saved(self, adapter_name: str, saved: Mapping[str, torch.Tensor]) -> None:
        """As of all expert layers; and refuse rows of other ranks, or without what resuming needs."""
        super().check_saved(adapter_name, saved)
        missing = [name for name in _BOOKKEEPING if f"lora_experts.{name}" not in saved]
        if missing:
            raise SieveError(
                f"The checkpoint has no {self.path}.lora_experts.{missing[0]} for adapter '{adapter_name}', which says "
                "whose the factors are. Save or download the adapter again."
            )
        if self.slots_module(adapter_name).blocks_in(saved) != self.plan(adapter_name).blocks_of:
            raise SieveError(
                f"The weights of adapter '{adapter_name}' in {self.path} have other ranks by expert than the adapter "
                "(expert_blocks). Load adapter_config.json and weights of one save."
            )

    def packs(self, adapter_name: str, name: str) -> list[Pack]:
        if adapter_name not in getattr(self, f"{name}_A"):
            return []
        plan, group = self.plan(adapter_name), FACTOR_GROUPS[name]
        ranks = [plan.group_ranks(group, number) for number, _ in plan.by_blocks]
        counts = [len(places) for _, places in plan.by_blocks]
        rows = [count * sum(own.values()) for count, own in zip(counts, ranks, strict=True)]
        weights = [getattr(self, f"{name}_{side}")[adapter_name].weight for side in "AB"]
        # Split, not sliced: the gradients of the parts are then laid side by side, and no whole is made for each.
        parts = zip(*(weight.split(rows) for weight in weights), strict=True)
        ids = self.slots_module(adapter_name).placed(weights[0].device)[1].split(counts)
        return [
            Pack(
                Slots(places, own_ids, len(places)), own_ranks, *(part.unflatten(0, (len(places), -1)) for part in own)
            )
            for (_, places), own_ids, own_ranks, own in zip(plan.by_blocks, ids, ranks, parts, strict=True)
        ]

    def factors(self, adapter_name: str, projection: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Not to be had: the experts' ranks differ.

        Raises:
            SieveError: always; `expert_factors` has those of one expert.
        """
        raise SieveError(
            f"the factors of all experts of {self.path} were asked for as one tensor, expected ranks that do not "
            "differ by expert: use expert_factors(adapter_name, projection, expert)"
        )

    def expert_factors(
        self, adapter_name: str, projection: str, expert: int
    ) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        plan, name = self.plan(adapter_name), group_of(projection)
        rows = plan.rows(FACTOR_GROUPS[name]).get((projection, expert))
        if rows is None:
            return None
        a, b = (getattr(self, f"{name}_{side}")[adapter_name].weight[rows] for side in "AB")
        return a, b, self.scaling[adapter_name] * plan.relative_scaling[projection]

    # Training

    def is_trained(self, adapter_name: str) -> bool:
        """Whether an adapter of this layer is active and has gradients."""
        if adapter_name not in self.plans or adapter_name not in self.active_adapters:
            return False
        return any(factors.weight.requires_grad for factors in self.parts(adapter_name))

    def take_mass(self) -> torch.Tensor | None:
        """The gate weight sent to each expert since it was last taken, float64, (num_experts,); None if none was."""
        mass = self.traffic.mass()
        self.traffic = self._new_counter()
        return mass

    def _new_counter(self) -> DispatchCounter:
        return DispatchCounter(self.shape.num_experts, _ADVICE)

    def add_importance(self, adapter_name: str, mass: torch.Tensor, decay: float) -> None:
        """Let the importance so far decay, and add the mass of one step, (num_experts,)."""
        slots = self.slots_module(adapter_name)
        # Not in place: whoever cast the model to half precision cast this, too.
        slots.importance = decay * slots.importance.to(torch.float64) + mass.to(slots.importance.device)

    def allocation(self, adapter_name: str, config: EpngConfig) -> dict[int, int]:
        """Expert -> the blocks that an update now gives it; waits for the device."""
        plan = self.plan(adapter_name)
        importance = self.slots_module(adapter_name).importance.tolist()
        if not any(importance):
            return plan.blocks_of
        # All started with the same, and the sum never changes.
        first = sum(plan.blocks) // config.first_blocks
        rule = AllocationRule(
            config.prune_ratio, config.grow_ratio, share_of(config.keep_ratio, first), self._capacity(plan, config)
        )
        return rule(importance, plan.blocks_of)

    def _capacity(self, plan: RaggedPlan, config: EpngConfig) -> int:
        """The most blocks of an expert: no more rows than can be orthogonal, nor than `max_rank` allows."""
        most = min(min(self.shape.projections[p]) // rank for p, rank in plan.block_ranks.items())
        return most if config.max_rank is None else min(most, config.max_rank // config.rank_block)

    def new_rows(self, adapter_name: str, blocks: dict[int, int], seed: tuple[object, ...]) -> dict[str, torch.Tensor]:
        """The rows of A that an update adds: name of the factors -> (new rows, in), float64, on the CPU."""
        before = self.plan(adapter_name)
        after = before.moved_to(blocks)
        found = {}
        for name, group in FACTOR_GROUPS.items():
            old, rows = before.rows(group), []
            for (projection, expert), new in after.rows(group).items():
                known = old[projection, expert]
                count = (new.stop - new.start) - (known.stop - known.start)
                if count:
                    weight = getattr(self, f"{name}_A")[adapter_name].weight[known]
                    rows.append(orthogonal_rows(weight, count, generator_for(*seed, self.path, projection, expert)))
            if rows:
                found[name] = torch.cat(rows)
        return found

    def tensors_by_row(self, adapter_name: str) -> dict[str, list[torch.Tensor]]:
        """Attribute of the factors -> what moves with their rows; see `states.tensors_by_row`."""
        held = {name: getattr(self, name) for name in self.adapter_layer_names}
        return {
            n: tensors_by_row(modules[adapter_name].weight) for n, modules in held.items() if adapter_name in modules
        }

    def move(
        self,
        adapter_name: str,
        blocks: dict[int, int],
        new_rows: Mapping[str, torch.Tensor],
        tensors: Mapping[str, Sequence[torch.Tensor]],
        step: int,
    ) -> None:
        """Give the experts these blocks: rows that stay move, with all that belongs to them, the others are new.

        Args:
            blocks: expert -> its blocks, in all as many as before.
            new_rows: see `new_rows`; those of B are zero, so that the function of no expert that stays is changed.
            tensors: see `tensors_by_row`.
            step: to enter into the ledger.
        """
        before = self.plan(adapter_name)
        after = before.moved_to(blocks)
        for name, group in FACTOR_GROUPS.items():
            move = RowMove.between(before, after, group)
            for side in "AB":
                for index, tensor in enumerate(tensors.get(f"{name}_{side}", ())):
                    # The factor itself comes first.
                    move.apply(tensor, new_rows.get(name) if side == "A" and index == 0 else None)
        self.plans[adapter_name] = after
        self.slots_module(adapter_name).record(step, before, after)

    # Checkpoints

    def saved_state(self, adapter_name: str) -> tuple[RaggedPlan, torch.Tensor]:
        """Plan and ledger, for `set_state`."""
        return self.plan(adapter_name), self.slots_module(adapter_name).events

    def set_state(self, adapter_name: str, plan: RaggedPlan, ledger: torch.Tensor) -> None:
        """Take the rows for those of another plan of the same size, whose values are about to be loaded."""
        slots = self.slots_module(adapter_name)
        self.plans[adapter_name] = plan
        slots.show(plan, ledger)
        # Whoever cast the model to half precision cast this, too, and values are loaded into what is there.
        slots.importance = slots.importance.to(torch.float64)

    def state_in(self, adapter_name: str, saved: Mapping[str, torch.Tensor]) -> tuple[RaggedPlan, torch.Tensor] | None:
        """Plan and ledger of saved weights, if training could have come to them from this adapter's first ranks.

        Args:
            saved: of this layer, by attribute and key.
        """
        blocks = self.slots_module(adapter_name).blocks_in(saved)
        return None if blocks is None else (self.plan(adapter_name).moved_to(blocks), saved["lora_experts.ledger"])


class EpngFusedExperts(EpngExpertLayer, FusedSieveExperts):
    """Ranks that differ by expert, on experts whose weights are stacked."""


class EpngModuleListExperts(EpngExpertLayer, ModuleListSieveExperts):
    """Ranks that differ by expert, on experts that are separate modules."""


class EpngParallelExperts(EpngExpertLayer, ParallelSieveExperts):
    """Ranks that differ by expert, on experts in pairs of stacks."""


_CLASSES: dict[type[SieveExpertLayer], type[EpngExpertLayer]] = {
    FusedSieveExperts: EpngFusedExperts,
    ModuleListSieveExperts: EpngModuleListExperts,
    ParallelSieveExperts: EpngParallelExperts,
}


@cache
def epng_class(layer_class: type[SieveExpertLayer]) -> type[EpngExpertLayer]:
    """The adapter layer that is like `layer_class`, with ranks that differ by expert."""
    if layer_class in _CLASSES:
        return _CLASSES[layer_class]
    namespace: dict[str, Any] = {"__module__": layer_class.__module__}
    return type(f"Epng{layer_class.__name__}", (EpngExpertLayer, layer_class), namespace)


def block_ranks(ranks: Mapping[str, int], config: EpngConfig, path: str) -> dict[str, int]:
    """Projection -> rank of one block.

    Args:
        ranks: projection -> the rank that an expert starts with.
        path: of the layer.

    Raises:
        SieveError: a rank is not in whole blocks.
    """
    for projection, rank in ranks.items():
        if rank % config.first_blocks:
            raise SieveError(
                f"rank_pattern gives {projection} of {path} the rank {rank}, expected a multiple of "
                f"{config.first_blocks}, the number of blocks (r / rank_block) that an expert starts with: change it, "
                "or rank_block"
            )
    return {projection: rank // config.first_blocks for projection, rank in ranks.items()}


def blocks_tensor(num_experts: int, plan: RaggedPlan) -> torch.Tensor:
    """The blocks of each expert, 0 for those without an adapter: int32, (num_experts,), on the CPU."""
    blocks = torch.zeros(num_experts, dtype=torch.int32, device="cpu")
    blocks[list(plan.experts)] = torch.tensor(plan.blocks, dtype=torch.int32, device="cpu")
    return blocks


def _ledger_tensor(rows: Ledger) -> torch.Tensor:
    return torch.tensor([list(row) for row in rows], dtype=torch.int32, device="cpu").view(-1, 3)
