"""A configuration of every method, and a process that saves an adapter until it is killed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveLoraConfig
from tests.hf.toy_method import ToyConfig

MASK = {"model.layers.0.mlp.experts": [1, 6]}
# Method -> a configuration of it, and the number in one that says which version was saved.
METHODS: dict[str, tuple[Callable[[], PeftConfig], str]] = {
    "toy": (lambda: ToyConfig(target_modules=["q_proj", "v_proj"]), "factor"),
    "sieve": (lambda: SieveLoraConfig(r=2, selected_experts=MASK), "lora_alpha"),
    "epng": (lambda: EpngConfig(r=2, selected_experts=MASK), "lora_alpha"),
    "perft": (lambda: PerftConfig(r=2), "lora_alpha"),
    "lora_moe": (lambda: LoraMoeConfig(r=2, num_experts=3), "lora_alpha"),
}


def factors(model: PeftModel) -> list[Any]:
    """The trained tensors of an adapter."""
    return [parameter for name, parameter in model.named_parameters() if ".default." in name]


def save_again_and_again(model: PeftModel, method: str, folder: str, saved: Callable[[], object]) -> None:
    """Save an adapter, each version with its number in configuration and weights, until the process is killed.

    Args:
        saved: called after each save.
    """
    for version in itertools.count(1):
        setattr(model.peft_config["default"], METHODS[method][1], float(version))
        with torch.no_grad():
            for parameter in factors(model):
                parameter.fill_(version)
        model.save_pretrained(folder)
        saved()
