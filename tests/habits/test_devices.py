"""Base models whose weights are offloaded, and types and devices that change under an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.dbrx.modeling_dbrx import DbrxForCausalLM
from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration

from peft_sieve import SieveError, SieveLoraConfig
from tests.architectures.tiny import inputs_for
from tests.architectures.tiny import tiny_model as architecture
from tests.models import randomize_adapters, tiny_model, token_batch
from tests.module_models import MODELS
from tests.reference import assert_same

OFFLOADS = ["cpu", "disk"]
each_sharing = pytest.mark.parametrize(
    "shared", [{}, {"cold_experts": "shared", "share_outer": True}], ids=["", "shared"]
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("qwen2_moe").save_pretrained(folder)
    return folder


@pytest.fixture
def offloaded(checkpoint: Path, tmp_path: Path) -> Callable[[str], Any]:
    """Makes the model with all of its weights in main memory, or its second block on the disk."""

    def make(offload: str) -> Any:
        if offload == "cpu":
            model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
            return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"]
        device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, device_map=device_map, offload_folder=tmp_path / "offload"
        ).eval()

    return make


def plain(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def adapted(model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> PeftModel:
    settings = {"r": 4, "lora_dropout": 0.0, "calib_dataset": [batch], "task_type": "CAUSAL_LM", **options}
    peft_model = get_peft_model(model, SieveLoraConfig(**settings))
    randomize_adapters(peft_model)
    return peft_model.eval()


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).logits.float().square().sum().backward()
    # Experts that receive nothing have none.
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expert_stacks(model: nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]


@each_sharing
@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_base_gives_what_one_in_memory_gives(
    offload: str, shared: dict[str, Any], checkpoint: Path, offloaded: Callable[[str], Any], tmp_path: Path
) -> None:
    batch = token_batch(plain(checkpoint))
    reference, model = adapted(plain(checkpoint), batch, **shared), adapted(offloaded(offload), batch, **shared)
    away = [stack.is_meta for stack in expert_stacks(model)]
    assert any(away) and all(p.device.type == "cpu" for n, p in model.named_parameters() if "lora_" in n)
    assert model.peft_config["default"].selected_experts == reference.peft_config["default"].selected_experts

    expected = logits(reference, batch)
    assert torch.equal(logits(model, batch), expected)
    expected_gradients = gradients(reference, batch)
    for name, gradient in gradients(model, batch).items():
        assert_same(gradient, expected_gradients[name], name)
    model.save_pretrained(tmp_path / "adapter")
    assert [stack.is_meta for stack in expert_stacks(model)] == away

    for merged in (reference, model):
        merged.merge_adapter()
    merged_logits = logits(reference, batch)
    assert not torch.equal(merged_logits, expected) and torch.equal(logits(model, batch), merged_logits)
    with model.disable_adapter(), reference.disable_adapter():
        # Switching off takes out what was merged, which is in a file or in main memory here.
        assert torch.equal(logits(model, batch), logits(plain(checkpoint), batch))
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(model.merge_and_unload(), batch), merged_logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_loading_onto_an_offloaded_base(
    offload: str, low_cpu_mem_usage: bool, checkpoint: Path, offloaded: Callable[[str], Any], tmp_path: Path
) -> None:
    batch = token_batch(plain(checkpoint))
    reference = adapted(plain(checkpoint), batch)
    reference.save_pretrained(tmp_path / "adapter")
    expected = logits(reference, batch)
    base = offloaded(offload)
    device_map = copy.copy(getattr(base, "hf_device_map", None))
    away = [stack.is_meta for stack in expert_stacks(base)]

    model = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, batch), expected)
    assert [stack.is_meta for stack in expert_stacks(model)] == away
    assert getattr(base, "hf_device_map", None) == device_map
    # As a trainer that resumes does: into the adapter that is there.
    randomize_adapters(model, seed=5)
    assert not torch.equal(logits(model, batch), expected)
    model.load_adapter(tmp_path / "adapter", "default", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, batch), expected)
    model.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    assert torch.equal(logits(model, batch), expected)

    in_memory = plain(checkpoint)
    in_memory.load_adapter(tmp_path / "adapter")
    by_transformers = offloaded(offload)
    by_transformers.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(by_transformers, batch), logits(in_memory, batch))
    assert_same(logits(by_transformers, batch), expected, "logits", atol=1e-5)


def test_a_refused_adapter_leaves_an_offloaded_base_as_it_was(
    checkpoint: Path, offloaded: Callable[[str], Any], tmp_path: Path
) -> None:
    batch = token_batch(plain(checkpoint))
    adapted(plain(checkpoint), batch).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.pop(next(key for key in weights if "lora_down_B" in key))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    base = offloaded("disk")
    before, device_map, names = logits(base, batch), dict(base.hf_device_map), [n for n, _ in base.named_modules()]
    with pytest.raises(SieveError, match="lora_down_B"):
        PeftModel.from_pretrained(base, tmp_path)
    assert base.hf_device_map == device_map and [n for n, _ in base.named_modules()] == names
    assert torch.equal(logits(base, batch), before)


# jetmoe and longcat_flash read weights outside of the forward of their module: transformers cannot run them offloaded.
LAYOUTS: dict[str, Callable[[], Any]] = {
    **{name: make for name, make in MODELS.items() if name != "jetmoe"},
    "step3p7": lambda: architecture(Step3p7ForConditionalGeneration),
    # Nor dbrx; but its experts with adapters run here, and the mask is given.
    "dbrx": lambda: architecture(DbrxForCausalLM),
}


@each_sharing
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_are_offloaded_module_by_module(name: str, shared: dict[str, Any]) -> None:
    base = LAYOUTS[name]()
    batch = inputs_for(base)
    reference = adapted(base, batch, **shared)
    mask = reference.peft_config["default"].selected_experts
    offloaded_base = accelerate.cpu_offload(LAYOUTS[name](), execution_device=torch.device("cpu"))
    model = adapted(offloaded_base, batch, calib_dataset=None, selected_experts=mask, **shared)
    assert all(p.is_meta for n, p in model.named_parameters() if ".experts." in n and "lora_" not in n)
    expected = logits(reference, batch)
    assert torch.equal(logits(model, batch), expected)
    expected_gradients = gradients(reference, batch)
    for key, gradient in gradients(model, batch).items():
        assert_same(gradient, expected_gradients[key], key)
    if name == "step3p7":  # one module holds the experts of a layer
        reference.merge_adapter()
        model.merge_adapter()
        merged = logits(reference, batch)
        assert not torch.equal(merged, expected) and torch.equal(logits(model, batch), merged)
        model.unmerge_adapter()
    else:
        with pytest.raises(SieveError, match="separate modules that are offloaded"):
            model.merge_and_unload()
    assert torch.equal(logits(model, batch), expected)


def test_a_model_that_is_on_one_device_by_its_map(checkpoint: Path, tmp_path: Path) -> None:
    batch = token_batch(plain(checkpoint))
    reference = adapted(plain(checkpoint), batch)
    reference.save_pretrained(tmp_path)
    for device_map in ("auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        base = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map).eval()
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), batch), logits(reference, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_keeps_adapters_in_float32(dtype: torch.dtype) -> None:
    batch = token_batch(tiny_model("olmoe"))
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(
            tiny_model("olmoe", dtype=dtype),
            SieveLoraConfig(r=4, calib_dataset=[batch], task_type="CAUSAL_LM"),
            autocast_adapter_dtype=autocast,
        )
        randomize_adapters(model)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {expected}
        found = gradients(model, batch)
        assert {gradient.dtype for gradient in found.values()} == {expected}
        assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (lambda model: model.half(), 0.05),
        (lambda model: model.to(torch.bfloat16), 0.3),
        (lambda model: model.double(), 1e-5),
        (lambda model: model.to("cpu", torch.float64), 1e-5),
    ],
    ids=["half", "bfloat16", "double", "device and type"],
)
def test_the_type_of_an_adapted_model_changes_as_a_whole(
    change: Callable[[nn.Module], nn.Module], tolerance: float
) -> None:
    batch = token_batch(tiny_model("olmoe"))
    model = adapted(tiny_model("olmoe"), batch)
    before = logits(model, batch)
    slots = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("slots")}
    changed = change(model)
    assert len({p.dtype for p in changed.parameters()}) == 1
    assert all(torch.equal(slots[name], b) for name, b in changed.named_buffers() if name.endswith("slots"))
    assert_same(logits(changed, batch), before, "logits", rtol=0, atol=tolerance)
    assert all(gradient.isfinite().all() for gradient in gradients(changed, batch).values())
