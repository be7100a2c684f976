"""The factors of an adapter as plain LoRA has them: one rank for all, the scaling in B, zeros where there are none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..moe.topology import MoELayer
from ..tuners.sieve.layer import SieveExpertLayer
from .opened import OpenedAdapter
from .stacks import matrix_in

# Key -> shape of the tensor, and how to make it.
Tensors = dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]


class ExpertFactors:
    """The plain factors of one MoE layer, zeros where the adapter has none."""

    def __init__(self, layer: MoELayer, adapted: SieveExpertLayer | None, name: str, rank: int, like: torch.Tensor):
        self.layer, self.shape, self.rank, self.like = layer, layer.shape, rank, like
        self.experts = adapted.plans[name].experts if adapted is not None else ()
        factors = {p: adapted.factors(name, p) if adapted is not None else None for p in layer.shape.projections}
        self.factors = {p: found for p, found in factors.items() if found is not None}

    def a(self, projection: str, expert: int) -> torch.Tensor:
        """(rank, in)"""
        result = self.like.new_zeros(self.rank, self.shape.projections[projection][0])
        if projection in self.factors and expert in self.experts:
            a, _, _ = self.factors[projection]
            result[: a.shape[1]] = a[self.experts.index(expert)].detach()
        return result

    def b(self, projection: str, expert: int) -> torch.Tensor:
        """(out, rank), the scaling in it"""
        result = self.like.new_zeros(self.shape.projections[projection][1], self.rank)
        if projection in self.factors and expert in self.experts:
            _, b, scaling = self.factors[projection]
            result[:, : b.shape[1]] = _scaled(b[self.experts.index(expert)].detach().T, scaling)
        return result

    def stacked_a(self, projections: list[str]) -> torch.Tensor:
        """(num_experts * ranks, in), an expert after the other, in it a projection after the other."""
        rows = [self.a(p, expert) for expert in range(self.shape.num_experts) for p in projections]
        return torch.cat(rows)

    def stacked_b(self, projections: list[str]) -> torch.Tensor:
        """(out, ranks * num_experts), the expert fastest; each projection has ranks of its own."""
        width = sum(self.shape.projections[p][1] for p in projections)
        ranks = len(projections) * self.rank
        stack = self.like.new_zeros(self.shape.num_experts, width, ranks)
        # As the model's own stack lies, so that its family finds the rows of a projection.
        as_model = stack.transpose(1, 2) if self.layer.experts.is_transposed else stack
        for i, projection in enumerate(projections):
            for expert in self.experts:
                rows = matrix_in(self.layer, as_model, projection, expert)
                rows[:, i * self.rank : (i + 1) * self.rank] = self.b(projection, expert)
        return stack.permute(1, 2, 0).reshape(width, ranks * self.shape.num_experts)


def expert_factors(opened: OpenedAdapter, layers: list[MoELayer], rank: int) -> dict[str, ExpertFactors]:
    adapted = opened.expert_layers()
    # Cold layers have no factors of their own to take type and device from.
    some = next(parameter for layer in adapted.values() for parameter in _factors_of(layer, opened.name))
    like = torch.empty(0, dtype=some.dtype, device="cpu")
    return {layer.path: ExpertFactors(layer, adapted.get(layer.path), opened.name, rank, like) for layer in layers}


def _factors_of(layer: SieveExpertLayer, name: str) -> list[nn.Parameter]:
    return [p for key, p in layer.named_parameters() if "lora_" in key and f".{name}." in key]


def linear_factors(layer: LoraLayer, name: str, rank: int) -> Tensors:
    """What follows the module's name in a key -> its tensor, for one of PEFT's own layers."""
    scaling = layer.scaling[name]
    if name in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        names = "lora_embedding_A", "lora_embedding_B"
    else:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        names = "lora_A.weight", "lora_B.weight"
    return {
        names[0]: ((rank, *a.shape[1:]), lambda: _padded(a.detach().cpu(), 0, rank)),
        names[1]: (
            (b.shape[0], rank, *b.shape[2:]),
            lambda: _padded(_scaled(b.detach().cpu(), scaling), 1, rank),
        ),
    }


def _scaled(b: torch.Tensor, scaling: float) -> torch.Tensor:
    wide = torch.promote_types(b.dtype, torch.float32)
    return (b.to(wide) * scaling).to(b.dtype)


def _padded(factor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)
