"""What a Mixture-of-Experts layer is: finding it, and the grouped products inside it."""

from .families import register_moe_family
from .families_stacked import STACKED_FAMILIES

for _family in STACKED_FAMILIES:
    register_moe_family(_family)
