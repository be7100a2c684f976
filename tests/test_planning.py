"""What `plan_training` counts, against adapters that are really made, and against the paper's counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from transformers import OlmoeConfig

from peft_sieve import RoutingProfile, SieveError, SieveLoraConfig, select_experts
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.planning import plan_training, size_text
from tests.models import TINY_OLMOE, tiny_model
from tests.paper_models import OLMOE, QWEN


@pytest.mark.parametrize(
    ("config", "hot", "full"),
    [(OLMOE, 84_967_424, 311_459_840), (QWEN, 151_335_936, 509_654_016)],
    ids=["OLMoE-1B-7B", "Qwen1.5-MoE-A2.7B"],
)
def test_the_papers_counts_from_a_config_file(config: OlmoeConfig, hot: int, full: int, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    plan = plan_training(tmp_path, top_k_frac=[0.25])
    assert [option.trainable_parameters for option in plan.options] == [hot, full]
    assert plan.options[0].adapter_bytes == pytest.approx(4 * hot, rel=1e-4)
    assert plan.options[0].optimizer_bytes == 8 * hot
    assert plan.options[0].gradient_bytes == 4 * hot


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "jamba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_counts_and_sizes_of_real_adapters(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A real adapter, made, saved and measured."""
    settings = {"r": 4, "train_shared_experts": False, "expert_projections": ["up_proj", "down_proj"]}
    plan = plan_training(tiny_model(name, dtype), top_k=[3], config=SieveLoraConfig(**settings))
    three, _ = plan.options
    base = tiny_model(name, dtype)
    assert plan.model_parameters == sum(parameter.numel() for parameter in base.parameters())
    mask = {layer.path: [1, 2, 5] for layer in find_moe_layers(base)}
    assert three.experts == dict.fromkeys(mask, 3)
    model = get_peft_model(base, SieveLoraConfig(selected_experts=mask, **settings))
    assert three.trainable_parameters == model.get_nb_trainable_parameters()[0]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert three.gradient_bytes == sum(p.numel() * p.element_size() for p in trainable)
    optimizer = torch.optim.AdamW(trainable)
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert three.optimizer_bytes == sum(state.numel() * state.element_size() for state in states)
    model.save_pretrained(tmp_path)
    file = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert three.adapter_bytes == len(file) - header


@pytest.mark.parametrize(
    "options",
    [
        {"cold_experts": "shared"},
        {"share_outer": True},
        {"cold_experts": "shared", "share_outer": True},
        {"share_outer": True, "expert_projections": ["gate_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
        {"hellori_density": 0.5, "cold_experts": "shared"},
        {"expert_tuning": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_sizes_of_what_experts_share(name: str, options: dict[str, Any]) -> None:
    """Each size exactly, up to all experts, of which none is cold."""
    plan = plan_training(tiny_model(name), top_k=[1, 3, 7], config=SieveLoraConfig(r=4, **options))
    assert [next(iter(option.experts.values())) for option in plan.options] == [1, 3, 7, 8]
    for option in plan.options:
        base = tiny_model(name)
        mask = {layer.path: range(option.experts[layer.path]) for layer in find_moe_layers(base)}
        model = get_peft_model(base, SieveLoraConfig(r=4, selected_experts=mask, **options))
        assert option.trainable_parameters == model.get_nb_trainable_parameters()[0]
        saved = get_peft_model_state_dict(model).values()
        assert option.adapter_bytes == sum(tensor.nbytes for tensor in saved)
        assert option.gradient_bytes == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert (plan.cold_experts, plan.share_outer) == (
        options.get("cold_experts", "frozen"),
        options.get("share_outer", False),
    )


def test_rising_and_each_size_once() -> None:
    plan = plan_training(TINY_OLMOE, top_k=[8, 4, 8], top_k_frac=[0.25, 0.5])
    assert [set(option.experts.values()) for option in plan.options] == [{4}, {8}, {16}, {32}]
    assert [row[0] for row in plan.to_table().rows] == ["4 of 32", "8 of 32", "16 of 32", "32 of 32"]
    assert json.loads(json.dumps(plan.to_dict()))["options"][1]["experts"]["model.layers.0.mlp.experts"] == 8
    assert "<table>" in plan._repr_html_()
    # Mixtral's 8 experts: 1/16 and 1/8 are both 1.
    few = plan_training(tiny_model("mixtral"))
    assert [next(iter(option.experts.values())) for option in few.options] == [1, 2, 4, 8]


def profile_of_tiny() -> RoutingProfile:
    generator = torch.Generator().manual_seed(0)
    counts = {f"model.layers.{i}.mlp.experts": torch.randint(1, 100, (32,), generator=generator) for i in range(6)}
    counts["model.layers.2.mlp.experts"].zero_()
    return RoutingProfile(counts=counts)


@pytest.mark.filterwarnings("ignore:no token reached")
def test_coverage_and_a_layer_without_tokens() -> None:
    profile = profile_of_tiny()
    plan = plan_training(TINY_OLMOE, top_k=[4], profile=profile)
    four, every = plan.options
    selection = select_experts(profile, top_k=4)
    shares = [share for layer, share in selection.coverage(profile).items() if selection[layer]]
    assert len(shares) == 5
    assert four.coverage == pytest.approx(sum(shares) / 5)
    assert four.lowest_coverage == pytest.approx(min(shares))
    assert every.coverage == every.lowest_coverage == 1.0
    assert four.experts["model.layers.2.mlp.experts"] == 0
    # As calibration: the layer is left out of the mask.
    mask = {layer: list(ids) for layer, ids in selection.items() if ids}
    model = get_peft_model(plan_model(), SieveLoraConfig(selected_experts=mask))
    assert four.trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert plan.to_table().header[-2:] == ["coverage", "lowest layer"]


@pytest.mark.filterwarnings("ignore:no token reached")
def test_a_layer_without_tokens_has_what_its_experts_share() -> None:
    profile, shared = profile_of_tiny(), {"cold_experts": "shared", "share_outer": True}
    four, _ = plan_training(TINY_OLMOE, top_k=[4], profile=profile, config=SieveLoraConfig(**shared)).options
    mask = select_experts(profile, top_k=4).to_dict()
    assert mask["model.layers.2.mlp.experts"] == []
    model = get_peft_model(plan_model(), SieveLoraConfig(selected_experts=mask, **shared))
    assert four.trainable_parameters == model.get_nb_trainable_parameters()[0]


def plan_model() -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY_OLMOE))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"top_k": [33]}, "top_k must be whole numbers from 1 to 32, .* got 33"),
        ({"top_k": [0]}, "top_k must be .* got 0"),
        ({"top_k_frac": [1.5]}, "top_k_frac must be .* got 1.5"),
        ({"profile": RoutingProfile.from_arrays([[1, 2]])}, "differs from the model in .*'model.layers.0.mlp.experts'"),
    ],
)
def test_what_cannot_be_planned(arguments: dict, text: str) -> None:
    with pytest.raises(SieveError, match=text):
        plan_training(TINY_OLMOE, **arguments)


def test_the_configuration_is_left_as_it_was() -> None:
    config = SieveLoraConfig(r=2)
    before = config.to_dict()
    plan_training(TINY_OLMOE, config=config)
    assert config.to_dict() == before


def test_sizes_in_words() -> None:
    sizes = [0, 999, 1000, 7_400_000, 13_880_000, 999_900_000, 2.4e9, 3e15]
    texts = ["0 B", "999 B", "1.00 kB", "7.40 MB", "13.9 MB", "1000 MB", "2.40 GB", "3000 TB"]
    assert [size_text(int(size)) for size in sizes] == texts
