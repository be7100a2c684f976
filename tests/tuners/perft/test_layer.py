"""What adapters add to a MoE block, against a token and an adapter at a time: outputs, and every gradient."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peft_sieve import SieveError
from peft_sieve.tuners.perft.mixture import dispatched_gates
from tests.models import tiny_model
from tests.reference import assert_same
from tests.tuners.perft.adapted import MASK, adapted, first_layer

R_SETTINGS: list[dict[str, Any]] = [
    {"num_adapters_per_tok": 1},
    {"num_adapters_per_tok": 2},
    {"num_adapters_per_tok": 3, "norm_topk_prob": True},
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("R", settings) for settings in R_SETTINGS),
    ("E", {}),
    ("E", {"selected_experts": MASK}),
    ("D", {}),
    ("S", {}),
]


def base_model() -> nn.Module:
    model = tiny_model("olmoe", dtype=torch.float64)
    model.set_experts_implementation("eager")  # the others have no float64
    return model


def naive_adapters(
    layer: nn.Module, variant: str, form: str, settings: dict[str, Any], block: nn.Module, tokens: torch.Tensor
) -> torch.Tensor:
    """What the adapters add to each token: (tokens, width) -> (tokens, width)."""
    names = ("perft_A", "perft_B") if form == "lora" else ("perft_down", "perft_up")
    first, second = (getattr(layer, name)["default"].weight for name in names)
    rows = []
    for x in tokens:
        if variant == "R":
            scores = [x @ weight for weight in layer.perft_router["default"].weight]
            exponentials = [score.exp() for score in scores]
            gates = {i: e / sum(exponentials) for i, e in enumerate(exponentials)}
            kept = sorted(gates, key=lambda i: -gates[i].item())[: settings["num_adapters_per_tok"]]
            total = sum(gates[i] for i in kept) if settings.get("norm_topk_prob") else 1.0
            pairs = [(i, gates[i] / total) for i in kept]
        elif variant == "E":
            _, weights, ids = block.gate(x.unsqueeze(0))
            experts = settings.get("selected_experts", {}).get("model.layers.0.mlp.experts", range(8))
            places = {expert: i for i, expert in enumerate(experts)}
            routed = zip(ids[0].tolist(), weights[0], strict=True)
            pairs = [(places[expert], weight) for expert, weight in routed if expert in places]
        else:
            pairs = [(i, 1.0) for i in range(len(first))]
        row = torch.zeros_like(x)
        for i, gate in pairs:
            inner = first[i] @ x
            if form == "bottleneck":
                inner = inner / (1 + (-inner).exp())
            scale = 7 / 3 if form == "lora" else 1.0
            row = row + gate * scale * (second[i].T @ inner)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["lora", "bottleneck"])
@pytest.mark.parametrize(("variant", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_equals_a_token_and_an_adapter_at_a_time(variant: str, settings: dict[str, Any], form: str) -> None:
    model = adapted(variant, base_model(), form=form, **settings).to(torch.float64)
    block = model.get_base_model().model.layers[0].mlp
    layer = first_layer(model)
    plain = copy.deepcopy(base_model()).model.layers[0].mlp
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 9, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 9, 32, generator=generator, dtype=torch.float64)

    def gradients(out: torch.Tensor) -> dict[str, torch.Tensor]:
        (out * target).sum().backward()
        tensors = {"input": x, **{name: p for name, p in layer.named_parameters() if p.grad is not None}}
        found = {name: tensor.grad for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.grad = None
        return found

    fast = block(x)
    fast_gradients = gradients(fast)
    slow = plain(x) + naive_adapters(layer, variant, form, settings, plain, x.flatten(0, 1)).view_as(x)
    slow_gradients = gradients(slow)
    assert fast_gradients.keys() == slow_gradients.keys()
    assert len(fast_gradients) == (4 if variant == "R" else 3)
    # The router of the base model computes its softmax in float32.
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if variant == "E" else {}
    assert_same(fast, slow, "output", **tolerance)
    for name, gradient in fast_gradients.items():
        assert_same(gradient, slow_gradients[name], name, **tolerance)


def test_only_the_adapters_of_a_token_learn_from_it() -> None:
    model = adapted("R", num_adapters_per_tok=1)
    block, layer = model.get_base_model().model.layers[0].mlp, first_layer(model)
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    block(x).sum().backward()
    chosen = int(layer.perft_router["default"](x.flatten()).argmax())
    learns = [bool(gradient.any()) for gradient in layer.perft_A["default"].weight.grad]
    assert learns == [i == chosen for i in range(5)]


def test_dispatches_to_no_expert_and_to_experts_without_adapter_give_no_gate() -> None:
    slots = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
    ids = torch.tensor([[1, 3], [0, 3], [4, 4], [1, 1]])  # 4 is no expert
    weights = torch.tensor([[0.5, 0.25], [0.5, 0.125], [1.0, 1.0], [0.25, 0.5]])
    expected = torch.tensor([[0.5, 0.25], [0.0, 0.125], [0.0, 0.0], [0.75, 0.0]])
    assert torch.equal(dispatched_gates(ids, weights, slots, 2), expected)


def test_dropout_leaves_the_router_alone_and_keeps_the_expectation() -> None:
    model = adapted("R", lora_dropout=0.5, num_adapters_per_tok=5).train()
    layer = first_layer(model)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    noisy = layer(x.repeat(4000, 1))
    exact = layer.eval()(x)
    assert not torch.equal(noisy[0], noisy[1])
    spread = noisy.std(0) / math.sqrt(len(noisy))
    assert ((noisy.mean(0) - exact[0]).abs() < 5 * spread).all()


def test_a_dispatch_of_other_tokens_is_refused() -> None:
    model = adapted("E")
    layer = first_layer(model)
    with pytest.raises(SieveError, match=r"layers.0.mlp.* 3 tokens.*dispatched none"):
        layer(torch.randn(3, 32))


def test_hooks_are_gone_after_a_forward_also_after_one_that_fails() -> None:
    model = adapted("E")
    block = model.get_base_model().model.layers[0].mlp
    block(torch.randn(1, 3, 32))
    assert not block._forward_hooks and not block.experts._forward_pre_hooks
    with pytest.raises(RuntimeError):
        block(torch.randn(1, 3, 31))
    assert not block._forward_hooks and not block.experts._forward_pre_hooks
    assert first_layer(model)._dispatch is None


def test_experts_without_an_adapter_cost_no_arithmetic() -> None:
    found = {}
    for number in (8, 2):
        model = adapted("E", selected_experts={path: list(range(number)) for path in MASK})
        layer = first_layer(model)
        assert sum(p.numel() for p in layer.parameters()) == 2 * number * 3 * 32
        layer._dispatched(torch.arange(18).view(6, 3) % 8, torch.rand(6, 3))
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(6, 32)).sum().backward()
        found[number] = counter.get_total_flops()
    # Two products forward; both factors' gradients and the one between them backward: 5 in all.
    assert found == {number: 5 * 2 * 6 * 32 * number * 3 for number in (8, 2)}
