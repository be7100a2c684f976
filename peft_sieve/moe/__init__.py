"""What a Mixture-of-Experts layer is: finding it, and the grouped products inside it."""

from .families import FusedExperts, register_moe_family
from .families_stacked import STACKED_FAMILIES
from .module_experts import MODULE_FAMILIES
from .parallel_experts import ParallelExperts

for _family in (*MODULE_FAMILIES, ParallelExperts(), *STACKED_FAMILIES, FusedExperts()):
    register_moe_family(_family)
