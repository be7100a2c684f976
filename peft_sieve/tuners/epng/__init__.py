"""EPnG (arXiv 2607.01789): LoRA on experts whose ranks follow the routing during training, at a fixed budget."""

from .config import EpngConfig
from .model import EpngModel

__all__ = ["EpngConfig", "EpngModel"]
