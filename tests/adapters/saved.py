"""Sparse adapters with random factors, on models saved to disk, for the tests of what leaves the package."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import SieveLoraConfig
from peft_sieve.moe.topology import find_moe_layers
from tests.models import randomize_adapters, tiny_model, token_batch

# Another rank and another scaling in one place each: nothing may depend on them being the same everywhere.
UNEVEN: dict[str, Any] = {
    "r": 4,
    "rank_pattern": {"o_proj": 3, "experts.up_proj": 2},
    "alpha_pattern": {"experts.down_proj": 7},
}


# What experts share: everything alone, together, and in layers of which no expert has an adapter of its own.
SHARED: dict[str, dict[str, Any]] = {
    "cold": {"cold_experts": "shared"},
    "outer": {"share_outer": True},
    "both": {"cold_experts": "shared", "share_outer": True},
    "one layer whole": {"cold_experts": "shared", "share_outer": True, "without_own": [0]},
    "all whole": {"cold_experts": "shared", "without_own": [0, 1]},
}


@dataclass
class Adapter:
    """A saved adapter, and what it computes."""

    base_path: Path
    base: nn.Module
    model: PeftModel
    path: Path
    batch: dict[str, torch.Tensor]

    def fresh(self) -> Any:
        return copy.deepcopy(self.base)

    def logits(self, model: nn.Module | None = None) -> torch.Tensor:
        with torch.no_grad():
            return (model or self.model).eval()(**self.batch).logits


def saved_adapter(
    folder: Path,
    name: str,
    dtype: torch.dtype = torch.float32,
    base: nn.Module | None = None,
    save: dict[str, Any] | None = None,
    without_own: Sequence[int] = (),
    **options: Any,
) -> Adapter:
    """The model `name` in `folder / "base"`, an adapter of two experts per layer in `folder / "adapter"`.

    Args:
        without_own: MoE layers of which none is selected.
    """
    base = tiny_model(name, dtype=dtype) if base is None else base
    base.save_pretrained(folder / "base", **(save or {}))
    base.name_or_path = str(folder / "base")
    layers = enumerate(find_moe_layers(base))
    mask = {layer.path: [] if i in without_own else [i, i + 3] for i, layer in layers}
    model = get_peft_model(
        copy.deepcopy(base),
        SieveLoraConfig(**{**UNEVEN, "selected_experts": mask, "task_type": "CAUSAL_LM", **options}),
    )
    randomize_adapters(model)
    model.save_pretrained(folder / "adapter")
    return Adapter(folder / "base", base, model.eval(), folder / "adapter", token_batch(base))


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, over the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
