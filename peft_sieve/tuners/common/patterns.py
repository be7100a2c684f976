"""Ranks and alphas by PEFT's `rank_pattern` and `alpha_pattern`, of what goes by several names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from ...moe.families.family import ExpertsShape, MoEFamily
from .targets import adapted_projections

# PEFT's, which knows the names of linear modules only.
UNMATCHED_IN_PEFT = "The following (rank|alpha)_pattern keys did not match"


def by_pattern(patterns: dict[str, Any] | None, names: Sequence[str], default: Any) -> Any:
    """A rank or alpha from PEFT's patterns, for what goes by several names: the first name that one matches counts."""
    patterns = patterns or {}
    matches = (get_pattern_key(list(patterns), name) for name in names)
    return next((patterns[match] for match in matches if match in patterns), default)


def expert_names(path: str, family: MoEFamily, experts: nn.Module, projection: str) -> list[str]:
    """The names of a projection in patterns, the most exact one first: its own, its parameter's, its layer's.

    Args:
        path, family: of the layer.
        experts: its base module.
    """
    return [*(f"{path}.{name}" for name in (projection, *family.parameter_names(experts, [projection]))), path]


def ranks_and_alphas(
    config: Any, path: str, family: MoEFamily, shape: ExpertsShape, experts: nn.Module
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of each adapted projection of a layer.

    Args:
        path, family, shape: of the layer.
        experts: its base module.
    """
    ranks, alphas = {}, {}
    for projection in adapted_projections(config, path, shape):
        names = expert_names(path, family, experts, projection)
        ranks[projection] = by_pattern(config.rank_pattern, names, config.r)
        alphas[projection] = by_pattern(config.alpha_pattern, names, config.lora_alpha)
    return ranks, alphas


def warn_of_unmatched_patterns(config: Any, names: Iterable[str]) -> None:
    """Warn of patterns that match nothing that is adapted, as PEFT does for linear modules.

    Args:
        names: all names that what is adapted goes by.
    """
    names = list(names)
    for kind, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        unmatched = [key for key in patterns or {} if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)]
        if unmatched:
            warnings.warn(
                f"{kind} has {unmatched}, which match nothing that is adapted and are ignored, expected names of "
                "adapted modules, routers or expert projections: correct them or leave them out",
                RuntimeWarning,
            )
