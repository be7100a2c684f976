"""HELLoRA (arXiv 2605.18795): LoRA on as many hot experts as a token goes to, counted while LoRA warms up."""

from .preset import hellora_config
from .warm_up import warm_up_profile

__all__ = ["hellora_config", "warm_up_profile"]
