"""The factors of an adapter as plain LoRA has them: one rank for all, the scaling in B, zeros where there are none."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial

import torch
from peft.tuners.lora.layer import LoraLayer

from ...moe.topology import MoELayer
from ...tuners.common.experts.factors import OUTER_FACTORS
from ...tuners.common.experts.layer import SieveExpertLayer, group_of
from ..reading import KEY_PREFIX, OpenedAdapter, lora_factors
from ..stack_layout import is_transposed, matrix_in, projections_in
from ..vocabulary import Embeddings

# Key -> shape of the tensor, and how to make it.
Tensors = dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]


class PlainFactors:
    """The plain factors of one MoE layer, zeros where the adapter has none."""

    def __init__(self, layer: MoELayer, adapted: SieveExpertLayer | None, name: str, rank: int, like: torch.Tensor):
        self.layer, self.shape, self.rank, self.like = layer, layer.shape, rank, like
        self.adapted, self.name = adapted, name
        self.experts = adapted.plans[name].adapted if adapted is not None else ()

    def a(self, projection: str, expert: int) -> torch.Tensor:
        """(rank, in)"""
        a, _, _ = self._factors(projection, expert)
        return _with_rank(a.detach().to(self.like), 0, self.rank)

    def b(self, projection: str, expert: int) -> torch.Tensor:
        """(out, rank), the scaling in it"""
        _, b, scaling = self._factors(projection, expert)
        return _with_rank(_scaled(b.detach().T, scaling).to(self.like), 1, self.rank)

    def _factors(self, projection: str, expert: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A (rank, in), B (rank, out) and the scaling; of rank 0 if the adapter has none."""
        found = self.adapted.expert_factors(self.name, projection, expert) if self.adapted is not None else None
        sizes = self.shape.projections[projection]
        return found or (self.like.new_zeros(0, sizes[0]), self.like.new_zeros(0, sizes[1]), 1.0)

    def stacked_a(self, parameter: str) -> torch.Tensor:
        """PEFT's A of a stack, (matrices * ranks, in), a matrix after the other."""
        factor = self._outward(parameter).transpose(1, 2) if self._is_swapped(parameter) else self._inward(parameter)
        return factor.reshape(-1, factor.shape[2])

    def stacked_b(self, parameter: str) -> torch.Tensor:
        """PEFT's B of a stack, (out, ranks * matrices), the matrix fastest."""
        factor = self._inward(parameter).transpose(1, 2) if self._is_swapped(parameter) else self._outward(parameter)
        return factor.permute(1, 2, 0).reshape(factor.shape[1], -1)

    def shared_outer(self, key: str, projection: str) -> Tensors:
        """The factors of all experts as stacks, (experts, ...), of one matrix where all experts share the factor.

        Args:
            key: what goes before the names of the factors.
        """
        experts, (size_in, size_out) = self.shape.num_experts, self.shape.projections[projection]
        of_a, of_b = (1, experts) if f"{group_of(projection)}_A" in OUTER_FACTORS else (experts, 1)
        return {
            f"{key}.lora_A.weight": ((of_a, self.rank, size_in), partial(self._all, self.a, projection, of_a)),
            f"{key}.lora_B.weight": ((of_b, size_out, self.rank), partial(self._all, self.b, projection, of_b)),
        }

    def _all(self, factor: Callable[[str, int], torch.Tensor], projection: str, count: int) -> torch.Tensor:
        """One factor of all experts, or of one of those that have some."""
        return torch.stack([factor(projection, e) for e in (range(count) if count > 1 else self.experts[:1])])

    def _is_swapped(self, parameter: str) -> bool:
        """Whether PEFT takes the matrices of a stack for (out, in), and they are (in, out), or the other way round.

        It then wants the transpose of B A, whose factors are those of B A in the other order, transposed.
        """
        holder = self.layer.experts.get_submodule(parameter.rpartition(".")[0])
        return is_transposed(self.layer, parameter) != bool(getattr(holder, "is_transposed", False))

    def _inward(self, parameter: str) -> torch.Tensor:
        """(matrices, ranks, in): in each matrix, a projection after the other, each with ranks of its own."""
        projections = projections_in(self.layer, parameter)
        matrices, ranks = self._matrices(parameter), len(projections) * self.rank
        stack = self.like.new_zeros(matrices, ranks, self.shape.projections[projections[0]][0])
        for expert in self.experts:
            stack[expert] = torch.cat([self.a(projection, expert) for projection in projections])
        return stack

    def _outward(self, parameter: str) -> torch.Tensor:
        """(matrices, out, ranks): the rows of a projection where the model has them, in the ranks of the projection."""
        projections = projections_in(self.layer, parameter)
        width, ranks = sum(self.shape.projections[p][1] for p in projections), len(projections) * self.rank
        stack = self.like.new_zeros(self._matrices(parameter), width, ranks)
        # As the model's own stack lies, so that its family finds the rows of a projection.
        as_model = stack.transpose(1, 2) if is_transposed(self.layer, parameter) else stack
        for i, projection in enumerate(projections):
            for expert in self.experts:
                rows = matrix_in(self.layer, as_model, projection, expert)
                rows[:, i * self.rank : (i + 1) * self.rank] = self.b(projection, expert)
        return stack

    def _matrices(self, parameter: str) -> int:
        # longcat_flash has some more than experts with weights.
        return self.layer.experts.get_parameter(parameter).shape[0]


def plain_factors(opened: OpenedAdapter, layers: list[MoELayer], rank: int) -> dict[str, PlainFactors]:
    """The plain factors of the MoE layers, by their paths."""
    adapted = opened.expert_layers()
    # Cold layers have no factors of their own to take type and device from.
    some = next(p for layer in adapted.values() for key, p in layer.named_parameters() if f".{opened.name}." in key)
    like = torch.empty(0, dtype=some.dtype, device="cpu")
    return {layer.path: PlainFactors(layer, adapted.get(layer.path), opened.name, rank, like) for layer in layers}


def linear_factors(key: str, layer: LoraLayer, name: str, rank: int) -> Tensors:
    """The plain factors of one of PEFT's own layers.

    Args:
        key: what goes before the names of the factors.
        name: of the adapter.
    """
    scaling = layer.scaling[name]
    a, b = lora_factors(layer, name)
    start, end = (f"{key}.lora_embedding_", "") if name in layer.lora_embedding_A else (f"{key}.lora_", ".weight")
    return {
        f"{start}A{end}": ((rank, *a.shape[1:]), lambda: _with_rank(a.cpu(), 0, rank)),
        f"{start}B{end}": (
            (b.shape[0], rank, *b.shape[2:]),
            lambda: _with_rank(_scaled(b.cpu(), scaling), 1, rank),
        ),
    }


def embedding_tensors(embeddings: Embeddings, adapted: Container[str]) -> Tensors:
    """The embeddings that an adapter brings along, under the keys that PEFT loads them from.

    Args:
        adapted: paths of the modules that have factors, too.
    """
    # Tied ones share memory, which safetensors refuses.
    return {
        f"{KEY_PREFIX}{path}{'.base_layer' if path in adapted else ''}.weight": (
            tuple(weight.shape),
            lambda weight=weight: weight.cpu().clone(),  # type: ignore[misc]
        )
        for path, weight in embeddings.items()
    }


def _scaled(b: torch.Tensor, scaling: float) -> torch.Tensor:
    wide = torch.promote_types(b.dtype, torch.float32)
    return (b.to(wide) * scaling).to(b.dtype)


def _with_rank(factor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """A factor with zeros up to a higher rank, which is its size in `dim`."""
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)
