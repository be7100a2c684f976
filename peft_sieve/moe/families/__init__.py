"""Ways in which models lay out their routed experts: a file for each, in an open registry."""

from .fused import FusedExperts
from .modules import MODULE_FAMILIES
from .parallel import ParallelExperts
from .registry import register_moe_family
from .stacked import STACKED_FAMILIES

for _family in (*MODULE_FAMILIES, ParallelExperts(), FusedExperts(), *STACKED_FAMILIES):
    register_moe_family(_family)
