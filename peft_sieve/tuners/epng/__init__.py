"""EPnG (arXiv 2607.01789): LoRA on experts whose ranks follow the routing during training, at a fixed budget."""

from dataclasses import replace

from ...hf.methods import register
from ..sieve import METHOD as SIEVE
from .card import describe
from .config import EpngConfig
from .model import EpngModel

__all__ = ["EpngConfig", "EpngModel"]

register(
    replace(
        SIEVE,
        name="SIEVE_EPNG",
        config=EpngConfig,
        model=EpngModel,
        describe=describe,
        key_parts=(*SIEVE.key_parts, "blocks", "importance", "ledger"),
        only_fields=("expert_blocks", "rank_block"),
    )
)
