"""The warm-up of HELLoRA: what it counts, that it trains, and that it leaves no trace."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sieve import (
    EpngConfig,
    RoutingProfile,
    SieveError,
    SieveLoraConfig,
    hellora_config,
    profile_routing,
    select_experts,
    warm_up_profile,
)
from peft_sieve.moe.topology import find_moe_layers
from tests.models import tiny_model


def rows(count: int = 40) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [4 + i % 7 for i in range(count)]
    return [{"input_ids": torch.randint(3, 128, (n,), generator=generator).tolist()} for n in lengths]


def warm_up(model: nn.Module, data: Any = None, **options: Any) -> RoutingProfile:
    fixed = {"config": SieveLoraConfig(r=4, lora_dropout=0.1), "batch_size": 1, "progress": False}
    return warm_up_profile(model, rows() if data is None else data, **{**fixed, **options})


def test_a_tenth_of_the_samples_is_counted_token_by_token() -> None:
    """Against hooks on the routers, which see every forward of the training."""
    model = tiny_model("olmoe")
    seen: dict[str, torch.Tensor] = {}

    def count(path: str, router: nn.Module, args: Any, output: Any) -> None:
        seen[path] = seen.get(path, 0) + torch.bincount(output[2].flatten(), minlength=8)

    for layer in find_moe_layers(model):
        block = model.get_submodule(layer.path.rpartition(".")[0])
        block.gate.register_forward_hook(partial(count, layer.path))
    profile = warm_up(model)
    assert profile.num_samples == 4 and profile.metadata["warm_up"]["steps"] == 4
    assert set(seen) == set(profile.counts)
    for path, counts in seen.items():
        assert torch.equal(profile.counts[path], counts), path
        assert counts.sum() == 3 * profile.num_tokens
        assert profile.sample_share[path].sum() == pytest.approx(1)


def test_it_counts_while_lora_learns_and_not_what_the_base_does() -> None:
    """With many steps the routing moves away from the plain forward's on the same samples."""
    model = tiny_model("olmoe")
    data = rows(60)
    profile = warm_up(model, data, fraction=1.0, learning_rate=2e-2)
    assert profile.metadata["warm_up"]["last_loss"] < profile.metadata["warm_up"]["first_loss"]
    plain = profile_routing(model, data, progress=False)
    assert profile.num_tokens == plain.num_tokens
    assert any(not torch.equal(profile.counts[path], plain.counts[path]) for path in plain.counts)
    nearly_frozen = warm_up(model, data, fraction=1.0, learning_rate=1e-12)
    for path in plain.counts:
        assert torch.equal(nearly_frozen.counts[path], plain.counts[path])


def test_all_experts_warm_up_so_that_none_is_left_to_share_an_adapter() -> None:
    """Outer factors are one per layer then, too."""
    model = tiny_model("olmoe")
    options = {"r": 4, "lora_dropout": 0.0}
    given = [{}, {"cold_experts": "shared"}, {"share_outer": True}, {"cold_experts": "shared", "share_outer": True}]
    plain, cold, outer, both = (
        warm_up(model, config=SieveLoraConfig(**options, **settings), learning_rate=2e-2) for settings in given
    )
    assert plain == cold and outer == both and plain != outer


def test_padding_has_no_loss_and_does_not_count() -> None:
    model = tiny_model("olmoe")
    alone = warm_up(model, rows()[:2], fraction=1.0, batch_size=1, learning_rate=1e-12)
    padded = warm_up(model, rows()[:2], fraction=1.0, batch_size=2, learning_rate=1e-12)
    for path in alone.counts:
        assert torch.equal(alone.counts[path], padded.counts[path])
    ids = [torch.tensor(row["input_ids"]) for row in rows()[:2]]
    with torch.no_grad():
        losses = [model(input_ids=i[None], labels=i[None]).loss.item() * (len(i) - 1) for i in ids]
    expected = sum(losses) / sum(len(i) - 1 for i in ids)
    assert padded.metadata["warm_up"]["first_loss"] == pytest.approx(expected, rel=1e-4)


def test_it_leaves_no_trace() -> None:
    model = tiny_model("olmoe").train()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(11)
    random.seed(11)
    states = torch.get_rng_state(), random.getstate()
    first = warm_up(model)

    def check() -> None:
        assert model.state_dict().keys() == before.keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == trainable
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        assert not hasattr(model, "peft_config")
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    check()
    assert warm_up(model) == first, "deterministic for a seed"
    check()
    with pytest.raises(SieveError, match=r"token id 16384.*\b128\b"):
        warm_up(model, [{"input_ids": [5, 6, 128 * 128]}])
    check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, r"fraction\b.*\b0\b"),
        ({"learning_rate": -1.0}, r"learning_rate\b.*-1\.0"),
        ({"config": 3}, r"SieveLoraConfig.*\b3\b|\b3\b.*SieveLoraConfig"),
        ({"config": EpngConfig()}, "EpngConfig.*SieveLoraConfig|SieveLoraConfig.*EpngConfig"),
        ({"config": SieveLoraConfig(expert_tuning="full")}, "SieveLoraConfig.*expert_tuning='lora'"),
        ({"config": SieveLoraConfig(selected_experts={"a": [1]})}, "SieveLoraConfig.*without selected_experts"),
        ({"data": iter(rows())}, "iterator.*data of known size|known size.*iterator"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SieveError, match=message) as caught:
        warm_up(tiny_model("olmoe"), **options)
    assert "\n" not in str(caught.value)


def test_a_model_with_an_adapter_is_refused() -> None:
    model = tiny_model("olmoe")
    adapted = get_peft_model(model, SieveLoraConfig(selected_experts={"model.layers.0.mlp.experts": [1]}))
    for given in (adapted, model):
        with pytest.raises(SieveError, match="has an adapter already|already has an adapter"):
            warm_up(given)


def test_the_preset_takes_the_routers_top_k(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    profile = warm_up(model)
    config = hellora_config(profile, r=4, task_type="CAUSAL_LM")
    assert config.selected_experts == select_experts(profile, top_k=3).to_dict()
    assert config.calibration["samples"] == 4 and config.calibration["warm_up"]["fraction"] == 0.1
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert SieveLoraConfig.from_pretrained(tmp_path).calibration == config.calibration
    assert hellora_config(profile, top_k=2).selected_experts == select_experts(profile, top_k=2).to_dict()
    assert hellora_config(profile, top_k_frac=0.5).selected_experts == select_experts(profile, top_k=4).to_dict()

    plain = RoutingProfile.from_arrays([[3, 1, 2]])
    with pytest.raises(SieveError, match="num_experts_per_tok.*top_k"):
        hellora_config(plain)
    assert hellora_config(plain, top_k=2).selected_experts == {"layers.0": [0, 2]}
    # As in calibration: experts of a layer that no token reached share an adapter, or have none.
    reached = RoutingProfile.from_arrays([[3, 1], [0, 0]])
    for cold, mask in (("frozen", {"layers.0": [0]}), ("shared", {"layers.0": [0], "layers.1": []})):
        assert hellora_config(reached, top_k=1, cold_experts=cold).selected_experts == mask
    with pytest.raises(SieveError, match="hellora_config .*calib_dataset"):
        hellora_config(profile, calib_dataset=rows())


@pytest.mark.filterwarnings("ignore:No token reached")
def test_options_of_the_preset_that_have_experts_share_factors() -> None:
    """A layer that no token reached has only cold experts, as after a calibration."""
    profile = RoutingProfile.from_arrays([[0, 0, 0], [3, 1, 2]], num_experts_per_tok=2)
    assert hellora_config(profile).selected_experts == {"layers.1": [0, 2]}
    shared = hellora_config(profile, cold_experts="shared", share_outer=True)
    assert shared.selected_experts == {"layers.0": [], "layers.1": [0, 2]} and shared.share_outer
    assert hellora_config(profile, cold_experts="shared", hellori=True).hellori_density == 0.1
    with pytest.raises(SieveError, match="hellori_density .*share_outer=True"):
        hellora_config(profile, hellori=True, share_outer=True)
