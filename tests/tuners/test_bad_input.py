"""Every error a user can cause: plain sentences, before anything is changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_sieve import MoEFamily, SieveError, SieveLoraConfig, register_moe_family
from peft_sieve.moe.families.fused import FusedExperts
from tests.models import randomize_adapters, tiny_model, token_batch
from tests.tuners.errors import assert_plain

PATH = "model.layers.0.mlp.experts"


def refused(model: nn.Module, config: Any, match: str) -> None:
    """`get_peft_model` raises, and the model is what it was."""
    batch = token_batch(model)
    with torch.no_grad():
        before = model(**batch).logits
    names = [name for name, _ in model.named_modules()]
    requires_grad = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SieveError, match=match) as caught:
        get_peft_model(model, config() if callable(config) else config)
    assert_plain(str(caught.value))
    assert [name for name, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert not hasattr(model, "peft_config")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k_frac": 0.0}, "top_k_frac"),
        ({"top_k_frac": 1.2}, "top_k_frac"),
        ({"top_k_frac": float("nan")}, "top_k_frac"),
        ({"top_k_frac": "0.5"}, "top_k_frac"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"strategy": "unifrom"}, "unifrom.*uniform"),
        ({"score": "weight"}, "count.*mass.*weight"),
        ({"coverage": 1.5}, "coverage"),
        ({"calib_stability": 0}, r"calib_stability .*above 0 and at most 1.* 0\b"),
        ({"calib_stability": 1.5}, r"calib_stability .*1\.5"),
        ({"calib_stability": True}, "calib_stability .*True"),
        ({"calib_stability": "0.7"}, r"calib_stability .*'0\.7'"),
        ({"expert_projections": ["gate"]}, "expert_projections.*gate_proj.*up_proj.*down_proj.*'gate'"),
        ({"expert_projections": []}, r"expert_projections.*\[\]"),
        ({"r": 0}, r"^r .* 0\b"),
        ({"r": 2.5}, r"^r .* 2\.5"),
        ({"lora_alpha": 0}, r"lora_alpha .* 0\b"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] .* 0\b"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern\['q_proj'\] .* 2\.5"),
        ({"alpha_pattern": {"q_proj": "8"}}, r"alpha_pattern\['q_proj'\] .* '8'"),
        ({"lora_dropout": 1.5}, r"lora_dropout .*1\.5"),
        ({"calib_samples": 0}, r"calib_samples .* 0\b"),
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"layer_replication": [(0, 2)]}, "layer_replication"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "eva"}, "eva"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "mica"}, "mica"),
        ({"init_lora_weights": "orthogonal"}, "orthogonal"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": 1}, r"init_lora_weights .*\b1\b"),
        ({"selected_experts": [1, 2]}, r"selected_experts .*mapping.*\[1, 2\]"),
        ({"selected_experts": {}}, "selected_experts .*expert"),
        ({"selected_experts": {PATH: []}}, "selected_experts .*expert"),
        ({"selected_experts": {PATH: "12"}}, f"{PATH}.*list of expert ids.*'12'"),
        ({"selected_experts": {PATH: [1, -2]}}, f"{PATH}.*negative.* -2"),
        ({"selected_experts": {PATH: [1, 1]}}, rf"{PATH}.*\[1\] more than once"),
        ({"selected_experts": {PATH: [1.5]}}, rf"{PATH}.*whole numbers.*1\.5"),
        ({"selected_experts": {PATH: [True]}}, f"{PATH}.*whole numbers.*True"),
        ({"selected_experts": {3: [1]}}, r"selected_experts .*\b3\b.*path"),
        ({"calibration": "yes"}, "calibration .*'yes'"),
        ({"expert_shapes": {PATH: [1]}}, rf"expert_shapes .*{PATH}.*\[1\]"),
    ],
)
def test_options(options: dict[str, Any], match: str) -> None:
    """Refused by the configuration itself, so nothing else was touched."""
    with pytest.raises(SieveError, match=match) as caught:
        SieveLoraConfig(**options)
    assert isinstance(caught.value, ValueError)
    assert_plain(str(caught.value))


def data(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [token_batch(model)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "calib_dataset.*selected_experts"),
        ({"calib_dataset": []}, "empty"),
        ({"calib_dataset": ["", "  "], "calib_tokenizer": None}, "."),
        ({"calib_dataset": 5}, "int"),
        ({"selected_experts": {"model.layers.9.mlp.experts": [1]}}, "model.layers.9.mlp.experts.*does not have"),
        ({"selected_experts": {PATH: [8]}}, rf"{PATH}.*\bid 8\b"),
        (
            {"selected_experts": {PATH: [1]}, "expert_shapes": {PATH: [16, 32, 24]}},
            rf"experts 16.*{PATH}.*experts 8",
        ),
        (
            {"selected_experts": {PATH: [1]}, "expert_shapes": {PATH: [8, 64, 24]}},
            rf"hidden size 64.*{PATH}.*hidden size 32",
        ),
        ({"selected_experts": {PATH: [1]}, "target_parameters": ["mlp.foo"]}, "target_parameters.*mlp.foo"),
        ({"selected_experts": {PATH: [1]}, "target_parameters": ["q_norm.weight"]}, "target_parameters.*q_norm.weight"),
        (
            {"selected_experts": {PATH: [1]}, "target_parameters": ["mlp.experts.down_proj"]},
            "target_parameters.*mlp.experts.down_proj",
        ),
    ],
)
def test_masks_and_data(options: dict[str, Any], match: str) -> None:
    refused(tiny_model("olmoe"), lambda: SieveLoraConfig(task_type="CAUSAL_LM", **options), match)


def test_more_experts_than_there_are() -> None:
    model = tiny_model("olmoe")
    refused(model, SieveLoraConfig(top_k=9, calib_dataset=data(model)), r"top_k.*\b8\b.*\b9\b")


def test_a_model_without_moe_layers() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    model = AutoModelForCausalLM.from_config(config)
    refused(model, SieveLoraConfig(calib_dataset=data(model)), "LlamaForCausalLM.* no .*Mixture-of-Experts layer")


def test_no_layer_left() -> None:
    model = tiny_model("olmoe")
    refused(
        model,
        SieveLoraConfig(calib_dataset=data(model), layers_to_transform=[7]),
        r"layers_to_transform=\[7\].* none of the 2 MoE layers",
    )


def test_quantised_experts() -> None:
    model = tiny_model("olmoe")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(SieveError, match="layers.1.mlp.experts .*torch.float8_e4m3fn"):
        get_peft_model(model, SieveLoraConfig(calib_dataset=data(model)))
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


def test_a_family_without_an_adapter_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(MoEFamily):
        name = "odd"
        matches, shape, expert_weight, watch, parameter_names = (
            getattr(FusedExperts(), n) for n in ("matches", "shape", "expert_weight", "watch", "parameter_names")
        )

    monkeypatch.setattr("peft_sieve.moe.families.registry._FAMILIES", [])
    register_moe_family(Odd())
    model = tiny_model("olmoe")
    refused(model, SieveLoraConfig(calib_dataset=data(model)), "family 'odd'.*layer_class.*None")


def test_expert_parallel_experts() -> None:
    model = tiny_model("olmoe")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(SieveError, match="layers.0.mlp.experts .*expert parallelism"):
        get_peft_model(model, SieveLoraConfig(calib_dataset=data(model)))


def test_parameters_sharded_by_zero3() -> None:
    model = tiny_model("olmoe")
    model.lm_head.weight.ds_id = 0  # what DeepSpeed's stage 3 leaves on every parameter
    with pytest.raises(SieveError, match="ZeRO-3.*selected_experts"):
        get_peft_model(model, SieveLoraConfig(calib_dataset=data(model)))
    get_peft_model(model, SieveLoraConfig(selected_experts={PATH: [1]}))


def test_a_layer_without_tokens_is_named_and_left_alone() -> None:
    """A router that never gets tokens: its block is bypassed."""
    model = tiny_model("olmoe")
    block = model.model.layers[1].mlp
    block.forward = lambda hidden_states: hidden_states
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.mlp\.experts"):
        peft_model = get_peft_model(model, SieveLoraConfig(calib_dataset=data(model), task_type="CAUSAL_LM"))
    assert list(peft_model.peft_config["default"].selected_experts) == [PATH]
    trainable = [n for n, p in peft_model.named_parameters() if p.requires_grad and ".mlp." in n]
    assert trainable
    assert not any("layers.1.mlp" in name for name in trainable)


def test_a_failed_second_adapter_leaves_the_first() -> None:
    model = tiny_model("olmoe")
    batch = token_batch(model)
    peft_model = get_peft_model(model, SieveLoraConfig(r=4, calib_dataset=[batch], task_type="CAUSAL_LM")).eval()
    randomize_adapters(peft_model)
    with torch.no_grad():
        before = peft_model(**batch).logits
    for config in (SieveLoraConfig(), SieveLoraConfig(selected_experts={PATH: [8]})):
        with pytest.raises(SieveError):
            peft_model.add_adapter("second", config)
        assert list(peft_model.peft_config) == ["default"]
        with torch.no_grad():
            assert torch.equal(peft_model(**batch).logits, before)
    peft_model.add_adapter("second", SieveLoraConfig(r=4, calib_dataset=[batch], task_type="CAUSAL_LM"))
    assert isinstance(peft_model, PeftModel)


def test_transformers_add_adapter_recovers() -> None:
    model = tiny_model("olmoe")
    with pytest.raises(SieveError, match="calib_dataset.*selected_experts"):
        model.add_adapter(SieveLoraConfig())
    model.add_adapter(SieveLoraConfig(r=4, calib_dataset=data(model)))
    assert model.active_adapters() == ["default"]


def test_good_input_warns_of_nothing() -> None:
    model = tiny_model("olmoe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's own, with transformers 5.23
        get_peft_model(model, SieveLoraConfig(r=4, calib_dataset=data(model), task_type="CAUSAL_LM"))
