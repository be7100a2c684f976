"""MoE-Sieve (arXiv 2603.24044): LoRA on the experts that a task uses."""

from .config import SieveLoraConfig
from .model import SieveLoraModel

__all__ = ["SieveLoraConfig", "SieveLoraModel"]
