"""What the model card of a PERFT adapter says."""

from __future__ import annotations

from typing import Any

from ...hf.card import base_link, section
from ..common.provenance import selection_lines


def describe(model: Any, adapter_name: str, config: Any) -> str:
    """The section of one adapter; see `Method`."""
    total = sum(shape[0] for shape in (config.expert_shapes or {}).values())
    mask = config.selected_experts
    share = "each expert" if mask is None else f"each of {sum(map(len, mask.values()))} of {total} experts"
    kinds = {
        "R": f"{config.num_adapters} adapters, of which a router picks {config.num_adapters_per_tok} for each token,",
        "E": f"an adapter for {share},",
        "D": f"{config.num_adapters} adapters",
        "S": "one adapter",
    }
    what = (
        f"PERFT-{config.variant} ([arXiv 2508.02587](https://arxiv.org/abs/2508.02587)) for {base_link(model)}: "
        f"{kinds[config.variant]} beside each MoE block ({config.form}, rank {config.r})"
    )
    return section(model, adapter_name, "PERFT adapter", what, *(selection_lines(config) if mask else ()))
