"""One adapter trains a module whole (`modules_to_save`) beside another: each as when it is alone, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveError, SieveLoraConfig
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing.profiling import profile_routing
from tests.models import randomize_adapter, tiny_model, token_batch
from tests.tuners.errors import assert_plain
from tests.tuners.test_injection import state

MASK = {f"model.layers.{i}.mlp.experts": [1, 4] for i in range(2)}
CONFIGS: dict[str, Callable[..., Any]] = {
    "sieve": lambda **more: SieveLoraConfig(**{"r": 2, "selected_experts": MASK, "task_type": "CAUSAL_LM", **more}),
    "epng": lambda **more: EpngConfig(r=2, selected_experts=MASK, task_type="CAUSAL_LM", **more),
    "perft": lambda **more: PerftConfig(r=2, task_type="CAUSAL_LM", **more),
    "lora_moe": lambda **more: LoraMoeConfig(num_experts=3, r=2, task_type="CAUSAL_LM", **more),
}
CALIBRATED: dict[str, Any] = {"selected_experts": None, "calib_dataset": ["unused"]}
Settings = dict[str, Any]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**token_batch(model)).logits


def saved(folder: Path, seed: int, method: str, settings: Settings) -> torch.Tensor:
    """An adapter in a folder, what it trains whole changed, too; returns the outputs of the model that has it alone."""
    model = get_peft_model(tiny_model("olmoe"), CONFIGS[method](**settings))
    whole = {n: p.data.clone() for n, p in model.named_parameters() if "modules_to_save." in n}
    randomize_adapter(model, seed)
    for name, parameter in model.named_parameters():
        if name in whole:
            parameter.data.add_(whole[name])
    model.save_pretrained(folder)
    return logits(model)


def check_each_as_alone(path: Path, method: str, first: Settings, second: Settings) -> None:
    alone = saved(path / "a", 1, method, first), saved(path / "b", 2, method, second)
    assert not torch.equal(*alone)
    model = PeftModel.from_pretrained(tiny_model("olmoe"), path / "a", adapter_name="a")
    model.load_adapter(path / "b", "b")
    for _ in range(2):
        for name, expected in zip("ab", alone, strict=True):
            model.set_adapter(name)
            assert torch.equal(logits(model), expected)
    model.save_pretrained(path / "both")
    for name, expected in zip("ab", alone, strict=True):
        loaded = PeftModel.from_pretrained(tiny_model("olmoe"), path / "both" / name)
        assert torch.equal(logits(loaded), expected)


# What the two have no use for together: the first trains it whole, and the second does not touch it.
APART: list[tuple[str, Settings, Settings]] = [
    ("sieve", {"modules_to_save": ["lm_head"]}, {}),
    ("sieve", {"modules_to_save": ["gate"]}, {"modules_to_save": ["gate"]}),
    ("sieve", {"modules_to_save": ["gate"]}, {"train_router": False}),
    ("sieve", {"modules_to_save": ["layers.0.mlp"]}, {"exclude_modules": ["model.layers.0.mlp.experts"]}),
    ("sieve", {"modules_to_save": ["layers.0.mlp"]}, {"modules_to_save": ["layers.0.mlp"]}),
    ("epng", {"modules_to_save": ["gate"]}, {"train_router": False}),
    ("perft", {"modules_to_save": ["gate"]}, {}),
    ("lora_moe", {"modules_to_save": ["lm_head"]}, {}),
    ("lora_moe", {"modules_to_save": ["gate"]}, {}),
    ("sieve", {"trainable_token_indices": [5, 7]}, {"trainable_token_indices": [5]}),
]


@pytest.mark.parametrize("turned", [False, True], ids=["whole first", "whole second"])
@pytest.mark.parametrize(("method", "first", "second"), APART)
def test_each_computes_what_it_does_alone(
    method: str, first: Settings, second: Settings, turned: bool, tmp_path: Path
) -> None:
    check_each_as_alone(tmp_path, method, *((second, first) if turned else (first, second)))


TOGETHER: list[tuple[str, Settings, Settings, str]] = [
    ("sieve", {"modules_to_save": ["gate"]}, {}, r"mlp\.gate"),
    ("sieve", {"modules_to_save": ["layers.0.mlp"]}, {}, r"layers\.0\.mlp"),
    ("sieve", {"modules_to_save": ["layers.0.mlp"]}, CALIBRATED, r"layers\.0\.mlp"),
    ("sieve", {"modules_to_save": ["layers.1.mlp.experts"]}, {"train_router": False}, r"layers\.1\.mlp\.experts"),
    ("sieve", {"modules_to_save": ["self_attn"]}, {}, "self_attn"),
    ("sieve", {"modules_to_save": ["gate"]}, {"modules_to_save": ["layers.0.mlp"]}, r"layers\.0\.mlp"),
    ("sieve", {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3]}, "embed_tokens"),
    ("sieve", {"trainable_token_indices": [3]}, {"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
    # PEFT has a KeyError when one of them is saved or loaded.
    ("sieve", {"trainable_token_indices": [3]}, {}, "trainable_token_indices .*embed_tokens"),
    ("epng", {"modules_to_save": ["layers.0.mlp"]}, {}, r"layers\.0\.mlp"),
    ("perft", {"modules_to_save": ["layers.0.mlp"]}, {}, r"layers\.0\.mlp"),
    ("lora_moe", {"modules_to_save": ["q_proj"]}, {}, "q_proj"),
]


def by_peft(base: Any, method: str, first: Settings, second: Settings) -> Callable[[], Any]:
    model = get_peft_model(base, CONFIGS[method](**first), adapter_name="a")
    return lambda: model.add_adapter("b", CONFIGS[method](**second))


def by_transformers(base: Any, method: str, first: Settings, second: Settings) -> Callable[[], Any]:
    base.add_adapter(CONFIGS[method](**first), "a")
    return lambda: base.add_adapter(CONFIGS[method](**second), "b")


@pytest.mark.parametrize("way", [by_peft, by_transformers])
@pytest.mark.parametrize("turned", [False, True], ids=["whole first", "whole second"])
@pytest.mark.parametrize(("method", "first", "second", "module"), TOGETHER)
def test_what_both_would_change_is_refused(
    method: str, first: Settings, second: Settings, module: str, turned: bool, way: Callable[..., Any]
) -> None:
    if turned:
        first, second = second, first
    if first is CALIBRATED:
        first = {}
    base = tiny_model("olmoe")
    add = way(base, method, first, second)
    outputs, before = logits(base), state(base)
    with pytest.raises(SieveError, match=module) as refusal:
        add()
    assert_plain(str(refusal.value))
    assert "modules_to_save." not in str(refusal.value) and "original_module" not in str(refusal.value)
    assert state(base) == before and torch.equal(logits(base), outputs)


def test_a_second_adapter_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1, "sieve", {"modules_to_save": ["gate"]})
    saved(tmp_path / "b", 2, "sieve", {})
    for first, second in ("ab", "ba"):
        model = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / first)
        expected = logits(model)
        with pytest.raises(SieveError, match=r"mlp\.gate"):
            model.load_adapter(tmp_path / second, "second")
        assert torch.equal(logits(model), expected) and list(model.peft_config) == ["default"]


def test_a_block_trained_whole_keeps_its_name_in_profiles() -> None:
    """And is counted where it computes."""
    base = tiny_model("olmoe")
    paths = [layer.path for layer in find_moe_layers(base)]
    model = get_peft_model(base, CONFIGS["sieve"](modules_to_save=["layers.0.mlp"]))
    assert [layer.path for layer in find_moe_layers(base)] == paths
    profile = profile_routing(model, [token_batch(base)])
    assert list(profile.counts) == paths
    assert all(int(profile.counts[path].sum()) == token_batch(base)["input_ids"].numel() * 3 for path in paths)
