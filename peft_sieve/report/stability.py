"""How many tokens are enough: whether a smaller sample would have given the same selection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..routing.comparison import resampled_stability, smaller_sample_stability
from ..routing.profile import RoutingProfile
from .canvas import dress, head, legend_beside, new_figure, series_style
from .themes import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEWEST_TOKENS = 32
_SMALLEST_PART = 2.0**-12  # where the number of tokens is not known


def stability_figure(profiles: Mapping[str, RoutingProfile], *, theme: Theme = LIGHT, **options: Any) -> Figure:
    """Overlap of the selection with the one from all tokens, against the number of tokens.

    Thin lines: parts of each profile drawn at random, dispatch by dispatch, which is the best case, since the tokens of
    a text resemble each other. Markers: real smaller samples, where profiles of one data set differ in their tokens.

    Args:
        profiles: by the name to show.
        theme: `LIGHT` or `DARK`.
        options: of `select_experts`; the score must be `count`, all that a part of a profile has.

    Raises:
        SieveError: if matplotlib is not installed, or an option is out of range.
    """
    measured = smaller_sample_stability(profiles, **options)
    smaller = {name for points in measured.values() for name, _, _ in points}
    whole = {name: profile for name, profile in profiles.items() if name not in smaller}
    by_tokens = all(profile.num_tokens is not None for profile in whole.values())
    figure = new_figure(7.2, 3.6)
    from matplotlib.ticker import EngFormatter

    axes = figure.add_subplot()
    names = []
    for position, (name, profile) in enumerate(whole.items()):
        style = series_style(position, theme) | {"marker": "", "linewidth": 1.1}
        scale = profile.num_tokens or 0 if by_tokens else 100
        fractions = _doubling(_FEWEST_TOKENS / max(scale, 1) if by_tokens else _SMALLEST_PART)
        overlaps = resampled_stability(profile, fractions, **options)
        axes.plot([fraction * scale for fraction in fractions], overlaps, label=name, **style)
        names.append(name)
        points = measured.get(str(profile.metadata.get("dataset")), []) if by_tokens else []
        if points:
            style |= {"marker": "o", "markersize": 5, "linestyle": ""}
            axes.plot([n for _, n, _ in points], [overlap for _, _, overlap in points], label=name, **style)
            names.append(f"{name}, real samples")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("tokens" if by_tokens else "part of the profile, %")
    axes.set_ylabel("Jaccard with all tokens' selection")
    head(figure, "Selection from fewer tokens (lines: drawn one by one, the best case)", theme)
    axes.grid(color=theme.quiet, lw=0.4, alpha=0.6)
    legend_beside(figure, axes, names)
    dress(figure, theme)
    return figure


def _doubling(smallest: float) -> list[float]:
    """Fractions from `smallest`, each twice the one before, and 1."""
    fractions = []
    while smallest < 1:
        fractions.append(smallest)
        smallest *= 2
    return [*fractions, 1.0]
