"""The walk on a few models of each layout, that it can fail, and that it finds models by itself. All of them: `make
architectures`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import peft_sieve.moe.families
from peft_sieve.moe.families import FusedExperts
from tests.architectures import discovery
from tests.architectures.recount import recounted
from tests.architectures.tiny import inputs_for, tiny_model
from tests.architectures.walk import ROUNDED, STEPS, YES, Row, table, walk
from tests.models import tiny_model as tiny_text_model
from tests.models import token_batch

# Why each is here: the layout, or what is odd about it.
MODELS = {
    "Step3p7ForConditionalGeneration": "step3p7",
    "LongcatFlashForCausalLM": "longcat_flash",  # and its router is read, not called
    "Llama4ForCausalLM": "llama4",
    "DbrxForCausalLM": "dbrx",
    "ZayaForCausalLM": "zaya",
    "Gemma4ForConditionalGeneration": "fused",  # experts on the decoder layer, inside a multimodal model
    "Ernie4_5_VLMoeForConditionalGeneration": "fused",  # two sets of experts in a block
    "DeepseekV4ForCausalLM": "fused",  # a gate of its own, routing by a table
    "Dots3NoteForConditionalGeneration": "fused",  # a vision tower with experts
    "Qwen3OmniMoeTalkerForConditionalGeneration": "fused",  # a dense model of equal names inside
    "MixtralForSequenceClassification": "fused",
}


def model_class(name: str) -> Any:
    if (found := getattr(transformers, name, None)) is not None:
        return found
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe

    return getattr(modeling_qwen3_omni_moe, name)


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_way(name: str) -> None:
    row = walk(model_class(name))
    assert row is not None and row.layouts == [MODELS[name]] and row.layers > 0
    assert row.passed or (row.refused and list(row.results) == list(STEPS)), f"{row.results}\n{row.trace}"


def test_experts_that_share_weights_are_refused_only_where_they_would_be_merged() -> None:
    row = walk(transformers.DiffusionGemmaForBlockDiffusion)
    assert row is not None and row.refused and list(row.results)[-1] == "merge"
    assert "share their weights" in row.results["merge"] and "keep the adapter unmerged" in row.results["merge"]


def test_a_model_that_routes_by_data_set_is_refused() -> None:
    row = walk(transformers.VitPoseForPoseEstimation)
    assert row is not None and row.refused and "register_moe_family" in row.results["recognise"]


def test_a_wrong_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(self: FusedExperts, experts: Any, parent: nn.Module, on_dispatch: Any) -> list[Any]:
        def hook(module: nn.Module, args: Any) -> None:
            on_dispatch(args[1].roll(1, 0).clamp(max=2), args[2])

        return [experts.register_forward_pre_hook(hook)]

    monkeypatch.setattr(FusedExperts, "watch", watch)
    row = walk(transformers.OlmoeForCausalLM)
    assert row is not None and not row.passed and "received" in row.results["profile"]


def test_an_unknown_layout_is_a_row_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_sieve.moe.families, "_FAMILIES", [])
    row = walk(transformers.OlmoeForCausalLM)
    assert row is not None and row.refused and "register_moe_family" in row.results["recognise"]


def test_a_recount_is_what_the_experts_were_called_with() -> None:
    model = tiny_text_model("olmoe")
    received: list[torch.Tensor] = []
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: received.append(args[1]))
    with torch.no_grad(), recounted(model, {"model.layers.1.mlp.experts": 8}) as counts:
        model(**token_batch(model))
    assert torch.equal(counts["model.layers.1.mlp.experts"], received[0].flatten().bincount(minlength=8))
    assert "forward" not in vars(experts)


def test_models_are_found_without_a_list() -> None:
    folders = discovery.folders_with_experts()
    decorated = {
        path.parent.name for path in discovery.MODELS.glob("*/modeling_*.py") if "experts_impl" in path.read_text()
    }
    assert len(decorated) > 50 and decorated <= folders
    assert {
        "dbrx",
        "llama4",
        "longcat_flash",
        "jetmoe",
        "switch_transformers",
        "nllb_moe",
        "doge",
        "step3p7",
    } <= folders
    assert not folders & {"llama", "bamba", "gemma3"}
    assert discovery.contains_experts("kimi_k25")  # a text model of another folder inside
    assert not discovery.contains_experts("llava")


def test_a_tiny_model_is_random_and_the_same_each_time() -> None:
    one, two = (tiny_model(transformers.Step3p7ForConditionalGeneration) for _ in range(2))
    assert sum(p.numel() for p in one.parameters()) < 1_000_000
    batch = inputs_for(one)
    with torch.no_grad():
        assert torch.equal(one(**batch).logits, two(**batch).logits)


def test_the_page() -> None:
    passed = Row("AForCausalLM", ["fused"], 2, dict.fromkeys(STEPS, YES) | {"inject": ROUNDED})
    refused = Row("BForCausalLM", [], 0, {"recognise": "no layer"}, refused=True)
    late = Row("CForCausalLM", ["fused"], 1, dict.fromkeys(STEPS[:5], YES) | {"merge": "tied"}, refused=True)
    assert passed.passed and not refused.passed and not late.passed
    page = table([passed, refused, late])
    assert "1 of 3 pass" in page
    assert "| AForCausalLM | fused | 2 | yes | ~ | yes | yes | yes | yes |" in page
    assert "| BForCausalLM |  |  | (1) |  |  |  |  |  |" in page
    assert "| CForCausalLM | fused | 1 | yes | yes | yes | yes | (2) |  |" in page
    assert page.endswith("1. no layer\n2. tied\n")
