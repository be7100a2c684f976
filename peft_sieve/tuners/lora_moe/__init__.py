"""DMEP (arXiv 2604.26340): LoRA experts and a router around linear layers, pruned once by how much each is used."""

from .config import LoraMoeConfig
from .model import LoraMoeModel

__all__ = ["LoraMoeConfig", "LoraMoeModel"]
