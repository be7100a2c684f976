"""`LoraMoeLayer`: a linear layer with LoRA experts and a router around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...errors import SieveError
from ..common.adapter_layer import AdapterLayer
from ..common.balance import BalanceLoss, Routed
from ..common.bookkeeping import Bookkeeping
from ..common.optimizers import forget
from .config import LoraMoeConfig
from .cutting import Cut, replace_data


@dataclass(frozen=True)
class LoraMoePlan:
    """What one adapter has in a layer.

    Attributes:
        num_experts: before pruning.
        experts: ids of those that are there, ascending.
        top_k: of the configuration.
        r: rank of an expert.
        scaling: factor of the experts' output.
        balance_loss_coef: factor of the balance loss before pruning.
        pruned: whether pruning is over, whatever it left.
    """

    num_experts: int
    experts: tuple[int, ...]
    top_k: int
    r: int
    scaling: float
    balance_loss_coef: float
    pruned: bool


class ExpertUsage(Bookkeeping):
    """What is saved beside the factors: whose they are, and how much each expert was used.

    Attributes:
        tokens: (num_experts before pruning,) int64, the tokens routed to each expert in training, until pruning.
        experts: (experts,) int64, the ids of those that are there.
        pruned: (1,) int64, 1 after pruning.
    """

    tokens: torch.Tensor
    experts: torch.Tensor
    pruned: torch.Tensor

    def __init__(self, plan: LoraMoePlan) -> None:
        super().__init__()
        self.plan = plan
        self.register_buffer("tokens", torch.zeros(plan.num_experts, dtype=torch.int64))
        for name, value in self.integers().items():
            self.register_buffer(name, value)

    def integers(self) -> dict[str, torch.Tensor]:
        experts, pruned = list(self.plan.experts), [int(self.plan.pruned)]
        return {
            "experts": torch.tensor(experts, dtype=torch.int64, device="cpu"),
            "pruned": torch.tensor(pruned, dtype=torch.int64, device="cpu"),
        }


class LoraMoeLayer(nn.Module, AdapterLayer):
    """A linear layer plus, for each adapter, a mixture of LoRA experts.

    The experts' factors are packed: `lora_A` (experts * r, in) and `lora_B` (out, experts * r), expert by expert; the
    router `lora_router` is (experts, in). One product with each does for all experts, with the gates, zero where a
    token does not go, between them.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_router")
    second_factor_names = ("lora_B",)
    other_param_names = ("plans", "lora_dropout", "lora_usage")

    def __init__(self, base_layer: nn.Module, path: str, balance: BalanceLoss) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path, self.balance = path, balance
        self.plans: dict[str, LoraMoePlan] = {}
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_router = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.lora_usage = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        base: Any = self.get_base_layer()
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features

    def update_layer(self, adapter_name: str, config: LoraMoeConfig, experts: Sequence[int] | None) -> None:
        """Add an adapter.

        Args:
            experts: ids of the experts that it kept; None before pruning.
        """
        ids = tuple(range(config.num_experts) if experts is None else experts)
        plan = self.plans[adapter_name] = LoraMoePlan(
            num_experts=config.num_experts,
            experts=ids,
            top_k=config.top_k,
            r=config.r,
            scaling=config.lora_alpha / config.r,
            balance_loss_coef=config.balance_loss_coef,
            pruned=config.kept_experts is not None,
        )
        width = len(ids) * plan.r
        factor_a, factor_b = nn.Linear(self.in_features, width, bias=False), nn.Linear(width, self.out_features, False)
        if config.init_lora_weights:
            nn.init.kaiming_uniform_(factor_a.weight, a=math.sqrt(5))
            nn.init.zeros_(factor_b.weight)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = factor_a, factor_b
        self.lora_router[adapter_name] = nn.Linear(self.in_features, len(ids), bias=False)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_usage[adapter_name] = ExpertUsage(plan)
        self.place_new(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # Forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.plans:
                result = result + self._delta(name, x).to(result.dtype)
        return result

    def _delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        plan, router = self.plans[name], self._factor("lora_router", name)
        experts, top_k = len(plan.experts), min(plan.top_k, len(plan.experts))
        x = self._cast_input_dtype(x, router.weight.dtype)
        logits = router(x)
        # (..., experts), in float32 or wider
        probabilities = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        top, expert_ids = probabilities.topk(top_k, -1)
        gates = torch.zeros_like(probabilities).scatter(-1, expert_ids, top / top.sum(-1, keepdim=True))
        if self.training and not plan.pruned and router.weight.requires_grad:
            said = Routed(
                plan.balance_loss_coef,
                probabilities.flatten(0, -2),
                expert_ids.flatten(0, -2),
                trainable=True,
                per_selection=True,
                usage=self.usage(name).tokens,
            )
            self.balance.report(said)
        hidden = self.lora_A[name](self.lora_dropout[name](x)).unflatten(-1, (experts, plan.r))
        hidden = hidden * (gates * plan.scaling).to(hidden.dtype).unsqueeze(-1)
        return self.lora_B[name](hidden.flatten(-2))

    # Pruning and loading

    def usage(self, adapter_name: str) -> ExpertUsage:
        """What an adapter's experts were used for."""
        module = self.lora_usage[adapter_name]
        assert isinstance(module, ExpertUsage)
        return module

    def check_saved(self, adapter_name: str, saved: Mapping[str, torch.Tensor]) -> None:
        """Refuse the tensors of other experts than those that the adapter has here."""
        plan, values = self.plans[adapter_name], [saved.get(f"lora_usage.{name}") for name in ("experts", "pruned")]
        if any(value is None for value in values):
            return  # which is said where all tensors are compared
        experts, pruned = (value.tolist() for value in values)  # type: ignore[union-attr]
        if (tuple(experts), bool(pruned[0])) != (plan.experts, plan.pruned):
            raise SieveError(
                f"The weights belong to {'pruned' if pruned[0] else 'unpruned'} experts {experts}, and adapter "
                f"'{adapter_name}' has {'pruned' if plan.pruned else 'unpruned'} experts {list(plan.experts)} in "
                f"{self.path}. Load them under the configuration that they were saved with."
            )

    def is_trained(self, adapter_name: str) -> bool:
        """Whether an adapter is in use here, and learning."""
        active = adapter_name in self.plans and adapter_name in self.active_adapters
        return active and self._factor("lora_router", adapter_name).weight.requires_grad

    def cuts(self, adapter_name: str, experts: Sequence[int], path: str) -> list[Cut]:
        """What is left of the parameters when only `experts`, which are there, are kept."""
        plan = self.plans[adapter_name]
        slots = torch.tensor([plan.experts.index(expert) for expert in experts])
        ranks = (slots.unsqueeze(-1) * plan.r + torch.arange(plan.r)).flatten()
        return [
            Cut(f"{path}.{name}", self._parameter(name, adapter_name), dim, index)
            for name, dim, index in (("lora_A", 0, ranks), ("lora_B", 1, ranks), ("lora_router", 0, slots))
        ]

    def declare(self, adapter_name: str, experts: Sequence[int], pruned: bool) -> None:
        """Note which experts the parameters, cut or reshaped to them, belong to."""
        plan = self.plans[adapter_name] = replace(self.plans[adapter_name], experts=tuple(experts), pruned=pruned)
        width = len(plan.experts) * plan.r
        self._factor("lora_A", adapter_name).out_features = width
        self._factor("lora_B", adapter_name).in_features = width
        self._factor("lora_router", adapter_name).out_features = len(plan.experts)
        usage = self.usage(adapter_name)
        usage.plan = plan
        usage.restore()

    def reshape(self, adapter_name: str, experts: Sequence[int], pruned: bool) -> bool:
        """Make room for other experts' values, which are to be loaded.

        Returns:
            Whether an optimizer had states of the experts before, which it now has not.
        """
        forgotten = False
        r, others = self.plans[adapter_name].r, tuple(experts) != self.plans[adapter_name].experts
        sizes = {
            "lora_A": (len(experts) * r, self.in_features),
            "lora_B": (self.out_features, len(experts) * r),
            "lora_router": (len(experts), self.in_features),
        }
        for name, size in sizes.items():
            weight = self._parameter(name, adapter_name)
            replace_data(weight, torch.zeros(size, dtype=weight.dtype, device=weight.device))
            forgotten |= others and forget(weight)
        self.declare(adapter_name, experts, pruned)
        return forgotten

    def _factor(self, name: str, adapter_name: str) -> nn.Linear:
        linear = getattr(self, name)[adapter_name]
        assert isinstance(linear, nn.Linear)
        return linear

    def _parameter(self, name: str, adapter_name: str) -> nn.Parameter:
        return self._factor(name, adapter_name).get_parameter("weight")

    def __repr__(self) -> str:
        return "lora_moe." + super().__repr__()


def lora_moe_layers(model: nn.Module) -> list[tuple[str, LoraMoeLayer]]:
    """(path, layer) of all layers of `model` with LoRA experts."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoraMoeLayer)]
