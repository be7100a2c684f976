"""EPnG (arXiv 2607.01789): LoRA on experts whose ranks follow the routing during training, at a fixed budget."""

from ...hf.methods import Method, register
from ..common.experts.factors import EXPERT_KEY_PARTS, SLOTS_KEY
from ..common.saved_mask import check_hotswap, check_saved_mask
from .card import describe
from .config import EpngConfig
from .model import EpngModel

__all__ = ["EpngConfig", "EpngModel"]

register(
    Method(
        name="SIEVE_EPNG",
        config=EpngConfig,
        model=EpngModel,
        title="Sparse LoRA",
        tags=("lora", "mixture-of-experts"),
        describe=describe,
        key_parts=(*EXPERT_KEY_PARTS, "blocks", "importance", "ledger"),
        only_keys=(SLOTS_KEY,),
        only_fields=("expert_blocks", "rank_block"),
        check_files=check_saved_mask,
        check_hotswap=check_hotswap,
    )
)
