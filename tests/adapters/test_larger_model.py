"""Adapters of a text model that was loaded from the checkpoint of a larger model: what is written works for both."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration
from transformers.models.dots3_note.modeling_dots3_note import Dots3NoteForConditionalGeneration
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForConditionalGeneration

from peft_sieve import SieveLoraConfig, export_lora, merge_checkpoint, narrow_lora
from peft_sieve.cli import main
from peft_sieve.moe.topology import find_moe_layers
from tests.adapters.saved import relative_difference
from tests.architectures.tiny import tiny_model
from tests.models import randomize_adapters, token_batch


@dataclass
class Part:
    """A text model, a saved adapter of it, and the larger model."""

    larger: Any
    text: Any
    model: PeftModel
    path: Path
    base_path: Path

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**token_batch(self.text)).logits

    def assert_same(self, model: nn.Module) -> None:
        expected = self.logits(self.model)
        assert relative_difference(expected, self.logits(self.text)) > 0.05, "the adapter hardly does anything"
        assert relative_difference(self.logits(model), expected) < 1e-4

    def with_lora(self, base: Any, path: Path) -> PeftModel:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*adapter keys.*")
            return PeftModel.from_pretrained(copy.deepcopy(base), path)


def part(model_class: Any, folder: Path, rows: int = 0) -> Part:
    larger = tiny_model(model_class).eval()
    larger.save_pretrained(folder / "base")
    text = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    assert type(text) is not type(larger)
    if rows:
        for base in (larger, text):
            base.resize_token_embeddings(rows, mean_resizing=False)
    mask = {layer.path: [i % 3, i % 3 + 3] for i, layer in enumerate(find_moe_layers(text))}
    config = SieveLoraConfig(r=4, selected_experts=mask, task_type="CAUSAL_LM", train_router=False)
    model = get_peft_model(copy.deepcopy(text), config).eval()
    randomize_adapters(model)
    model.save_pretrained(folder / "adapter")
    return Part(larger, text, model, folder / "adapter", folder / "base")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return part(Qwen3_5MoeForConditionalGeneration, tmp_path_factory.mktemp("qwen"))


# A prefix that transformers drops, and names that have one as a whole.
@pytest.mark.parametrize("model_class", [Qwen4ExpForConditionalGeneration, Llama4ForConditionalGeneration])
def test_what_is_written_works_for_both(model_class: Any, tmp_path: Path) -> None:
    adapter = part(model_class, tmp_path)
    assert main(["export", str(adapter.path), str(tmp_path / "lora")]) == 0
    assert main(["export", str(adapter.path), str(tmp_path / "merged"), "--merge"]) == 0
    for base in (adapter.text, adapter.larger):
        adapter.assert_same(adapter.with_lora(base, tmp_path / "lora"))
    for loaded in (AutoModelForCausalLM, model_class):
        adapter.assert_same(loaded.from_pretrained(tmp_path / "merged"))


def test_a_live_adapter(qwen: Part, tmp_path: Path) -> None:
    export_lora(qwen.model, tmp_path / "live")
    export_lora(qwen.path, tmp_path / "saved")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("live", "saved")]
    assert files[0] == files[1]
    for base in (qwen.text, qwen.larger):
        qwen.assert_same(qwen.with_lora(base, tmp_path / "live"))
    merge_checkpoint(qwen.model, None, tmp_path / "merged")
    for loaded in (AutoModelForCausalLM, Qwen3_5MoeForConditionalGeneration):
        qwen.assert_same(loaded.from_pretrained(tmp_path / "merged"))


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    adapter = part(Qwen3_5MoeForConditionalGeneration, tmp_path, rows=144)
    export_lora(adapter.path, tmp_path / "lora")
    merge_checkpoint(adapter.path, None, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 144
    for base in (adapter.text, adapter.larger):
        for module in (base.get_input_embeddings(), base.get_output_embeddings()):
            torch.nn.init.zeros_(module.weight)
    for base in (adapter.text, adapter.larger):
        adapter.assert_same(adapter.with_lora(base, tmp_path / "lora"))
    for loaded in (AutoModelForCausalLM, Qwen3_5MoeForConditionalGeneration):
        adapter.assert_same(loaded.from_pretrained(tmp_path / "merged"))


def test_it_is_narrowed_back(qwen: Part, tmp_path: Path) -> None:
    export_lora(qwen.path, tmp_path / "lora")
    narrow_lora(tmp_path / "lora", tmp_path / "narrowed", qwen.model.peft_config["default"].selected_experts)
    qwen.assert_same(PeftModel.from_pretrained(copy.deepcopy(qwen.text), tmp_path / "narrowed"))


def test_a_lora_of_the_larger_model_is_narrowed(qwen: Part, tmp_path: Path) -> None:
    """The task's own class would be that of the text model; the mask tells."""
    larger = copy.deepcopy(qwen.larger)
    larger.name_or_path = str(qwen.base_path)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["o_proj"], target_parameters=stacks, task_type="CAUSAL_LM")
    full = get_peft_model(larger, config).eval()
    randomize_adapters(full)
    full.save_pretrained(tmp_path / "full")
    narrow_lora(
        tmp_path / "full", tmp_path / "narrowed", {layer.path: range(8) for layer in find_moe_layers(qwen.larger)}
    )
    narrowed = PeftModel.from_pretrained(copy.deepcopy(qwen.larger), tmp_path / "narrowed")
    assert relative_difference(qwen.logits(narrowed), qwen.logits(full)) < 1e-4


def test_a_text_model_with_a_checkpoint_of_its_own(qwen: Part, tmp_path: Path) -> None:
    tiny_model(type(qwen.text)).save_pretrained(tmp_path / "base")
    export_lora(qwen.path, tmp_path / "lora", base_model=str(tmp_path / "base"))
    export_lora(qwen.path, tmp_path / "both")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("lora", "both")]
    assert sizes[0] < 0.6 * sizes[1]
    qwen.assert_same(qwen.with_lora(qwen.text, tmp_path / "lora"))


def test_a_warning_where_only_the_text_model_can_load_it(qwen: Part, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="loads on Qwen3_5MoeForCausalLM only, not on Qwen3_5MoeForConditional.*another layout"
    ):
        export_lora(qwen.path, tmp_path / "lora", layout="per_expert")
    qwen.assert_same(qwen.with_lora(qwen.text, tmp_path / "lora"))
    # Its vision tower has experts, too.
    dots = part(Dots3NoteForConditionalGeneration, tmp_path / "dots")
    with pytest.warns(
        UserWarning, match="loads on Dots3NoteForCausalLM only, not on Dots3NoteForConditionalGeneration"
    ):
        export_lora(dots.path, tmp_path / "dots" / "lora")
    dots.assert_same(dots.with_lora(dots.text, tmp_path / "dots" / "lora"))
    merge_checkpoint(dots.path, None, tmp_path / "dots" / "merged")
    for loaded in (AutoModelForCausalLM, Dots3NoteForConditionalGeneration):
        dots.assert_same(loaded.from_pretrained(tmp_path / "dots" / "merged"))
