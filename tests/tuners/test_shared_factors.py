"""Factors that experts share, against an expert-at-a-time reference: outputs, and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peft_sieve import SieveLoraConfig
from peft_sieve.tuners.common.experts import fused
from tests.reference import assert_same
from tests.tuners.test_expert_layer import (  # noqa: F401 (the fixtures)
    LAYOUTS,
    NUM_EXPERTS,
    TOKENS,
    TOP_K,
    assert_gradients_predict,
    backend,
    both,
    dispatch,
    gradients,
    make_layer,
    randomize,
    threads,
)

BOTH = {"share_outer": True, "cold_experts": "shared"}
OPTIONS = pytest.mark.parametrize("options", [{"share_outer": True}, {"cold_experts": "shared"}, BOTH], ids=str)


@OPTIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_equals_the_reference_in_float64(
    layout: str, implementation: str, post_norm: bool, options: dict[str, Any]
) -> None:
    layer = make_layer(layout, **options)
    experts = layer.get_base_layer()
    experts.config._experts_implementation = implementation
    if post_norm:  # after which B can no longer wait for the sum over the experts
        experts.has_post_expert_norm = True
        experts.post_expert_norm = nn.RMSNorm(32, dtype=torch.float64).requires_grad_(False)
    compared = [assert_same(fast, slow, what) for what, fast, slow in both(layer)]
    assert len(compared) == 7  # output, two inputs, four factors


@OPTIONS
@pytest.mark.parametrize("layout", ["olmoe", "gpt_oss"])
def test_equals_the_reference_in_float32(layout: str, options: dict[str, Any], backend: str) -> None:  # noqa: F811
    for what, fast, slow in both(make_layer(layout, dtype=torch.float32, **options), torch.float32):
        assert_same(fast, slow, what, rtol=2e-4, atol=2e-5)


@OPTIONS
def test_half_precision_within_rounding(options: dict[str, Any], backend: str) -> None:  # noqa: F811
    """The error against float64 is that of an expert-at-a-time forward in the same type, not more."""
    dtype = torch.bfloat16
    layer, exact = (make_layer("olmoe", dtype=dtype, **options) for _ in range(2))
    reference = {what: slow for what, _, slow in both(exact.double())}
    for what, fast, slow in both(layer, dtype):
        scale = reference[what].norm()
        fast_error = (fast.double() - reference[what]).norm() / scale
        slow_error = (slow.double() - reference[what]).norm() / scale
        assert fast_error <= 1.5 * slow_error + 1e-3, f"{what}: {fast_error:.2e} against {slow_error:.2e}"


@pytest.mark.parametrize("ids", [[], [0], list(range(NUM_EXPERTS)), [3, 7], list(range(NUM_EXPERTS - 1))])
def test_any_set_of_experts(ids: list[int], backend: str) -> None:  # noqa: F811
    """None of its own, one, all (so that no cold one is left), two, and all but one."""
    layer = make_layer("olmoe", ids, dtype=torch.float32, **BOTH)
    slots = len(ids) + (len(ids) < NUM_EXPERTS)
    assert [len(layer.get_parameter(f"lora_{n}.default.weight")) for n in ("gate_up_A", "gate_up_B")] == [1, slots]
    assert [len(layer.get_parameter(f"lora_{n}.default.weight")) for n in ("down_A", "down_B")] == [slots, 1]
    for what, fast, slow in both(layer, torch.float32):
        assert_same(fast, slow, what, rtol=2e-4, atol=2e-5)


@OPTIONS
@pytest.mark.parametrize("projections", [["gate_proj"], ["up_proj"], ["down_proj"], ["gate_proj", "down_proj"]])
@pytest.mark.parametrize("layout", ["olmoe", "gpt_oss"])
def test_some_projections(layout: str, projections: list[str], options: dict[str, Any]) -> None:
    layer = make_layer(layout, expert_projections=projections, **options)
    assert set(layer.plans["default"].ranks) == set(projections)
    for what, fast, slow in both(layer):
        assert_same(fast, slow, what)


@OPTIONS
@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"experts.up_proj": 6}, "alpha_pattern": {"experts.down_proj": 10}},
        {"r": 16, "lora_alpha": 8, "use_rslora": True},
        {"r": 1},
    ],
    ids=str,
)
def test_ranks_and_scalings(settings: dict[str, Any], options: dict[str, Any]) -> None:
    for what, fast, slow in both(make_layer("olmoe", **settings, **options)):
        assert_same(fast, slow, what)


@pytest.mark.parametrize("second", [{}, {"share_outer": True}, {"cold_experts": "shared"}, BOTH], ids=str)
def test_two_active_adapters_of_other_settings_add_up(second: dict[str, Any]) -> None:
    layer = make_layer("olmoe", **BOTH)
    layer.update_layer("second", [0, 2], SieveLoraConfig(r=8, lora_dropout=0.0, **second))
    randomize(layer)
    layer.set_adapter(["default", "second"])
    compared = [assert_same(fast, slow, what) for what, fast, slow in both(layer)]
    assert len(compared) == 11


@OPTIONS
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_an_adapter_that_adds_zero_changes_nothing(options: dict[str, Any], implementation: str) -> None:
    """To the bit, although the experts may be gone through in another order."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = make_layer("olmoe", dtype=dtype, **options)
        layer.get_base_layer().config._experts_implementation = implementation
        for name in ("gate_up", "down"):
            nn.init.zeros_(layer.get_parameter(f"lora_{name}_B.default.weight"))
        inputs = dispatch(dtype)
        with torch.no_grad():
            assert torch.equal(layer(*inputs), layer.get_base_layer()(*inputs))


@OPTIONS
def test_the_backward_drops_what_the_forward_dropped(options: dict[str, Any], backend: str) -> None:  # noqa: F811
    if backend == "device" and options != BOTH:
        pytest.skip("the interpreter is slow")
    assert_gradients_predict("olmoe", backend, lora_dropout=0.4, **options)


def test_the_input_of_a_shared_a_is_dropped_once_for_all_experts_of_a_token() -> None:
    """Two experts with the same weights and factors give a token the same."""
    layer = make_layer("olmoe", [0, 1], lora_dropout=0.5, expert_projections=["up_proj"], share_outer=True).train()
    experts, inner = layer.get_base_layer(), layer.get_parameter("lora_gate_up_B.default.weight").data
    for stack in (experts.gate_up_proj.data, experts.down_proj.data, inner):
        stack[1] = stack[0]
    hidden = torch.randn(TOKENS, 32, dtype=torch.float64)
    weights = torch.ones(TOKENS, 1, dtype=torch.float64)
    found = []
    for expert in (0, 1):
        torch.manual_seed(0)
        found.append(layer(hidden, torch.full((TOKENS, 1), expert), weights))
    both_experts = torch.tensor([0, 1]).expand(TOKENS, 2)
    torch.manual_seed(0)
    together = layer(hidden, both_experts, weights.expand(-1, 2))
    assert torch.equal(*found)
    assert torch.allclose(together, 2 * found[0])
    layer.eval()
    assert not torch.allclose(together, layer(hidden, both_experts, weights.expand(-1, 2)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, backend: str) -> None:  # noqa: F811
    layer = make_layer("olmoe", dtype=torch.float32, lora_dropout=0.2, **BOTH).train()
    hidden, ids, weights = dispatch(torch.float32)
    results = []
    for run in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=reentrant)):
        torch.manual_seed(7)
        out = run(hidden, ids, weights)
        out.square().sum().backward()
        results.append({"output": out.detach(), **gradients(layer, hidden, weights)})
    assert len(results[0]) == 7
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@OPTIONS
def test_autocast_trains_float32_factors(options: dict[str, Any]) -> None:
    layer = make_layer("olmoe", dtype=torch.bfloat16, **options)
    for name, parameter in list(layer.named_parameters()):
        if "lora_" in name:
            parameter.data = parameter.data.float()
    hidden, ids, weights = dispatch(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(hidden, ids, weights)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    exact = {w: slow for w, _, slow in both(make_layer("olmoe", dtype=torch.bfloat16, **options).double())}
    assert (out.double() - exact["output"]).norm() / exact["output"].norm() < 0.02
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("options", [{"cold_experts": "shared"}, BOTH], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("post_norm", [False, True])
def test_the_bits_of_a_backward_in_several_threads_are_those_of_one(
    dropout: float,
    post_norm: bool,
    options: dict[str, Any],
    threads: Callable[[int], None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "CHUNK_ROWS", 8)  # a chunk for each expert
    runs = []
    for number in (1, 3, 3):
        threads(number)
        layer = make_layer("olmoe", dtype=torch.float32, lora_dropout=dropout, **options).train()
        if post_norm:
            experts = layer.get_base_layer()
            experts.has_post_expert_norm = True
            experts.post_expert_norm = nn.RMSNorm(32).requires_grad_(False)
        hidden, ids, weights = dispatch(torch.float32)
        torch.manual_seed(1)
        layer(hidden, ids, weights).square().sum().backward()
        runs.append(gradients(layer, hidden, weights))
    for name, gradient in runs[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, runs[1][name]) and torch.equal(gradient, runs[2][name]), name


def test_frozen_factors_and_inputs_get_no_gradient() -> None:
    reference = {what: fast for what, fast, _ in both(make_layer("olmoe", **BOTH))}
    for frozen in ("lora_gate_up_A", "lora_gate_up_B", "lora_down_A", "lora_down_B"):
        layer = make_layer("olmoe", **BOTH)
        layer.get_parameter(f"{frozen}.default.weight").requires_grad_(False)
        hidden, ids, weights = dispatch()
        target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        (layer(hidden.detach(), ids, weights.detach()) * target).sum().backward()
        found = gradients(layer, hidden, weights)
        assert len(found) == 3
        for name, gradient in found.items():
            assert_same(gradient, reference[name], name)


def test_no_tokens_at_all(backend: str) -> None:  # noqa: F811
    layer = make_layer("olmoe", dtype=torch.float32, **BOTH)
    out = layer(*(tensor[:0] for tensor in dispatch(torch.float32)))
    assert out.shape == (0, 32)
    out.sum().backward()


class _Products(TorchDispatchMode):
    """Records how many rows are multiplied with what is as wide as the hidden size."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.rows = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            sizes = {*args[-2].shape, *args[-1].shape}
            if {32, self.rank} <= sizes:
                self.rows += max(sizes - {32, self.rank}, default=0)
        return func(*args, **(kwargs or {}))


def test_a_product_with_a_shared_factor_is_made_once_for_a_token() -> None:
    """Not once for each of its experts; so is everything that the backward makes of it."""
    found = {}
    for share in (False, True):
        layer = make_layer("olmoe", list(range(NUM_EXPERTS)), dtype=torch.float32, r=5, share_outer=share)
        layer.get_base_layer().config._experts_implementation = "grouped_mm"
        with _Products(rank=5) as down, _Products(rank=10) as gate_up:
            layer(*dispatch(torch.float32)).sum().backward()
        found[share] = gate_up.rows, down.rows
    # Forward, and the gradients of the input and of the factor; gate and up go together.
    assert found[True] == (3 * TOKENS, 3 * TOKENS)
    assert sum(found[False]) > 5 * TOKENS * TOP_K
