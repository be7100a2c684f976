"""What the model card of LoRA experts says."""

from __future__ import annotations

from typing import Any

from ...hf.card import base_link, section


def describe(model: Any, adapter_name: str, config: Any) -> str:
    """The section of one adapter; see `Method`."""
    kept, pruned = config.kept_experts or {}, ""
    if kept:
        left, total = sum(map(len, kept.values())), len(kept) * config.num_experts
        pruned = f", of which pruning left {left} of {total} in {len(kept)} layers"
    what = (
        f"{config.num_experts} LoRA experts of rank {config.r} and a router, which picks {config.top_k} of them for "
        f"each token, around each adapted linear layer of {base_link(model)}{pruned} (DMEP, "
        "[arXiv 2604.26340](https://arxiv.org/abs/2604.26340))"
    )
    return section(model, adapter_name, "LoRA experts", what)
