"""The walk on a few models of each layout, that it can fail, and that it finds models by itself. All of them: `make
architectures`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import peft_sieve.moe.families.family
from peft_sieve.moe.families.fused import FusedExperts
from tests import module_models
from tests.architectures import discovery
from tests.architectures.recount import recounted
from tests.architectures.tiny import inputs_for, tiny_model
from tests.architectures.walk import REMOTE_CODE, ROUNDED, STEPS, YES, Row, table, walk
from tests.models import tiny_model as tiny_text_model
from tests.models import token_batch

# Why each is here: the layout, or what is odd about it.
MODELS = {
    "OlmoeForCausalLM": "fused",
    "GptOssForCausalLM": "fused",  # transposed stacks, gate and up interleaved, biases
    "MuseSparkForConditionalGeneration": "fused",  # a norm after each expert
    "NemotronHForCausalLM": "fused",  # no gate; kernels that read weights
    "JetMoeForCausalLM": "parallel_experts",  # experts in the attention, too
    "SwitchTransformersForConditionalGeneration": "switch_transformers",
    "NllbMoeForConditionalGeneration": "nllb_moe",  # biases; the container holds a dropout beside the experts
    "Step3p7ForConditionalGeneration": "step3p7",
    "LongcatFlashForCausalLM": "longcat_flash",  # and its router is read, not called
    "Llama4ForCausalLM": "llama4",
    "DbrxForCausalLM": "dbrx",
    "ZayaForCausalLM": "zaya",
    "Gemma4ForConditionalGeneration": "fused",  # experts on the decoder layer, inside a multimodal model
    "Ernie4_5_VLMoeForConditionalGeneration": "fused",  # two sets of experts in a block, one list in checkpoints
    "Inkling2ForCausalLM": "fused",  # checkpoints that interleave gate and up
    "DeepseekV4ForCausalLM": "fused",  # a gate of its own, routing by a table
    "Dots3NoteForConditionalGeneration": "fused",  # a vision tower with experts
    "Qwen3OmniMoeTalkerForConditionalGeneration": "fused",  # a dense model of equal names inside
    "MixtralForSequenceClassification": "fused",
}
REFUSED = {
    "LongcatFlashForCausalLM": {"export": "router.*[Ll]eave the router's adapter out"},
    "DbrxForCausalLM": {"export": "in mlp.w1, a single matrix"},
    "DiffusionGemmaForBlockDiffusion": dict.fromkeys(
        ("merge", "checkpoint"), "share their weights.*Keep the adapter unmerged"
    ),
    "VitPoseForPoseEstimation": {"recognise": "chosen by the caller"},
    "DogeForCausalLM": {"recognise": "single rows of two embeddings"},
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
    assert row.passed or name in REFUSED, f"{row.results}\n{row.trace}"


@pytest.mark.parametrize("remote", REMOTE_CODE, ids=lambda c: c.__name__)
def test_experts_in_a_list_go_the_whole_way(remote: Any) -> None:
    row = walk(remote)
    assert row is not None and row.passed and row.model == REMOTE_CODE[remote], f"{row and row.trace}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_these_steps_only(name: str) -> None:
    row = walk(model_class(name))
    assert row is not None and row.refused, f"{row and row.trace}"
    assert {step: re.search(REFUSED[name].get(step, "^$"), row.results[step]) is not None for step in row.failures} == (
        dict.fromkeys(REFUSED[name], True)
    )


def test_a_wrong_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(self: FusedExperts, experts: Any, parent: nn.Module, on_dispatch: Any) -> list[Any]:
        def hook(module: nn.Module, args: Any) -> None:
            on_dispatch(args[1].roll(1, 0).clamp(max=2), args[2])

        return [experts.register_forward_pre_hook(hook)]

    monkeypatch.setattr(FusedExperts, "watch", watch)
    row = walk(transformers.OlmoeForCausalLM)
    assert row is not None and not row.passed and "received" in row.results["profile"]


def test_an_unknown_layout_is_a_row_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_sieve.moe.families.registry, "_FAMILIES", [])
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


def test_a_recount_leaves_out_what_a_container_holds_beside_its_experts() -> None:
    model = module_models.nllb_moe()
    path = "model.encoder.layers.1.ffn.experts"
    rows = []
    expert = model.get_submodule(path).expert_0
    expert.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    with torch.no_grad(), recounted(model, {path: 8}) as counts:
        model(**inputs_for(model))
    # One of the mask's columns holds the expert of a token; the zeros of all others are taken for the id 0.
    assert rows == [32 * 7] and counts[path].tolist() == [32 * 7, 32, 0, 0, 0, 0, 0, 0]


def test_models_are_found_without_a_list() -> None:
    folders = discovery.folders_with_experts()
    decorated = {
        path.parent.name
        for path in discovery.MODELS.glob("*/modeling_*.py")
        if re.search("^@use_experts_implementation", path.read_text(), re.MULTILINE)
    }
    others = {
        *("dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"),
        "vitpose_backbone",
    }
    assert len(decorated) > 50 and decorated | others == folders
    assert not folders & {"llama", "bamba", "gemma3"}
    assert discovery.contains_experts("kimi_k25")  # a text model of another folder inside
    assert not discovery.contains_experts("llava")


def test_every_one_of_them_is_walked() -> None:
    folders = {c.__module__.split(".")[-2] for c in discovery.model_classes()}
    # vitpose contains the backbone, which has no head.
    assert discovery.folders_with_experts() - folders == {"vitpose_backbone"}
    assert {"kimi_k25", "vitpose"} <= folders


def test_a_tiny_model_is_random_and_the_same_each_time() -> None:
    one, two = (tiny_model(transformers.Step3p7ForConditionalGeneration) for _ in range(2))
    assert sum(p.numel() for p in one.parameters()) < 1_000_000
    batch = inputs_for(one)
    with torch.no_grad():
        assert torch.equal(one(**batch).logits, two(**batch).logits)


def test_the_page() -> None:
    passed = Row("AForCausalLM", ["fused"], 2, dict.fromkeys(STEPS, YES) | {"inject": ROUNDED})
    refused = [
        Row(
            f"{name}ForCausalLM",
            results={"recognise": f"The model {name}ForCausalLM has no layer"},
            refusals=["recognise"],
        )
        for name in "BC"
    ]
    tied = {step: YES for step in STEPS if step != "unmerge"} | {"merge": "tied " * 40}
    late = Row("DForCausalLM", ["fused"], 1, tied, refusals=["merge"])
    failed = Row("EForCausalLM", ["fused"], 1, dict.fromkeys(STEPS, YES) | {"export": "KeyError"}, refusals=["merge"])
    assert passed.passed and not any(row.passed for row in (*refused, late, failed))
    assert all(row.refused for row in (*refused, late)) and not failed.refused and not passed.refused
    page = table([passed, *refused, late, failed])
    assert "1 of 5 pass" in page
    assert "| AForCausalLM | fused | 2 | yes | ~ | yes | yes | yes | yes | yes | yes |" in page
    assert "| BForCausalLM |  |  | (1) |  |  |  |  |  |  |  |" in page
    assert "| CForCausalLM |  |  | (1) |  |  |  |  |  |  |  |" in page
    assert "| DForCausalLM | fused | 1 | yes | yes | yes | yes | (2) |  | yes | yes |" in page
    notes = page[page.index("1. ") :].splitlines()
    assert notes[0] == "1. The model has no layer" and notes[1].startswith("2. tied") and notes[2].startswith("   tied")
    assert notes[-1] == "3. KeyError" and max(map(len, notes)) <= 128
