"""MoE-Sieve (arXiv 2603.24044): LoRA on the experts that a task uses."""

from ...hf.methods import Method, register
from ..common.experts.factors import EXPERT_KEY_PARTS, SLOTS_KEY
from ..common.saved_mask import check_hotswap, check_saved_mask
from .card import describe
from .config import SieveLoraConfig
from .model import SieveLoraModel

__all__ = ["METHOD", "SieveLoraConfig", "SieveLoraModel"]

METHOD = Method(
    name="SIEVE_LORA",
    config=SieveLoraConfig,
    model=SieveLoraModel,
    title="Sparse LoRA",
    tags=("lora", "mixture-of-experts"),
    describe=describe,
    key_parts=EXPERT_KEY_PARTS,
    only_keys=(SLOTS_KEY,),
    only_fields=("selected_experts", "expert_shapes", "top_k_frac"),
    check_files=check_saved_mask,
    check_hotswap=check_hotswap,
)
register(METHOD)
