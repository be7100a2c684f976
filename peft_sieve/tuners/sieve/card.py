"""What the model card of a sparse adapter says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...hf.card import base_link, section
from ..common.provenance import selection_lines

MOE_SIEVE = (
    "chosen by how often the task routes to them (MoE-Sieve, [arXiv 2603.24044](https://arxiv.org/abs/2603.24044))"
)


def describe(model: Any, adapter_name: str, config: Any) -> str:
    """The section of one adapter; see `Method`."""
    how = f"LoRA (rank {config.r})" if config.expert_tuning == "lora" else "Full tuning"
    choice = MOE_SIEVE + "".join(_shared(config))
    return sparse_section(model, adapter_name, config, how, choice, selection_lines(config))


def _shared(config: Any) -> Iterator[str]:
    """What to add to the sentence on experts with an adapter of their own."""
    if config.cold_experts == "shared":
        mask, shapes = config.selected_experts or {}, config.expert_shapes or {}
        others = sum(shape[0] - len(mask.get(path, ())) for path, shape in shapes.items())
        yield f", and one adapter per layer that the other {others} use together"
    if config.share_outer:
        yield ", with A of gate_proj and up_proj and B of down_proj one per layer (shared-outer LoRA)"


def sparse_section(model: Any, adapter_name: str, config: Any, how: str, choice: str, lines: list[str]) -> str:
    """A section on an adapter of some experts.

    Args:
        how: they are adapted.
        choice: how they came about.
        lines: at the end.
    """
    adapted = sum(map(len, (config.selected_experts or {}).values()))
    total = sum(shape[0] for shape in (config.expert_shapes or {}).values())
    what = f"{how} for {base_link(model)} on {adapted} of {total} routed experts, {choice}"
    return section(model, adapter_name, "Sparse expert adapter", what, *lines)
