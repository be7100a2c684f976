"""The adapted expert layer against an expert-at-a-time reference: outputs, and every gradient."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peft_sieve import SieveError, SieveLoraConfig
from peft_sieve.kernels.backend import BACKEND_VARIABLE
from peft_sieve.moe.families.registry import family_of
from peft_sieve.moe.topology import MoELayer
from peft_sieve.tuners.common.experts import fused
from peft_sieve.tuners.common.experts.fused import FusedSieveExperts
from tests.deepseek_like import DeepseekLikeConfig, DeepseekLikeMoE
from tests.models import tiny_model
from tests.reference import NaiveAdapter, assert_same, naive_experts

# Concatenated; interleaved, transposed and with biases; transposed, concatenated and with biases; without a gate.
LAYOUTS = ["olmoe", "gpt_oss", "openai_privacy_filter", "nemotron_h"]
NUM_EXPERTS, TOP_K, TOKENS = 8, 3, 40


@pytest.fixture(params=["loop", "device"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation in turn. Without a GPU, Triton's interpreter runs the kernels."""
    if request.param == "device":
        pytest.importorskip("triton")
    monkeypatch.setenv(BACKEND_VARIABLE, request.param)
    return str(request.param)


def make_experts(layout: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    if layout == "openai_privacy_filter":
        module = importlib.import_module("transformers.models.openai_privacy_filter.modeling_openai_privacy_filter")
        config = module.OpenAIPrivacyFilterConfig(
            hidden_size=32, intermediate_size=24, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K
        )
        experts = module.OpenAIPrivacyFilterExperts(config)
        config._experts_implementation = "grouped_mm"
    else:
        model = tiny_model(layout)
        experts = next(m for m in model.modules() if family_of(m) is not None)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(False)
    return experts.to(dtype)


def make_layer(
    layout: str, ids: list[int] | None = None, dtype: torch.dtype = torch.float64, **options: Any
) -> FusedSieveExperts:
    """An adapted layer with random factors."""
    experts = make_experts(layout, dtype)
    family = family_of(experts)
    assert family is not None
    layer = FusedSieveExperts(experts, MoELayer("layer.experts", experts, family, family.shape(experts), (), ()))
    config = SieveLoraConfig(**{"r": 4, "lora_dropout": 0.0, **options})
    layer.update_layer("default", [1, 2, 6] if ids is None else ids, config)
    randomize(layer)
    return layer


def randomize(layer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.data.copy_(noise.to(parameter.dtype))


def dispatch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids and weights; no token goes to expert 6, which is adapted, nor to expert 7, which is not."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(TOKENS, 32, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.stack([torch.randperm(6, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), ids, weights.requires_grad_()


def naive_adapter(layer: FusedSieveExperts, name: str = "default") -> dict[tuple[str, int], NaiveAdapter]:
    """The layer's factors as the reference takes them, read from the packed tensors by hand."""
    plan, adapter = layer.plans[name], {}
    for side in ("gate_up", "down"):
        start = 0
        for projection in ("gate_proj", "up_proj") if side == "gate_up" else ("down_proj",):
            if projection not in plan.ranks:
                continue
            rows = slice(start, start + plan.ranks[projection])
            start += plan.ranks[projection]
            a, b = (getattr(layer, f"lora_{side}_{s}")[name].weight for s in "AB")
            scaling = layer.scaling[name] * plan.relative_scaling[projection]
            for expert in (*plan.experts, *plan.cold):
                # The cold ones use the slot after those of the others; a shared factor has one slot for all.
                slot = plan.experts.index(expert) if expert in plan.experts else len(plan.experts)
                factors = (factor[slot if len(factor) > 1 else 0, rows] for factor in (a, b))
                adapter[projection, expert] = NaiveAdapter(*factors, scaling)
    return adapter


def gradients(layer: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in layer.named_parameters() if "lora_" in name and p.grad is not None}
    found.update({f"input{i}": t.grad for i, t in enumerate(inputs) if t.grad is not None})
    for tensor in [*layer.parameters(), *inputs]:
        tensor.grad = None
    return found


def both(
    layer: FusedSieveExperts, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(what, fast, reference) for the output and every gradient."""
    hidden, ids, weights = dispatch(dtype)
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    out = layer(hidden, ids, weights)
    (out * target).sum().backward()
    fast = gradients(layer, hidden, weights)
    adapters = [naive_adapter(layer, name) for name in layer.applied_adapters()]
    expected = naive_experts(layer.get_base_layer(), hidden, ids, weights, adapters)
    (expected * target).sum().backward()
    slow = gradients(layer, hidden, weights)
    yield "output", out.detach(), expected.detach()
    assert fast.keys() >= slow.keys()
    for name, gradient in fast.items():
        # What the reference never touched has no gradient there, and one of zeros in the packed tensors.
        yield name, gradient, slow.get(name, torch.zeros_like(gradient))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_equals_the_reference_in_float64(layout: str, implementation: str) -> None:
    layer = make_layer(layout)
    layer.get_base_layer().config._experts_implementation = implementation
    compared = 0
    for what, fast, slow in both(layer):
        assert_same(fast, slow, what)
        compared += 1
    assert compared == 7  # output, two inputs, four factors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_reference_in_float32(layout: str, backend: str) -> None:
    layer = make_layer(layout, dtype=torch.float32)
    for what, fast, slow in both(layer, torch.float32):
        assert_same(fast, slow, what, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["olmoe", "gpt_oss"])
def test_half_precision_within_rounding(layout: str, dtype: torch.dtype, backend: str) -> None:
    """The error against float64 is that of an expert-at-a-time forward in the same type, not more."""
    layer, exact = make_layer(layout, dtype=dtype), make_layer(layout, dtype=dtype).double()
    reference = {what: slow for what, _, slow in both(exact)}
    for what, fast, slow in both(layer, dtype):
        scale = reference[what].norm()
        fast_error = (fast.double() - reference[what]).norm() / scale
        slow_error = (slow.double() - reference[what]).norm() / scale
        assert fast_error <= 1.5 * slow_error + 1e-3, f"{what}: {fast_error:.2e} against {slow_error:.2e}"


@pytest.mark.parametrize("ids", [[0], [6], list(range(NUM_EXPERTS)), [3, 7]])
@pytest.mark.parametrize("layout", ["olmoe", "gpt_oss"])
def test_any_set_of_experts(layout: str, ids: list[int], backend: str) -> None:
    """One, one that receives no token, all, and the last."""
    layer = make_layer(layout, ids, dtype=torch.float32)
    for what, fast, slow in both(layer, torch.float32):
        if slow.abs().max() == 0:
            assert fast.abs().max() == 0, what
        else:
            assert_same(fast, slow, what, rtol=2e-4, atol=2e-5)


def test_an_expert_without_tokens_has_gradients_of_zero(backend: str) -> None:
    layer = make_layer("olmoe", dtype=torch.float32)
    hidden, ids, weights = dispatch(torch.float32)
    layer(hidden, ids, weights).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            used, idle = parameter.grad[:2], parameter.grad[2]  # slots of experts 1, 2 and 6
            assert (used.flatten(1).abs().amax(1) > 0).all(), name
            assert (idle == 0).all(), name


@pytest.mark.parametrize("projections", [["gate_proj"], ["up_proj"], ["down_proj"], ["gate_proj", "down_proj"]])
@pytest.mark.parametrize("layout", ["olmoe", "gpt_oss"])
def test_some_projections(layout: str, projections: list[str]) -> None:
    layer = make_layer(layout, expert_projections=projections)
    assert set(layer.plans["default"].ranks) == set(projections)
    for what, fast, slow in both(layer):
        assert_same(fast, slow, what)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_ranks_of_any_size(rank: int, backend: str) -> None:
    for what, fast, slow in both(make_layer("olmoe", dtype=torch.float32, r=rank), torch.float32):
        assert_same(fast, slow, what, rtol=2e-4, atol=2e-5)


def test_rank_and_alpha_patterns_by_projection() -> None:
    patterns = {"rank_pattern": {"experts.up_proj": 6}, "alpha_pattern": {"experts.down_proj": 10}}
    layer = make_layer("olmoe", **patterns)
    assert layer.plans["default"].ranks == {"gate_proj": 4, "up_proj": 6, "down_proj": 4}
    for what, fast, slow in both(layer):
        assert_same(fast, slow, what)
    assert layer.factors("default", "down_proj")[2] == pytest.approx(10 / 4)
    assert layer.factors("default", "up_proj")[2] == pytest.approx(64 / 6)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    layer = make_layer("olmoe", r=16, lora_alpha=8, use_rslora=True)
    assert layer.factors("default", "gate_proj")[2] == pytest.approx(8 / 4)
    for what, fast, slow in both(layer):
        assert_same(fast, slow, what)


def test_two_active_adapters_add_up(backend: str) -> None:
    layer = make_layer("olmoe", dtype=torch.float32)
    layer.update_layer("second", [0, 2], SieveLoraConfig(r=8, lora_dropout=0.0))
    randomize(layer)
    layer.set_adapter(["default", "second"])
    compared = [assert_same(f, s, what, rtol=2e-4, atol=2e-5) for what, f, s in both(layer, torch.float32)]
    assert len(compared) == 11


def test_adapters_that_share_factors_differently_add_up(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cold for one is hot for another, so no order makes the cold experts of all of them neighbours."""
    monkeypatch.setattr(fused, "CHUNK_ROWS", 8)
    layer = make_layer("gpt_oss", dtype=torch.float32, cold_experts="shared")
    others = {
        "both": ([0, 2, 3], {"cold_experts": "shared", "share_outer": True, "r": 8}),
        "everything": ([], {"cold_experts": "shared", "share_outer": True, "expert_projections": ["down_proj"]}),
        "outer": ([1, 4], {"share_outer": True, "r": 3}),
        "plain": ([4, 5], {}),
    }
    for name, (ids, options) in others.items():
        layer.update_layer(name, ids, SieveLoraConfig(**{"r": 4, "lora_dropout": 0.0, **options}))
    randomize(layer)
    layer.set_adapter(["default", *others])
    compared = [assert_same(f, s, what, rtol=2e-4, atol=2e-5) for what, f, s in both(layer, torch.float32)]
    assert len(compared) == 3 + 4 * 4 + 2


def test_dropout_acts_on_expert_adapters_only_while_training(backend: str) -> None:
    layer = make_layer("olmoe", dtype=torch.float32, lora_dropout=0.5)
    hidden, ids, weights = dispatch(torch.float32)
    layer.eval()
    plain = layer(hidden, ids, weights)
    layer.train()
    torch.manual_seed(0)
    first = layer(hidden, ids, weights)
    second = layer(hidden, ids, weights)
    torch.manual_seed(0)
    again = layer(hidden, ids, weights)
    assert not torch.equal(first, plain)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    # Tokens that no adapted expert received are not touched by it.
    cold = ~torch.isin(ids, torch.tensor([1, 2, 6])).any(1)
    assert cold.any()
    assert torch.allclose(first[cold], plain[cold])


def test_the_backward_drops_what_the_forward_dropped(backend: str) -> None:
    assert_gradients_predict("olmoe", backend, lora_dropout=0.4)


def assert_gradients_predict(layout: str, backend: str, **options: Any) -> None:
    """With the mask fixed by the seed, the gradients predict how the output changes along a random direction."""
    dtype = torch.float64 if backend == "loop" else torch.float32
    step = 1e-6 if backend == "loop" else 2e-3
    layer = make_layer(layout, dtype=dtype, **options).train()
    hidden, ids, weights = dispatch(dtype)
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)

    def loss() -> torch.Tensor:
        torch.manual_seed(11)
        return (layer(hidden, ids, weights) * target).sum()

    loss().backward()
    parameters = {"hidden": hidden, "weights": weights, **{n: p for n, p in layer.named_parameters() if "lora_" in n}}
    for name, parameter in parameters.items():
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        with torch.no_grad():
            original = parameter.clone()
            parameter.copy_(original + step * direction)
            above = loss().double()
            parameter.copy_(original - step * direction)
            below = loss().double()
            parameter.copy_(original)
        predicted = (parameter.grad.double() * direction).sum()
        assert predicted.abs() > 1e-3, name
        assert torch.isclose((above - below) / (2 * step), predicted, rtol=1e-6 if backend == "loop" else 2e-2), name


def test_dropout_keeps_the_expectation() -> None:
    """Averaged over many masks, the first order of the adapter's share is what it is without dropout."""
    layer = make_layer("olmoe", lora_dropout=0.3, expert_projections=["down_proj"])
    layer.get_base_layer().config._experts_implementation = "eager"  # the stock one without adapters, in float64
    hidden, ids, weights = dispatch()
    with torch.no_grad():
        layer.eval()
        expected = layer(hidden, ids, weights)
        layer.train()
        torch.manual_seed(0)
        mean = torch.stack([layer(hidden, ids, weights) for _ in range(200)]).mean(0)
        layer.set_adapter([])
        base = layer(hidden, ids, weights)
    assert (mean - expected).norm() / (expected - base).norm() < 0.2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_checkpointing(reentrant: bool, dtype: torch.dtype, backend: str) -> None:
    layer = make_layer("olmoe", dtype=dtype, lora_dropout=0.2).train()
    hidden, ids, weights = dispatch(dtype)
    results = []
    for run in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=reentrant)):
        torch.manual_seed(7)
        out = run(hidden, ids, weights)
        out.square().sum().backward()
        results.append({"output": out.detach(), **gradients(layer, hidden, weights)})
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) == 7
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_autocast_keeps_the_stacks_type_and_trains_float32_factors(backend: str) -> None:
    layer = make_layer("olmoe", dtype=torch.bfloat16)
    for name, parameter in list(layer.named_parameters()):
        if "lora_" in name:
            parameter.data = parameter.data.float()
    hidden, ids, weights = dispatch(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(hidden, ids, weights)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    exact = {what: slow for what, _, slow in both(make_layer("olmoe", dtype=torch.bfloat16).double())}
    assert (out.double() - exact["output"]).norm() / exact["output"].norm() < 0.02
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0


def test_deterministic(backend: str) -> None:
    layer = make_layer("olmoe", dtype=torch.float32)
    runs = [{what: fast for what, fast, _ in both(layer, torch.float32)} for _ in range(2)]
    assert all(torch.equal(runs[0][what], runs[1][what]) for what in runs[0])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("post_norm", [False, True])
def test_the_bits_of_a_backward_in_several_threads_are_those_of_one(
    dropout: float, post_norm: bool, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHUNK_ROWS", 8)  # a chunk for each expert
    runs = []
    for number in (1, 3):
        threads(number)
        layer = make_layer("olmoe", dtype=torch.float32, lora_dropout=dropout).train()
        if post_norm:
            experts = layer.get_base_layer()
            experts.has_post_expert_norm = True
            experts.post_expert_norm = nn.RMSNorm(32).requires_grad_(False)
        hidden, ids, weights = dispatch(torch.float32)
        torch.manual_seed(1)
        layer(hidden, ids, weights).square().sum().backward()
        runs.append(gradients(layer, hidden, weights))
    assert len(runs[0]) == 6
    for name, gradient in runs[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, runs[1][name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_reference_in_several_threads(
    layout: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHUNK_ROWS", 8)
    threads(3)
    for what, fast, slow in both(make_layer(layout)):
        assert_same(fast, slow, what)


def test_non_contiguous_input(backend: str) -> None:
    layer = make_layer("olmoe", dtype=torch.float32)
    hidden, ids, weights = dispatch(torch.float32)
    strided = torch.empty(32, TOKENS).T.copy_(hidden.detach())
    assert not strided.is_contiguous()
    assert torch.equal(layer(strided, ids.T.contiguous().T, weights), layer(hidden, ids, weights))


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_a_norm_after_the_experts(implementation: str) -> None:
    """As in muse_spark: the output is no longer linear in the second product."""
    layer = make_layer("olmoe")
    experts = layer.get_base_layer()
    experts.config._experts_implementation = implementation
    experts.has_post_expert_norm = True
    experts.post_expert_norm = nn.RMSNorm(32, dtype=torch.float64).requires_grad_(False)
    nn.init.normal_(experts.post_expert_norm.weight)
    compared = [assert_same(fast, slow, what) for what, fast, slow in both(layer)]
    assert len(compared) == 7


def test_frozen_factors_and_inputs_get_no_gradient() -> None:
    layer = make_layer("olmoe")
    layer.lora_gate_up_B["default"].weight.requires_grad_(False)
    hidden, ids, weights = dispatch()
    reference = {what: fast for what, fast, _ in both(make_layer("olmoe"))}
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (layer(hidden.detach(), ids, weights.detach()) * target).sum().backward()
    found = gradients(layer, hidden, weights)
    assert len(found) == 3
    for name, gradient in found.items():
        assert_same(gradient, reference[name], name)


def test_experts_that_are_trained_themselves_are_refused() -> None:
    layer = make_layer("olmoe")
    layer.get_base_layer().down_proj.requires_grad_(True)
    with pytest.raises(SieveError, match=r"down_proj of layer\.experts require.* gradients"):
        layer(*dispatch())
    with torch.no_grad():
        layer(*dispatch())


def test_nothing_is_kept_without_a_backward() -> None:
    layer = make_layer("olmoe", dtype=torch.float32, lora_dropout=0.1)
    with torch.no_grad():
        assert layer(*dispatch(torch.float32)).grad_fn is None


def test_torch_compile_leaves_the_experts_out_of_its_graph() -> None:
    torch._dynamo.reset()
    layer = make_layer("olmoe", dtype=torch.float32)
    hidden, ids, weights = dispatch(torch.float32)
    plain = layer(hidden, ids, weights)
    plain.square().sum().backward()
    expected = gradients(layer, hidden, weights)
    compiled = torch.compile(lambda *args: layer(*args) * 1.0, backend="aot_eager")
    out = compiled(hidden, ids, weights)
    assert torch.equal(out, plain)
    out.square().sum().backward()
    for name, gradient in gradients(layer, hidden, weights).items():
        assert torch.equal(gradient, expected[name]), name
    with pytest.raises(Exception, match="adapted experts run outside the graph: leave fullgraph at False"):
        torch.compile(lambda *args: layer(*args) * 1.0, backend="aot_eager", fullgraph=True)(hidden, ids, weights)


def test_no_tokens_at_all(backend: str) -> None:
    layer = make_layer("olmoe", dtype=torch.float32)
    hidden, ids, weights = (t[:0] for t in dispatch(torch.float32))
    out = layer(hidden, ids, weights)
    assert out.shape == (0, 32)
    out.sum().backward()


class _Sizes(TorchDispatchMode):
    """Records the size of every tensor that an operation makes (views of existing storage left out), and all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_never_builds_a_tensor_of_the_size_of_the_stack(layout: str) -> None:
    layer = make_layer(layout, [1, 2], dtype=torch.float32)
    hidden, ids, weights = (t[:2] for t in dispatch(torch.float32))
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    with _Sizes() as sizes:
        layer(hidden, ids, weights).sum().backward()
    smallest_stack = min(p.numel() for p in layer.get_base_layer().parameters() if p.dim() == 3)
    assert sizes.largest < smallest_stack / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_computes_nothing_for_experts_without_tokens(layout: str) -> None:
    """One product an expert that tokens reached and a stack, forward and backward; the adapters' come on top."""
    layer = make_layer(layout, [6, 7], dtype=torch.float32)
    hidden, ids, weights = dispatch(torch.float32)
    with _Sizes() as sizes:
        layer(hidden, ids, weights).sum().backward()
    assert layer.lora_down_A["default"].weight.grad.abs().max() == 0  # nobody was sent to experts 6 and 7
    products = [call for call in sizes.calls if call in ("_grouped_mm", "mm", "bmm", "addmm", "addmm_", "baddbmm")]
    assert products == ["mm"] * (2 * 2 * ids.unique().numel())


def test_the_size_recorder_sees_a_dense_delta() -> None:
    experts = make_experts("olmoe", torch.float32)
    with _Sizes() as sizes:
        torch.add(experts.gate_up_proj, experts.gate_up_proj)
    assert sizes.largest == experts.gate_up_proj.numel()


@pytest.mark.parametrize("training", [False, True])
def test_module_list_experts(training: bool) -> None:
    """Deltas in hooks equal the same experts with merged weights, gradients included."""
    from peft_sieve.tuners.common.experts.module_list import ModuleListSieveExperts

    torch.manual_seed(0)
    block = DeepseekLikeMoE(DeepseekLikeConfig()).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_(False)
    family = family_of(block.experts)
    assert family is not None
    layer = ModuleListSieveExperts(
        block.experts, MoELayer("mlp.experts", block.experts, family, family.shape(block.experts), (), ())
    )
    block.experts = layer
    layer.update_layer("default", [1, 2, 6], SieveLoraConfig(r=4, lora_dropout=0.0))
    randomize(layer)
    block.train(training)
    x = torch.randn(2, 20, 32, dtype=torch.float64, requires_grad=True)
    out = block(x)
    out.square().sum().backward()
    fast = {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if "lora_" in n}}

    # Reference: explicit weights W + s B^T A, differentiable in the factors, through plain functional calls.
    x2 = x.detach().clone().requires_grad_()
    adapter = naive_adapter(layer)
    leaves = {n: p for n, p in layer.named_parameters() if "lora_" in n}
    for leaf in leaves.values():
        leaf.grad = None
    flat = x2.view(-1, 32)
    ids, weights, _ = block.gate(x2)
    total = torch.zeros_like(flat)
    for token in range(flat.shape[0]):
        for pair in range(ids.shape[1]):
            expert = int(ids[token, pair])

            def project(name: str, value: torch.Tensor, expert: int = expert) -> torch.Tensor:
                weight = getattr(layer.base_layer[expert], name).weight
                factors = adapter.get((name, expert))
                if factors is not None:
                    weight = weight + factors.scaling * factors.b.T @ factors.a
                return weight @ value

            act = nn.functional.silu(project("gate_proj", flat[token])) * project("up_proj", flat[token])
            total = total + nn.functional.one_hot(torch.tensor(token), flat.shape[0])[:, None] * (
                weights[token, pair] * project("down_proj", act)
            )
    expected = total.view_as(x2) + block.shared_experts(x2)
    expected.square().sum().backward()
    assert_same(out.detach(), expected.detach(), "output")
    assert_same(fast["x"], x2.grad, "x")
    for name, leaf in leaves.items():
        assert_same(fast[name], leaf.grad, name)
