"""What the model card of an EPnG adapter says."""

from __future__ import annotations

from typing import Any

from ..common.provenance import selection_lines
from ..sieve.card import sparse_section

_CHOICE = (
    "pruned and grown by the routing during training at a fixed number of parameters (EPnG, "
    "[arXiv 2607.01789](https://arxiv.org/abs/2607.01789))"
)


def describe(model: Any, adapter_name: str, config: Any) -> str:
    """The section of one adapter; see `Method`."""
    ranks = f"rank {config.r}"
    if config.expert_blocks:
        own = [n * config.rank_block for path in config.selected_experts or {} for n in config.blocks_in(path)]
        ranks = f"rank {min(own)} to {max(own)}, {config.r} at the start"
    lines = selection_lines(config)
    # Without data all experts are adapted at the beginning, and nobody chose.
    lines = lines if config.calibration else lines[2:]
    return sparse_section(model, adapter_name, config, f"LoRA ({ranks})", _CHOICE, lines)
