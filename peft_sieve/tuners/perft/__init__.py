"""PERFT (arXiv 2508.02587): adapters in parallel to the MoE blocks of a model."""

from ...hf.methods import Method, register
from .card import describe
from .config import PerftConfig
from .layer import CHILD
from .model import PerftModel

__all__ = ["PerftConfig", "PerftModel"]

register(
    Method(
        name="PERFT",
        config=PerftConfig,
        model=PerftModel,
        title="PERFT adapters",
        tags=("perft", "mixture-of-experts"),
        describe=describe,
        key_parts=(CHILD, "slots"),
        only_keys=(".perft_",),
        only_fields=("num_adapters_per_tok",),
        sizes=(("num_adapters", ".perft_A.weight"),),
    )
)
