"""What a layer of fused experts computes with, in the form that the grouped products take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .activation import Function, Replayer


@dataclass(frozen=True)
class ExpertStacks:
    """The frozen weights of a layer's experts, and what lies between their products.

    Attributes:
        first: stacks of shape (num_experts, in, out) that read the layer's input; their outputs lie side by side.
        down: (num_experts, in, out).
        columns: projection -> where its output lies in that of its product.
        activation: between the products: (rows, width of the first) -> (rows, down's input width).
        replay_activation: the activation again, with the map from its gradient to that of its input.
        first_bias, down_bias: (num_experts, out), None for none.
        post_norm: after the second product, None for none.
        one_by_one: the model's own forward goes through one expert after the other. Following it makes an adapter that
            adds zero change nothing, to the bit.
        passes_others: ids from num_experts on return their input; otherwise they are dropped.
    """

    first: Sequence[Tensor]
    down: Tensor
    columns: Mapping[str, slice]
    activation: Function
    replay_activation: Replayer
    first_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Function | None = None
    one_by_one: bool = False
    passes_others: bool = False
