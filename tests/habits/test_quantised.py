"""Base models stored in fewer bits: each is compared with the same model holding the dequantised values."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Llama4TextExperts
from transformers.integrations.finegrained_fp8 import (
    Fp8Dequantize,
    FP8Experts,
    FP8Linear,
    Fp8Quantize,
    replace_with_fp8_linear,
)
from transformers.integrations.gguf.utils import GgufExperts
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from transformers.models.dbrx.modeling_dbrx import DbrxForCausalLM
from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration

from peft_sieve import SieveError, SieveLoraConfig
from peft_sieve.kernels import expert_function
from peft_sieve.kernels.workers import for_each
from peft_sieve.moe.families.fused import FusedExperts
from peft_sieve.moe.linear import is_linear
from peft_sieve.moe.storage import plain_stack
from peft_sieve.moe.topology import find_moe_layers
from tests.architectures.tiny import tiny_model as architecture
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, tiny_model, token_batch
from tests.module_models import MODELS, jetmoe
from tests.reference import assert_same

SKIPPED = ["lm_head", "shared_expert_gate"]
BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": SKIPPED},
    8: {"load_in_8bit": True, "llm_int8_skip_modules": SKIPPED},
}
# On some processors, bitsandbytes evaluates 4-bit layers only if their widths are multiples of this.
WIDTH = 64
Batch = dict[str, torch.Tensor]
SHARED = {"cold_experts": "shared", "share_outer": True}
each_sharing = pytest.mark.parametrize("shared", [{}, SHARED], ids=["", "shared"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    widths = {"hidden_size": WIDTH, "num_key_value_heads": 4, "head_dim": 16, "shared_expert_intermediate_size": WIDTH}
    tiny_model("qwen2_moe", **widths).save_pretrained(folder)
    return folder


def load(checkpoint: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options)


def config(model: nn.Module, batch: Batch, **options: Any) -> SieveLoraConfig:
    settings = {"r": 4, "lora_dropout": 0.0, "calib_dataset": [batch], "task_type": "CAUSAL_LM"}
    return SieveLoraConfig(**{**settings, **options})


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def gradients(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(model: nn.Module, reference: nn.Module, batch: Batch, tolerance: float) -> None:
    expected = gradients(reference, batch)
    found = gradients(model, batch)
    assert found.keys() == expected.keys() and any(".experts." in name for name in found)
    for name, gradient in found.items():
        assert_same(gradient, expected[name], name, rtol=0, atol=tolerance)


def with_stacks(stock: Any, values: Callable[[nn.Module, str], torch.Tensor], source: nn.Module) -> Any:
    """`stock`, its stacks of experts filled with `values(experts of source, name)`."""
    for layer in find_moe_layers(stock):
        for name in ("gate_up_proj", "down_proj"):
            getattr(layer.experts, name).data.copy_(values(source.get_submodule(layer.path), name))
    return stock


# bitsandbytes


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_kbit_training(bits: int, use_reentrant: bool, checkpoint: Path, tmp_path: Path) -> None:
    """bitsandbytes quantises linear layers and leaves the 3-D stacks of experts and the router alone."""
    pytest.importorskip("bitsandbytes")

    def prepared() -> Any:
        model = load(checkpoint, quantization_config=BitsAndBytesConfig(**BITS[bits]))
        return prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})

    model = prepared()
    batch = token_batch(model)
    layers = find_moe_layers(model)
    for layer in layers:
        assert all(p.is_floating_point() and p.dtype.itemsize > 1 for p in layer.experts.parameters())
    linears = [m for m in model.modules() if type(m).__name__.startswith(("Linear4bit", "Linear8bit"))]
    assert len(linears) == 2 * (4 + 3)  # attention and shared experts
    peft_model = get_peft_model(model, config(model, batch))
    # One set of weights for both models, before anything runs in evaluation mode.
    randomize_adapters(peft_model)
    peft_model.train()
    reference = copy.deepcopy(peft_model)
    for name, module in list(reference.named_modules()):
        if type(module).__name__.startswith(("Linear4bit", "Linear8bit")) and not hasattr(module, "base_layer"):
            reference.set_submodule(name, dequantised_linear(module))
    # 8-bit products round their input, too.
    assert_same_gradients(peft_model, reference, batch, 1e-4 if bits == 4 else 0.1)

    torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.01).step()
    peft_model.eval()
    trained = logits(peft_model, batch)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(prepared(), tmp_path)
    assert torch.equal(logits(loaded, batch), trained)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, batch), logits(prepared().eval(), batch))


def dequantised_linear(module: Any) -> nn.Linear:
    from peft.utils.integrations import dequantize_module_weight

    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight = nn.Parameter(dequantize_module_weight(module).float().clone(), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().float().clone(), requires_grad=False)
    return linear


@pytest.mark.parametrize("bits", BITS)
def test_merging_is_pefts_for_quantised_linears_and_exact_for_experts(bits: int, checkpoint: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load(checkpoint, quantization_config=BitsAndBytesConfig(**BITS[bits]))
    batch = token_batch(model)
    peft_model = get_peft_model(model, config(model, batch))
    randomize_adapters(peft_model, std=0.05)
    stacks = {n: p.detach().clone() for n, p in peft_model.named_parameters() if n.endswith(("_up_proj", "down_proj"))}
    projections = [block.self_attn.q_proj for block in peft_model.base_model.model.model.layers]
    assert {type(projection).__module__ for projection in projections} == {"peft.tuners.lora.bnb"}
    expected = [dequantised_linear(p.base_layer).weight + p.get_delta_weight("default") for p in projections]
    peft_model.merge_adapter()
    for projection, weight in zip(projections, expected, strict=True):
        merged = dequantised_linear(projection.base_layer).weight
        assert_same(merged, weight, "merged", rtol=0, atol=0.2 if bits == 4 else 0.01)
    assert stacks and not any(torch.equal(peft_model.get_parameter(n), stack) for n, stack in stacks.items())
    peft_model.unmerge_adapter()
    for name, stack in stacks.items():
        assert torch.equal(peft_model.get_parameter(name), stack), name


@each_sharing
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_experts_in_4_bits(use_reentrant: bool | None, shared: dict[str, Any], tmp_path: Path) -> None:
    """bitsandbytes' `replace_parameter_4bit`, which puts a parametrisation on a stack."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")

    def quantised() -> Any:
        model = tiny_model("olmoe")
        for layer in find_moe_layers(model):
            for name in ("gate_up_proj", "down_proj"):
                parametrize.replace_parameter_4bit(layer.experts, name, quant_type="nf4")
        return model

    model = quantised()
    batch = token_batch(model)
    reference = with_stacks(tiny_model("olmoe"), getattr, model)
    check_against_reference(model, reference, batch, tmp_path, quantised, use_reentrant=use_reentrant, **shared)
    packed = [p for n, p in model.named_parameters() if "parametrizations" in n]
    assert len(packed) == 4 and all(p.dtype == torch.uint8 for p in packed)


def check_against_reference(
    model: Any,
    reference: Any,
    batch: Batch,
    tmp_path: Path,
    again: Callable[[], Any],
    use_reentrant: bool | None = None,
    tolerance: float = 1e-5,
    **options: Any,
) -> None:
    """Outputs and gradients of a model with quantised experts, its saved adapter, and that nothing is merged."""
    before = [type(module) for module in model.modules()]
    adapted = get_peft_model(model, config(model, batch, **options))
    mask = adapted.peft_config["default"].selected_experts
    given = {**options, "calib_dataset": None, "selected_experts": mask}
    plain = get_peft_model(reference, config(reference, batch, **given))
    for peft_model in (adapted, plain):
        randomize_adapters(peft_model)
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.float32}
    expected = logits(plain, batch)
    assert_same(logits(adapted, batch), expected, "logits", rtol=0, atol=tolerance)
    if use_reentrant is not None:
        adapted.train()
        adapted.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        adapted.enable_input_require_grads()
    assert_same_gradients(adapted, plain, batch, 10 * tolerance)

    adapted.eval()
    adapted.save_pretrained(tmp_path)
    trained = logits(adapted, batch)
    assert torch.equal(logits(PeftModel.from_pretrained(again(), tmp_path), batch), trained)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(SieveError, match="experts of model.* are quantised"):
            merge()
        assert torch.equal(logits(adapted, batch), trained)
    assert [type(module) for module in adapted.unload().modules()] == before


@each_sharing
@pytest.mark.parametrize("bits", BITS)
def test_linear_layers_in_a_list_of_experts(bits: int, shared: dict[str, Any], tmp_path: Path) -> None:
    """Remote code's experts are linear layers, which bitsandbytes quantises like any other."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantised() -> Any:
        model = deepseek_like(hidden_size=WIDTH, moe_intermediate_size=WIDTH)
        for layer in find_moe_layers(model):
            for expert in layer.experts:
                for name in ("gate_proj", "up_proj", "down_proj"):
                    linear = getattr(expert, name)
                    if bits == 4:
                        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False)
                        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False)
                    else:
                        new = bnb.nn.Linear8bitLt(
                            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
                        )
                        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
                    setattr(expert, name, new.to("cpu"))
        return model.train()  # in evaluation, 4-bit weights may change their layout

    model, reference = quantised(), quantised()
    batch = token_batch(model)
    for layer in find_moe_layers(reference):
        for expert in layer.experts:
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(expert, name, dequantised_linear(getattr(expert, name)))
    tolerance = 1e-5 if bits == 4 else 0.05
    check_against_reference(model, reference, batch, tmp_path, quantised, tolerance=tolerance, **shared)


class Int8Linear(nn.Module):
    """As those of HQQ, GPTQ and the like: no `nn.Linear`, and no weight that one could add to."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.packed * self.scale).T


@each_sharing
@pytest.mark.parametrize("name", ["deepseek_like", "mixtral_v4"])
def test_quantised_layers_of_experts_that_derive_from_no_linear_layer(
    name: str, shared: dict[str, Any], tmp_path: Path
) -> None:
    def with_linears(change: Callable[[nn.Linear], nn.Module]) -> Any:
        model = MODELS[name]()
        for layer in find_moe_layers(model):
            family: Any = layer.family
            for expert in family.experts(layer.experts):
                for linear in family.linear_names.values():
                    setattr(expert, linear, change(getattr(expert, linear)))
        return model

    def dequantised(linear: nn.Linear) -> nn.Linear:
        quantised = Int8Linear(linear)
        linear.weight = nn.Parameter(quantised.packed * quantised.scale, requires_grad=False)
        return linear

    model = with_linears(Int8Linear)
    batch = token_batch(model)
    reference = with_linears(dequantised)
    check_against_reference(model, reference, batch, tmp_path, lambda: with_linears(Int8Linear), **shared)


# torchao


@each_sharing
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_experts_stored_by_torchao(kind: str, shared: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    method = torchao.Int8WeightOnlyConfig(version=2) if kind == "int8" else torchao.Float8WeightOnlyConfig()
    stacks = torchao.FqnToConfig({r"re:.*\.experts\.(gate_up|down)_proj": method})

    def quantised() -> Any:
        # torchao's tensors have no grouped product: the stock experts, which calibration runs, must go one by one.
        return load(
            checkpoint,
            quantization_config=TorchAoConfig(stacks),
            experts_implementation="eager",
        ).eval()

    model = quantised()
    assert all(type(p).__module__.startswith("torchao") for m in find_moe_layers(model) for p in m.experts.parameters())
    stock = load(checkpoint, experts_implementation="eager").eval()
    reference = with_stacks(stock, lambda experts, name: getattr(experts, name).dequantize(), model)
    check_against_reference(model, reference, token_batch(model), tmp_path, quantised, **shared)


def test_linear_layers_stored_by_torchao(checkpoint: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    method = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
    model = load(checkpoint, quantization_config=method)
    batch = token_batch(model)
    reference = copy.deepcopy(model)
    for name, module in list(reference.named_modules()):
        if type(getattr(module, "weight", None)).__module__.startswith("torchao"):
            reference.set_submodule(name, dequantised_linear(module))
    mask = get_peft_model(copy.deepcopy(model), config(model, batch)).peft_config["default"].selected_experts
    models = [
        get_peft_model(m, config(m, batch, calib_dataset=None, selected_experts=mask)) for m in (model, reference)
    ]
    for peft_model in models:
        randomize_adapters(peft_model)
    assert_same_gradients(*models, batch, 1e-4)


# Fine-grained FP8


def fp8_model(scale_fmt: str = "float", **options: Any) -> Any:
    """The tiny model with its experts in FP8, as transformers quantises and holds them. Its kernels want a GPU."""
    model = tiny_model("olmoe")
    settings = FineGrainedFP8Config(weight_block_size=(16, 8), scale_fmt=scale_fmt, **options)
    quantise = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    values = [(layer.path, dict(layer.experts.named_parameters())) for layer in find_moe_layers(model)]
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    replace_with_fp8_linear(model, modules_to_not_convert=others, quantization_config=settings)
    for path, parameters in values:
        experts = model.get_submodule(path)
        for name, parameter in parameters.items():
            for stored, value in quantise.convert({name: parameter.data}).items():
                assert getattr(experts, stored).shape == value.shape
                setattr(experts, stored, nn.Parameter(value, requires_grad=False))
    return model.eval()


@each_sharing
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_experts_in_fp8_with_scales(scale_fmt: str, shared: dict[str, Any], tmp_path: Path) -> None:
    model = fp8_model(scale_fmt)
    assert all(isinstance(layer.experts, FP8Experts) for layer in find_moe_layers(model))
    dequantise = Fp8Dequantize(None)

    def values(experts: Any, name: str) -> torch.Tensor:
        parts = {"weight": getattr(experts, name), "weight_scale_inv": getattr(experts, f"{name}_scale_inv")}
        return dequantise.convert(parts)["weight"].float()

    reference = with_stacks(tiny_model("olmoe"), values, model)
    mask = {layer.path: [0, 3, 5] for layer in find_moe_layers(model)}
    check_against_reference(
        model,
        reference,
        token_batch(model),
        tmp_path,
        lambda: fp8_model(scale_fmt),
        calib_dataset=None,
        selected_experts=mask,
        **shared,
    )


def test_experts_in_fp8_compute_in_the_type_of_their_input() -> None:
    model = fp8_model()
    batch = token_batch(model)
    mask = {layer.path: [0, 3, 5] for layer in find_moe_layers(model)}
    peft_model = get_peft_model(model, config(model, batch, calib_dataset=None, selected_experts=mask))
    seen: list[torch.dtype] = []
    for layer in find_moe_layers(model):
        layer.experts.act_fn.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    logits(peft_model, batch)
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits(peft_model, batch)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_backward_in_several_threads_makes_the_stacks_once(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = token_batch(fp8_model(), length=200)
    made: list[threading.Thread] = []
    pieces: list[int] = []

    def stacks(*args: Any) -> Any:
        made.append(threading.current_thread())
        return FusedExperts.stacks(*args)

    def divided(work: Callable[[int], None], sizes: Sequence[int]) -> None:
        pieces.append(len(sizes))
        for_each(work, sizes)

    models = [fp8_model(), fp8_model()]
    references = with_stacks(tiny_model("olmoe"), lambda e, name: plain_stack(e, name, torch.float32), models[0])
    mask = {layer.path: [0, 3, 5] for layer in find_moe_layers(references)}
    adapted, plain = (
        get_peft_model(m, config(m, batch, calib_dataset=None, selected_experts=mask)) for m in (models[0], references)
    )
    for peft_model in (adapted, plain):
        randomize_adapters(peft_model)
    expected = gradients(plain, batch)
    monkeypatch.setattr(
        find_moe_layers(adapted)[0].family, "stacks", partial(stacks, find_moe_layers(adapted)[0].family)
    )
    monkeypatch.setattr(expert_function, "for_each", divided)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = gradients(adapted, batch)
    finally:
        torch.set_num_threads(before)
    layers = len(mask)
    assert len(pieces) == layers and min(pieces) > 1
    assert len(made) == 2 * layers and set(made) == {threading.current_thread()}
    for name, gradient in found.items():
        assert_same(gradient, expected[name], name, rtol=0, atol=1e-4)


def test_blocks_that_end_before_the_matrix_does() -> None:
    experts = nn.Module()
    experts.block_size = (10, 12)
    weight, scales = torch.randn(3, 24, 32).to(torch.float8_e4m3fn), torch.rand(3, 3, 3)
    experts.down_proj, experts.down_proj_scale_inv = (nn.Parameter(t, requires_grad=False) for t in (weight, scales))
    expected = torch.empty(3, 24, 32)
    for expert in range(3):
        for row in range(24):
            for column in range(32):
                scale = scales[expert, row // 10, column // 12]
                expected[expert, row, column] = weight[expert, row, column].float() * scale
    assert torch.equal(plain_stack(experts, "down_proj", torch.float32), expected)


def test_merging_into_fp8_linear_layers_is_refused() -> None:
    """PEFT would add to the stored values and leave their scales out."""
    model = tiny_model("olmoe")
    batch = token_batch(model)
    for block in model.model.layers:
        linear = FP8Linear(32, 32, block_size=(16, 16))
        nn.init.ones_(linear.weight_scale_inv)
        linear.weight.data = torch.randn(32, 32).to(torch.float8_e4m3fn)
        block.self_attn.o_proj = linear
    mask = get_peft_model(tiny_model("olmoe"), config(model, batch)).peft_config["default"].selected_experts
    peft_model = get_peft_model(model, config(model, batch, calib_dataset=None, selected_experts=mask))
    with pytest.raises(SieveError, match=r"o_proj is quantised \(FP8Linear\)"):
        peft_model.merge_and_unload()
    assert not any(getattr(module, "merged", False) for module in peft_model.modules())


# What is refused by name


def _packed() -> dict[str, Callable[[Any], nn.Module]]:
    def fp4(model: Any) -> nn.Module:
        model.config.hidden_act = "silu"
        experts = fp8_model().model.layers[0].mlp.experts
        experts.gate_up_proj = nn.Parameter(torch.zeros(8, 48, 24, dtype=torch.int8), requires_grad=False)
        return experts

    return {
        "Mxfp4Config(dequantize=True)": lambda model: Mxfp4GptOssExperts(model.config),
        "GgufConfig(dequantize=True)": lambda model: GgufExperts(8, 32, 24, 2, 2, nn.SiLU()),
        "FbgemmFp8Config(modules_to_not_convert": lambda model: FbgemmFp8Llama4TextExperts(
            SimpleNamespace(num_local_experts=8, intermediate_size=24, hidden_size=32, hidden_act="silu")
        ),
        "torch.int8 (Parameter in FP8Experts)": fp4,
    }


@pytest.mark.parametrize("advice", _packed())
def test_packed_experts_are_refused_by_name(advice: str) -> None:
    model = tiny_model("gpt_oss")
    model.model.layers[1].mlp.experts = _packed()[advice](model)
    modules = dict(model.named_modules())
    with pytest.raises(SieveError, match="model.layers.1.mlp.experts are") as error:
        get_peft_model(model, config(model, token_batch(model)))
    assert advice in str(error.value)
    assert dict(model.named_modules()) == modules


def test_stacks_in_layouts_of_their_own_are_refused_quantised() -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    step3p7, jet, dbrx = architecture(Step3p7ForConditionalGeneration), jetmoe(), architecture(DbrxForCausalLM)
    batch = token_batch(jet)
    for name in ("gate_up_proj", "down_proj"):
        parametrize.replace_parameter_4bit(find_moe_layers(step3p7)[-1].experts, name, quant_type="nf4")
    for owner, name in ((find_moe_layers(jet)[-1].experts.output_linear, "weight"), (dbrx_mlp(dbrx), "v1")):
        stored = getattr(owner, name).detach().to(torch.float8_e4m3fn)
        setattr(owner, name, nn.Parameter(stored, requires_grad=False))
    for model, stored in ((step3p7, "uint8"), (jet, "float8"), (dbrx, "float8")):
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(SieveError, match=f"are stored as torch.{stored}.*without quantisation of its experts"):
            get_peft_model(model, config(model, batch))
        assert [name for name, _ in model.named_modules()] == names


def dbrx_mlp(model: nn.Module) -> Any:
    return find_moe_layers(model)[-1].experts.mlp


@pytest.mark.parametrize("bits", BITS)
def test_a_router_beside_its_experts_may_be_quantised(bits: int) -> None:
    """In jetmoe, one module holds both."""
    bnb = pytest.importorskip("bitsandbytes")
    model = jetmoe()
    batch = token_batch(model)
    for layer in find_moe_layers(model):
        router = layer.experts.router
        kind = bnb.nn.Linear4bit if bits == 4 else partial(bnb.nn.Linear8bitLt, has_fp16_weights=False)
        quantised = kind(router.layer.in_features, router.layer.out_features, bias=False)
        quantised.load_state_dict(router.layer.state_dict())
        router.layer = quantised.to("cpu")
    peft_model = get_peft_model(model.train(), config(model, batch))
    assert any(".router.layer.lora_B" in name and g.any() for name, g in gradients(peft_model, batch).items())


def test_quantised_linears_that_derive_from_no_linear_layer_count() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 8, 4

    assert is_linear(Packed()) and is_linear(nn.Linear(2, 2))
    assert not is_linear(nn.Embedding(2, 2)) and not is_linear(nn.Bilinear(2, 2, 2)) and not is_linear(None)
