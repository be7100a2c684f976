"""What the tests of PERFT share."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import PerftConfig
from peft_sieve.tuners.perft.layer import PerftLayer, perft_layers
from tests.models import tiny_model

# Of the two layers of `tiny_model("olmoe")`, which has eight experts in each.
MASK = {"model.layers.0.mlp.experts": [1, 2, 6], "model.layers.1.mlp.experts": [0, 5]}


def config(variant: str = "R", **settings: Any) -> PerftConfig:
    """Small, without dropout, with several adapters to choose from; `lora_alpha / r` is not a power of two."""
    if variant in ("R", "D"):
        settings = {"num_adapters": 5, **settings}
    return PerftConfig(
        **{"variant": variant, "r": 3, "lora_alpha": 7, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **settings}
    )


def adapted(variant: str = "R", base: nn.Module | None = None, seed: int = 1, **settings: Any) -> PeftModel:
    """The tiny OLMoE, or `base`, with adapters of random values."""
    model = get_peft_model(tiny_model("olmoe") if base is None else base, config(variant, **settings))
    randomize(model, seed)
    return model


def randomize(model: nn.Module, seed: int = 1, std: float = 0.2) -> None:
    """Fill every adapter tensor with random values: a B of zeros proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if ".perft_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            parameter.data.copy_(noise.to(parameter.dtype))


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def first_layer(model: nn.Module) -> PerftLayer:
    return perft_layers(model)[0]
