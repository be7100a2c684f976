"""Finding MoE layers, routers, shared experts and attention; the oddities that the rules answer to."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_sieve import SieveError
from peft_sieve.moe.attention import attention_linears
from peft_sieve.moe.topology import Router, find_moe_layers
from tests.deepseek_like import deepseek_like
from tests.models import small_olmoe, tiny_model


def test_a_fused_model_with_shared_experts() -> None:
    (first, _) = find_moe_layers(tiny_model("qwen2_moe"))
    assert first.path == "model.layers.0.mlp.experts"
    assert first.shape.projections == {"gate_proj": (32, 24), "up_proj": (32, 24), "down_proj": (24, 32)}
    assert (first.num_experts, first.shape.hidden_size, first.shape.intermediate_size) == (8, 32, 24)
    assert first.routers == (Router("model.layers.0.mlp.gate", "weight"),)
    assert [p.rpartition(".mlp.")[2] for p in first.shared_linears] == [
        f"shared_expert.{name}_proj" for name in ("gate", "up", "down")
    ]


def test_a_module_list_and_a_dense_layer() -> None:
    layers = find_moe_layers(deepseek_like())
    assert [layer.path for layer in layers] == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert layers[0].num_experts == 8
    assert layers[0].routers == (Router("model.layers.1.mlp.gate", "weight"),)
    assert len(attention_linears(deepseek_like(), layers)) == 12  # of the dense layer too


def test_transposed_and_ungated_experts() -> None:
    assert find_moe_layers(tiny_model("gpt_oss"))[0].shape.projections["down_proj"] == (24, 32)
    assert list(find_moe_layers(tiny_model("nemotron_h"))[0].shape.projections) == ["up_proj", "down_proj"]


def test_adapters_are_looked_through() -> None:
    model = small_olmoe()
    before = [(layer.path, layer.routers, layer.shared_linears) for layer in find_moe_layers(model)]
    linears = attention_linears(model, find_moe_layers(model))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]))
    layers = find_moe_layers(model)
    assert [(layer.path, layer.routers, layer.shared_linears) for layer in layers] == before
    assert attention_linears(model, layers) == linears


def test_linear_layers_with_a_forward_of_their_own_are_not_taken_for_linear() -> None:
    """phimoe's router is a subclass of nn.Linear that returns a tuple: its weight is adapted as a parameter."""
    (first, _) = find_moe_layers(tiny_model("phimoe"))
    assert first.routers == (Router("model.layers.0.mlp.router", "weight"),)


def test_an_indexer_inside_attention_is_left_alone() -> None:
    model = tiny_model("olmoe")
    model.model.layers[0].self_attn.indexer = nn.ModuleDict({"wq_b": nn.Linear(4, 4)})
    model.model.layers[0].self_attn.extra = nn.Linear(4, 4)
    found = attention_linears(model, find_moe_layers(model))
    assert "model.layers.0.self_attn.extra" in found
    assert not any("indexer" in path for path in found)


def test_a_vision_tower_is_another_stack() -> None:
    model = tiny_model("olmoe")
    tower = nn.Module()
    tower.layers = nn.ModuleList([nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})])
    model.vision = tower
    found = attention_linears(model, find_moe_layers(model))
    assert len(found) == 8
    assert not any(path.startswith("vision.") for path in found)


def test_expert_weights_are_views_of_the_stack() -> None:
    for name in ("olmoe", "gpt_oss", "nemotron_h"):
        layer = find_moe_layers(tiny_model(name))[0]
        for projection, (in_features, out_features) in layer.shape.projections.items():
            weight = layer.family.expert_weight(layer.experts, projection, 3)
            assert weight.shape == (out_features, in_features)
            before = [p.detach().clone() for p in layer.experts.parameters()]
            weight.add_(1)
            changed = sum(int((a != b).sum()) for a, b in zip(before, layer.experts.parameters(), strict=True))
            assert changed == weight.numel()


def test_no_moe_layer() -> None:
    with pytest.raises(SieveError, match="Linear has no Mixture-of-Experts layer.*register_moe_family"):
        find_moe_layers(torch.nn.Linear(2, 2))
