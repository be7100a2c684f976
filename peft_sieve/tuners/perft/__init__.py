"""PERFT (arXiv 2508.02587): adapters in parallel to the MoE blocks of a model."""

from .config import PerftConfig
from .model import PerftModel

__all__ = ["PerftConfig", "PerftModel"]
