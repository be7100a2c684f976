"""Saves an adapter again and again until it is killed, each version with its number in configuration and weights.

python -m tests.hf.saver METHOD FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveLoraConfig
from tests.hf.toy_method import ToyConfig
from tests.models import tiny_model

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


def main(method: str, folder: str) -> None:
    make, field = METHODS[method]
    model = get_peft_model(tiny_model("olmoe"), make())
    version = 0
    while True:
        version += 1
        setattr(model.peft_config["default"], field, float(version))
        with torch.no_grad():
            for parameter in factors(model):
                parameter.fill_(version)
        model.save_pretrained(folder)
        print(version, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
