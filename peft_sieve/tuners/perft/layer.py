"""The adapters beside one MoE block.

They are a child of the block, and hooks add what they give to its output: the block and everything in it keep their
names and classes, which models look for (router logits are collected by name in some, and one asks for the class).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ...errors import SieveError
from ..common.adapter_layer import AdapterLayer
from ..common.balance import BalanceLoss, Routed
from ..common.experts.factors import ExpertFactors, ExpertSlots, cold_in, experts_in, initialize, no_map
from .blocks import MoEBlock
from .config import PerftConfig
from .mixture import dispatched_gates, mixture, routed_gates, wide_softmax

CHILD = "perft"
# Names of the two factors by form, so that weights of one form are never taken for those of the other.
FACTORS = {"lora": ("perft_A", "perft_B"), "bottleneck": ("perft_down", "perft_up")}
NO_MERGING = (
    "PERFT adapters cannot be merged: they stand beside whole MoE blocks, whose weights cannot hold what they add. "
    "Keep the adapter, or remove it with unload()."
)


@dataclass(frozen=True)
class PerftPlan:
    """What one adapter of the model is at one block.

    Attributes:
        variant, form, scaling: as in `PerftConfig`.
        num_adapters: how many low-rank or bottleneck adapters it has here.
        top_k: to how many of them R sends a token.
        normalized: whether R's gates sum to 1.
        balance_coef: factor of R's balance loss.
        activation: name of the one between the factors; None for none.
        experts: of E: ids of the experts that have an adapter, ascending.
    """

    variant: str
    form: str
    scaling: float
    num_adapters: int
    top_k: int
    normalized: bool
    balance_coef: float
    activation: str | None
    experts: tuple[int, ...] = ()


class PerftLayer(nn.Module, AdapterLayer):
    """PERFT adapters beside one block.

    Args:
        block: the module.
        found: its description.
        balance: is told what routers of adapters do.

    Per adapter it holds two `ExpertFactors` of shape (adapters, r, width) under the names of `FACTORS`; for R a linear
    `perft_router`, for E `perft_experts` (`ExpertSlots`).
    """

    adapter_layer_names = ("perft_A", "perft_B", "perft_down", "perft_up", "perft_router")
    second_factor_names = tuple(second for _, second in FACTORS.values())
    other_param_names = ("r", "perft_dropout", "perft_experts", "plans")
    perft_dropout: nn.ModuleDict
    perft_router: nn.ModuleDict
    perft_experts: nn.ModuleDict

    def __init__(self, block: nn.Module, found: MoEBlock, balance: BalanceLoss) -> None:
        super().__init__()
        self.path, self.width = found.path, found.width
        # Of the experts that E goes by; a block with several sets of them has no E.
        self.experts_path, self.family = found.layers[0].path, found.layers[0].family
        self.num_experts = found.layers[0].num_experts
        self.r: dict[str, int] = {}
        self.plans: dict[str, PerftPlan] = {}
        for name in (*self.adapter_layer_names, "perft_dropout", "perft_experts"):
            setattr(self, name, nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters = []
        # In a list, since the block is this layer's parent and must not become its child.
        self._block = [block]
        self.balance = balance
        self._dispatch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._handles: list[Any] = []

    # PEFT's layers answer these with what they wrap. This one wraps nothing.

    @property
    def weight(self) -> torch.Tensor:
        raise AttributeError("PERFT adapters wrap no layer that has a weight")

    @property
    def bias(self) -> torch.Tensor:
        raise AttributeError("PERFT adapters wrap no layer that has a bias")

    # Adapters

    def update_layer(self, adapter_name: str, config: PerftConfig) -> None:
        """Add an adapter as `config` says."""
        mask = config.selected_experts
        experts = tuple(range(self.num_experts) if mask is None else mask[self.experts_path])
        num_adapters = len(experts) if config.variant == "E" else config.num_adapters
        assert num_adapters is not None
        plan = self.plans[adapter_name] = PerftPlan(
            variant=config.variant,
            form=config.form,
            scaling=config.scaling,
            num_adapters=num_adapters,
            top_k=config.num_adapters_per_tok or num_adapters,
            normalized=config.norm_topk_prob,
            balance_coef=config.balance_loss_coef if config.variant == "R" else 0.0,
            activation=config.activation if config.form == "bottleneck" else None,
            experts=experts if config.variant == "E" else (),
        )
        self.r[adapter_name] = config.r
        self.perft_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        factors = [ExpertFactors(num_adapters, config.r, self.width) for _ in range(2)]
        initialize(factors[0].weight.data, factors[1].weight.data, [config.r], config.init_lora_weights)
        for name, factor in zip(FACTORS[config.form], factors, strict=True):
            getattr(self, name)[adapter_name] = factor
        if plan.variant == "R":
            self.perft_router[adapter_name] = nn.Linear(self.width, num_adapters, bias=False)
        if plan.variant == "E":
            self.perft_experts[adapter_name] = ExpertSlots(self.num_experts, experts)
        self.place_new(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def beside(self) -> nn.Module:
        return self._block[0]

    def slots(self, adapter_name: str, device: torch.device) -> torch.Tensor:
        """Of E: the place of each expert's adapter, -1 if it has none, (num_experts,)."""
        module = self.perft_experts[adapter_name]
        assert isinstance(module, ExpertSlots)
        return module.placed(device)[0]

    def check_saved(self, adapter_name: str, saved: Mapping[str, torch.Tensor]) -> None:
        """Refuse the tensors of an adapter for other experts (E)."""
        slots = saved.get("perft_experts.slots")
        if adapter_name not in self.perft_experts or slots is None:
            return
        expected, found = list(self.plans[adapter_name].experts), experts_in(slots.cpu())
        if found is None or cold_in(slots.cpu()):
            raise no_map(self.path)
        if found != expected or slots.numel() != self.num_experts:
            raise SieveError(
                f"The weights belong to experts {found} of {self.experts_path}, and adapter '{adapter_name}' has "
                f"{expected}. Load them under the configuration that they were saved with."
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in this layer's place: the layer itself, since its tuner takes it out of the block.

        Raises:
            SieveError: with `merge`.
        """
        if merge:
            self.merge()
        return self

    # Computation

    def applied_adapters(self) -> list[str]:
        """The active adapters that this block has; none while they are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.plans]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the active adapters add: (..., width) -> (tokens, width).

        One model (ernie4_5_vl_moe) calls its blocks on a single row of tokens one after the other.
        """
        tokens = hidden_states.reshape(-1, self.width)
        return torch.stack([self._one(name, tokens) for name in self.applied_adapters()]).sum(0)

    def _one(self, adapter_name: str, tokens: torch.Tensor) -> torch.Tensor:
        plan = self.plans[adapter_name]
        first, second = (getattr(self, name)[adapter_name].weight for name in FACTORS[plan.form])
        x = tokens.to(first.dtype)
        gates = self._gates(adapter_name, x)
        activation = None if plan.activation is None else ACT2FN[plan.activation]
        added = mixture(self.perft_dropout[adapter_name](x), first, second, gates, activation)
        return (added * plan.scaling).to(tokens.dtype)

    def _gates(self, adapter_name: str, tokens: torch.Tensor) -> torch.Tensor | None:
        """(tokens, adapters); None where all adapters are always on."""
        plan = self.plans[adapter_name]
        if plan.variant == "R":
            router = self.perft_router[adapter_name]
            assert isinstance(router, nn.Linear)
            logits = router(tokens)
            if plan.balance_coef and self.training:  # also while checkpointed layers run again, which must do the same
                probabilities = wide_softmax(logits)
                chosen = probabilities.topk(plan.top_k, dim=-1).indices
                trainable = router.weight.requires_grad
                said = Routed(plan.balance_coef, probabilities, chosen, trainable, self.path, group=adapter_name)
                self.balance.report(said)
            return routed_gates(logits, plan.top_k, plan.normalized)
        if plan.variant == "E":
            ids, weights = self._read_dispatch(tokens.shape[0])
            slots = self.slots(adapter_name, tokens.device)
            return dispatched_gates(ids.to(slots.device), weights.to(slots.device), slots, plan.num_adapters)
        return None

    def _read_dispatch(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._dispatch is None or self._dispatch[0].shape[0] != num_tokens:
            reported = "none" if self._dispatch is None else str(self._dispatch[0].shape[0])
            raise SieveError(
                f"{self.path} was called on {num_tokens} tokens and its router dispatched {reported}, expected as many "
                "to mix adapters by what it says: use variant R, D or S here"
            )
        return self._dispatch

    # Hooks

    def listen(self, block: nn.Module) -> None:
        """Before a forward of the block: be told what is dispatched, and add to what comes out."""
        self._forget()
        applied = self.applied_adapters()
        if not applied:
            return
        if any(self.plans[name].variant == "E" for name in applied):
            experts = block.get_submodule(self.experts_path.rpartition(".")[2])
            self._handles += self.family.watch(experts, block, self._dispatched)
        # After those of the family, some of which report what was dispatched when the block is done.
        self._handles.append(block.register_forward_hook(_add, with_kwargs=True, always_call=True))

    def _dispatched(self, expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> None:
        width = expert_ids.shape[-1]
        self._dispatch = expert_ids.reshape(-1, width), expert_weights.reshape(-1, width)

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._dispatch = [], None

    def add_to(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output, or its first part, with what the adapters give added."""
        try:
            if output is None:  # the block raised
                return None
            hidden_states = _input(args, kwargs)
            flat = hidden_states.dim() == 1 and hidden_states.numel() % self.width == 0
            if hidden_states.shape[-1] != self.width and not flat:
                raise SieveError(
                    f"{self.path} was called on {hidden_states.shape[-1]} features, expected {self.width}, the width "
                    "that its router reads: this block takes no PERFT adapter, leave it out with exclude_modules"
                )
            added = self(hidden_states)
            if isinstance(output, tuple):
                return (output[0] + added.view(output[0].shape).to(output[0].dtype), *output[1:])
            return output + added.view(output.shape).to(output.dtype)
        finally:
            self._forget()

    def __repr__(self) -> str:
        return "perft." + super().__repr__()


def attach(block: nn.Module, layer: PerftLayer) -> None:
    """Put adapters beside a block."""
    setattr(block, CHILD, layer)
    block.register_forward_pre_hook(_listen)


def detach(block: nn.Module) -> None:
    """Take them away; the block is as before then."""
    delattr(block, CHILD)
    for key, hook in list(block._forward_pre_hooks.items()):
        if hook is _listen:
            del block._forward_pre_hooks[key]


def perft_layers(model: nn.Module) -> list[PerftLayer]:
    """The adapters beside all blocks of `model`."""
    return [module for module in model.modules() if isinstance(module, PerftLayer)]


# Functions of the module, not of the layer: a copy of the model must not run the adapters of the original.


def _listen(block: nn.Module, args: tuple[Any, ...]) -> None:
    getattr(block, CHILD).listen(block)


def _add(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return getattr(block, CHILD).add_to(output, args, kwargs)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among a block's arguments: the first tensor of floats."""
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise AssertionError("a block was called without hidden states")
