"""An adapter with values that are not finite is not merged: PEFT's sentence, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_sieve import EpngConfig, SieveLoraConfig
from tests.deepseek_like import deepseek_like
from tests.models import tiny_model

COMMON: dict[str, Any] = {"r": 2, "lora_dropout": 0.0, "init_lora_weights": False}
OLMOE = {"model.layers.0.mlp.experts": [1, 6]}
LISTED = {"model.layers.1.mlp.experts": [0, 2]}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "stacked": (lambda: tiny_model("olmoe"), lambda: SieveLoraConfig(selected_experts=OLMOE, **COMMON)),
    "listed": (deepseek_like, lambda: SieveLoraConfig(selected_experts=LISTED, **COMMON)),
    "embeddings": (
        lambda: tiny_model("olmoe", tie_word_embeddings=True),
        lambda: SieveLoraConfig(selected_experts=OLMOE, target_modules=["embed_tokens", "lm_head"], **COMMON),
    ),
    "esft": (
        lambda: tiny_model("olmoe"),
        lambda: SieveLoraConfig(selected_experts=OLMOE, expert_tuning="full", **COMMON),
    ),
    "epng": (lambda: tiny_model("olmoe"), lambda: EpngConfig(selected_experts=OLMOE, **COMMON)),
}
SENTENCE = "NaNs detected in the merged weights. The adapter default seems to be broken"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", MODELS)
def test_each_layer_refuses_it(name: str, value: float) -> None:
    make, config = MODELS[name]
    model: PeftModel = get_peft_model(make(), config())
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = {key: value.clone() for key, value in model.state_dict().items() if "base_layer" in key}
    for layer in layers:
        factors = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        kept = [factor.detach().clone() for factor in factors]
        for factor in factors:
            factor.data[0] = value
        for merge in (layer.merge, model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=SENTENCE):
                merge(safe_merge=True)
        for factor, finite in zip(factors, kept, strict=True):
            factor.data.copy_(finite)
        assert not any(other.merged for other in layers)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
