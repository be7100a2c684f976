"""Adapters on fused experts: stacks of weights that one call takes all tokens through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ....errors import SieveError
from ....kernels.backend import device_groups_usable
from ....kernels.chunks import CHUNK_ROWS, device_chunks, loop_chunks
from ....kernels.delta import Delta, PackedPart
from ....kernels.dispatch import sort_by_expert
from ....kernels.dropout import Dropout
from ....kernels.expert_function import ExpertFunction, ExpertPlan
from ....kernels.full_delta import FullDelta
from ....kernels.groups import Slots
from ....kernels.low_rank import LowRank
from ....kernels.shared_factors import SharedInput, SharedOutput
from ....kernels.stacks import ExpertStacks
from ....moe.families.fused import FusedExperts
from ....moe.placement import onloaded
from ..each_adapter import each_adapter
from .layer import FACTOR_GROUPS, SieveExpertLayer


class FusedSieveExperts(SieveExpertLayer):
    """LoRA on some experts of a layer whose weights are stacked, for every family of them (`FusedExperts`)."""

    family: FusedExperts

    supports_mixed_batches = True

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> torch.Tensor:
        """As the experts module: its arguments, and a result of the shape of its hidden states.

        Args:
            adapter_names: in a mixed batch, the adapter of each token.

        Raises:
            SieveError: a parameter of the experts themselves requires a gradient.
        """
        if adapter_names is not None and not self.disable_adapters:
            mixed: torch.Tensor = each_adapter(self._forward_with, adapter_names, args, kwargs)
            return mixed
        return self._forward(self.applied_adapters(), args, kwargs)

    def _forward_with(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._forward(self.those_here([adapter_name]), args, kwargs)

    def _forward(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if not adapters:
            return self.base_layer(*args, **kwargs)
        hidden_states, expert_ids, expert_weights = self.family.bind(self.get_base_layer(), args, kwargs)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])  # dbrx has a batch axis
        return self._adapted_forward(flat, expert_ids, expert_weights, adapters).view(hidden_states.shape)

    @torch.compiler.disable(reason="adapted experts run outside the graph: leave fullgraph at False")
    def _adapted_forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        adapters: list[str],
    ) -> torch.Tensor:
        """(tokens, hidden), (tokens, top_k), (tokens, top_k) -> (tokens, hidden)."""
        experts = self.get_base_layer()
        self._require_frozen(experts)
        stacks_again = partial(self._stacks, _compute_dtype(hidden_states))
        with stacks_again() as stacks:
            # Where the stock forward's hook would bring them, if the layer is on another device.
            hidden_states, expert_ids, expert_weights = (
                tensor.to(stacks.down.device) for tensor in (hidden_states, expert_ids, expert_weights)
            )
            return self._product(stacks, stacks_again, hidden_states, expert_ids, expert_weights, adapters)

    @contextmanager
    def _stacks(self, dtype: torch.dtype) -> Iterator[ExpertStacks]:
        """What the layer computes with, for one pass; what is stored in fewer bits as `dtype`."""
        experts = self.get_base_layer()
        with onloaded(experts):
            yield self.family.stacks(experts, dtype)

    def _product(
        self,
        stacks: ExpertStacks,
        stacks_again: Callable[[], AbstractContextManager[ExpertStacks]],
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        adapters: list[str],
    ) -> torch.Tensor:
        factors: list[torch.Tensor] = []
        first_adapters: list[list[Delta]] = []
        down_adapters: list[list[Delta]] = []
        for name in adapters:
            first_adapters.append(self._shares(name, "lora_gate_up", stacks, factors))
            down_adapters.append(self._shares(name, "lora_down", stacks, factors))
        first, down = _with_last_marked(first_adapters), _with_last_marked(down_adapters)

        # The stock forwards differ in how they multiply and in which order they sum. Following the one in use makes an
        # adapter that adds zero change nothing, to the bit.
        one_by_one = stacks.one_by_one
        on_device = not one_by_one and device_groups_usable([*stacks.first, stacks.down])
        order = None if one_by_one or on_device else self._order(adapters)
        dispatch = sort_by_expert(expert_ids, self.shape.num_experts, rank_major=one_by_one, order=order)
        if on_device:
            chunks = device_chunks(dispatch.counts, dispatch.order.numel())
        else:
            chunks = loop_chunks(dispatch.counts, chunk_rows=1 if one_by_one else CHUNK_ROWS, order=order)
        plan = ExpertPlan(chunks, stacks_again, first, down, keep=torch.is_grad_enabled())
        result: torch.Tensor = ExpertFunction.apply(plan, stacks, dispatch, hidden_states, expert_weights, *factors)
        if not stacks.passes_others:
            return result
        others = dispatch.order[dispatch.expert_ids >= self.shape.num_experts]
        return _add_unchanged(result, hidden_states, expert_weights, others)

    def _order(self, adapters: Sequence[str]) -> list[int] | None:
        """The experts in an order in which those that use one adapter together are neighbours; None if none do."""
        cold = [set(self.plans[name].cold) for name in adapters]
        if not any(cold):
            return None
        return sorted(range(self.shape.num_experts), key=lambda expert: [expert in those for those in cold])

    def _shares(self, adapter_name: str, name: str, stacks: ExpertStacks, factors: list[torch.Tensor]) -> list[Delta]:
        """One adapter's share in one product, its tensors added to `factors`; none if it adapts no projection there."""
        plan = self.plans[adapter_name]
        if plan.full:
            return self._full_delta(adapter_name, name, stacks.columns, factors)
        packs = self.packs(adapter_name, name)
        # One mask for all: a row belongs to one expert, so to one pack.
        dropout = _drawn(self.lora_dropout[adapter_name]) if packs else None
        kind: type[LowRank | SharedInput | SharedOutput] = LowRank
        if plan.share_outer and name == "lora_gate_up":
            kind = SharedInput
        elif plan.share_outer and stacks.post_norm is None:
            kind = SharedOutput
        found: list[Delta] = []
        for pack in packs:
            factors += [pack.a, pack.b]
            parts = self._parts(adapter_name, pack.ranks, stacks.columns)
            found.append(kind(pack.slots, parts, dropout, a=len(factors) - 2, b=len(factors) - 1))
        return found

    def _full_delta(
        self, adapter_name: str, name: str, columns: Mapping[str, slice], factors: list[torch.Tensor]
    ) -> list[Delta]:
        """The same for an adapter that tunes its experts fully."""
        plan, held = self.plans[adapter_name], getattr(self, f"{name}_delta")
        if adapter_name not in held:
            return []
        factors.append(held[adapter_name].used())
        ranks = {p: plan.ranks[p] for p in FACTOR_GROUPS[name] if p in plan.ranks}
        parts = self._parts(adapter_name, ranks, columns)
        _, ids = self.slots_module(adapter_name).placed(factors[-1].device)
        return [FullDelta(Slots(plan.slot_of, ids, len(plan.experts)), parts, len(factors) - 1)]

    def _parts(self, adapter_name: str, ranks: Mapping[str, int], columns: Mapping[str, slice]) -> list[PackedPart]:
        """Which rows of packed tensors belong to which columns of the product, for projections in the order packed."""
        parts, start = [], 0
        for projection, rank in ranks.items():
            scaling = self.scaling[adapter_name] * self.plans[adapter_name].relative_scaling[projection]
            parts.append(PackedPart(slice(start, start + rank), columns[projection], scaling))
            start += rank
        return parts

    def _require_frozen(self, experts: nn.Module) -> None:
        if not torch.is_grad_enabled():
            return
        trained = [name for name, parameter in experts.named_parameters() if parameter.requires_grad]
        if trained:
            raise SieveError(
                f"{', '.join(trained)} of {self.path} require gradients, expected the experts' own weights frozen, "
                "since only adapters are trained: call requires_grad_(False) on them"
            )


def _add_unchanged(
    result: torch.Tensor, hidden_states: torch.Tensor, expert_weights: torch.Tensor, pairs: torch.Tensor
) -> torch.Tensor:
    """Add the pairs whose expert returns its input, (n,) positions in (top_k, tokens), times their weights."""
    tokens = pairs % hidden_states.shape[0]
    rows = hidden_states[tokens] * expert_weights.T.reshape(-1)[pairs].unsqueeze(-1)
    return result.index_add(0, tokens, rows.to(result.dtype))


def _with_last_marked(adapters: list[list[Delta]]) -> list[Delta]:
    """What each adapter adds, in order, that of the last one which adds anything marked as such."""
    groups = [group for group in adapters if group]
    groups[-1:] = [[replace(share, last=True) for share in group] for group in groups[-1:]]
    return [share for group in groups for share in group]


def _compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype


def _drawn(dropout: nn.Module) -> Dropout | None:
    """The mask of one forward. Its seed comes from the CPU's generator: no wait for the device, and checkpointing
    restores it."""
    if not isinstance(dropout, nn.Dropout) or not dropout.training or dropout.p == 0:
        return None
    return Dropout(dropout.p, int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")))
