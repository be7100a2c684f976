"""DMEP (arXiv 2604.26340): LoRA experts and a router around linear layers, pruned once by how much each is used."""

from ...hf.methods import Method, register
from .card import describe
from .config import LoraMoeConfig
from .model import LoraMoeModel

__all__ = ["LoraMoeConfig", "LoraMoeModel"]

register(
    Method(
        name="LORA_MOE",
        config=LoraMoeConfig,
        model=LoraMoeModel,
        title="LoRA experts",
        tags=("lora-moe",),
        describe=describe,
        key_parts=("experts", "tokens", "pruned"),
        only_keys=(".lora_usage.",),
        only_fields=("prune_threshold",),
        sizes=(("num_experts", ".lora_usage.tokens"),),
    )
)
