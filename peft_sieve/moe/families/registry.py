"""The families that the package knows, in an open registry."""

from __future__ import annotations

from torch import nn

from ...checks import shown
from ...errors import SieveError
from .family import MoEFamily

_FAMILIES: list[MoEFamily] = []


def register_moe_family(family: MoEFamily) -> None:
    """Teach the package another layout of routed experts (docs/custom-architectures.md).

    Families registered later are asked first.

    Raises:
        SieveError: `family` is not an instance of `MoEFamily`.
    """
    if not isinstance(family, MoEFamily):
        raise SieveError(
            f"register_moe_family takes an instance of a MoEFamily class, got {shown(family)}. Pass one, such as "
            "ModuleExperts('mine', up_proj='fc_in', down_proj='fc_out')."
        )
    _FAMILIES.insert(0, family)


def family_of(module: nn.Module) -> MoEFamily | None:
    """The family that `module` belongs to, if it holds routed experts."""
    return next((family for family in _FAMILIES if family.matches(module)), None)
