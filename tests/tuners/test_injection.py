"""An injection that fails, or that meets an adapter of its name, leaves the model as it was, for every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveError, SieveLoraConfig
from tests.models import randomize_adapters, tiny_model, token_batch
from tests.tuners.perft.adapted import randomize

MASK = {"model.layers.0.mlp.experts": [1, 2]}
CONFIGS: dict[str, Callable[..., Any]] = {
    "sieve": lambda **more: SieveLoraConfig(r=2, selected_experts=MASK, task_type="CAUSAL_LM", **more),
    "calibrated": lambda **more: SieveLoraConfig(
        r=2, calib_dataset=[token_batch(tiny_model("olmoe"))], task_type="CAUSAL_LM", **more
    ),
    "epng": lambda **more: EpngConfig(r=2, task_type="CAUSAL_LM", **more),
    "perft_r": lambda **more: PerftConfig(r=2, task_type="CAUSAL_LM", **more),
    "perft_e": lambda **more: PerftConfig(
        variant="E", r=2, calib_dataset=[token_batch(tiny_model("olmoe"))], task_type="CAUSAL_LM", **more
    ),
    "lora_moe": lambda **more: LoraMoeConfig(num_experts=4, r=2, task_type="CAUSAL_LM", **more),
}
each_method = pytest.mark.parametrize("method", CONFIGS)


def state(model: nn.Module) -> Any:
    hooks = [
        (path, type(m), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for path, m in model.named_modules()
    ]
    return hooks, [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()], vars(model).keys()


def with_extras() -> PreTrainedModel:
    """Of its modules PEFT can wrap the head, and then not the list."""
    model = tiny_model("olmoe")
    model.extras = nn.ModuleList([nn.LayerNorm(2)])
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch(model)).logits


@each_method
def test_a_setting_that_fails_late_leaves_nothing_behind(method: str) -> None:
    model = with_extras()
    before = state(model)
    with pytest.raises(TypeError, match="ModuleList"):
        get_peft_model(model, CONFIGS[method](modules_to_save=["lm_head", "extras"]))
    assert state(model) == before
    plain = logits(model)
    adapted = get_peft_model(model, CONFIGS[method]())
    assert torch.equal(logits(adapted), plain)
    before, config = state(adapted), adapted.peft_config["default"]
    with pytest.raises(TypeError, match="ModuleList"):
        adapted.add_adapter("second", CONFIGS[method](modules_to_save=["lm_head", "extras"]))
    assert state(adapted) == before and adapted.peft_config == {"default": config}


@each_method
def test_transformers_own_way_leaves_nothing_behind_either(method: str) -> None:
    model = with_extras()
    before = state(model)
    with pytest.raises(TypeError, match="ModuleList"):
        model.add_adapter(CONFIGS[method](modules_to_save=["lm_head", "extras"]))
    assert state(model) == before
    model.add_adapter(CONFIGS[method]())


@each_method
@pytest.mark.parametrize("again", ["wrapped", "base"])
def test_a_second_get_peft_model_is_refused(method: str, again: str) -> None:
    """A cell of a notebook is run again."""
    base = tiny_model("olmoe")
    model = get_peft_model(base, CONFIGS[method]())
    randomize_adapters(model)
    randomize(model)
    expected, before, config = logits(model), state(model), model.peft_config["default"]
    with pytest.raises(SieveError, match="already has an adapter named 'default'"), pytest.warns(UserWarning):
        get_peft_model(model if again == "wrapped" else base, CONFIGS[method]())
    assert state(model) == before and model.peft_config == {"default": config}
    assert model.peft_config["default"] is config and torch.equal(logits(model), expected)
    get_peft_model(model.unload(), CONFIGS[method]())


def test_other_methods_stay_pefts_business() -> None:
    model = get_peft_model(tiny_model("olmoe"), LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
