"""Ways in which models lay out their routed experts: a file for each, in an open registry."""

from .by_class_name import FAMILIES_BY_CLASS_NAME
from .fused import FusedExperts
from .modules import MODULE_FAMILIES
from .parallel import ParallelExperts
from .registry import register_moe_family

for _family in (*MODULE_FAMILIES, ParallelExperts(), FusedExperts(), *FAMILIES_BY_CLASS_NAME):
    register_moe_family(_family)
