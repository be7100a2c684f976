"""What a Mixture-of-Experts layer is: finding it, and the grouped products inside it."""

from . import families_stacked  # noqa: F401 (enters its families in the registry)
