"""Coverage against the number of experts: how much of each layer's routing its k hottest experts get."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..routing.comparison import coverage_curves
from ..routing.profile import RoutingProfile
from ..routing.selection import ExpertSelection
from .canvas import FONT, dress, new_figure
from .themes import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def coverage_figure(
    profile: RoutingProfile,
    selection: Mapping[str, Iterable[int]] | None = None,
    *,
    score: str = "count",
    title: str = "",
    theme: Theme = LIGHT,
) -> Figure:
    """One curve a layer, coloured by its depth, and the mean over layers if they have as many experts.

    The dashed line is what a uniform router would give. A dot shows what a selection has in its layer: on the curve
    for the hottest experts, below it for others.

    Args:
        profile: what the router did.
        selection: layer name -> ids of experts.
        score: what the coverage is a share of.
        title: a line above the axes.
        theme: `LIGHT` or `DARK`.

    Raises:
        SieveError: if matplotlib is not installed, the profile lacks the score, or the selection does not fit it.
    """
    curves = coverage_curves(profile, score=score)
    chosen = ExpertSelection(selection or {})
    covered = chosen.coverage(profile, score=score)
    figure = new_figure(6.4, 4.2)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    layers = list(profile.counts)
    low, high = theme.depth_range
    steps = [colormaps[theme.depth](low + (high - low) * i / 63) for i in range(64)]
    colours = ScalarMappable(Normalize(0, max(len(layers) - 1, 1)), LinearSegmentedColormap.from_list("depth", steps))
    sizes = {len(counts) for counts in profile.counts.values()}
    together = len(sizes) == 1
    # Layers of several sizes share an axis of shares.
    widest = sizes.pop() if together else 100
    for layer, curve in curves.items():
        step = 1.0 if together else 100 / len(curve)
        colour = steps[round(63 * layers.index(layer) / max(len(layers) - 1, 1))]
        axes.plot([step * k for k in range(len(curve) + 1)], [0.0] + [100 * c for c in curve], color=colour, lw=0.9)
        if chosen.get(layer):
            axes.plot(step * len(chosen[layer]), 100 * covered[layer], "o", color=colour, ms=4, mec=theme.text, mew=0.6)
    if together and len(curves) > 1:
        mean = [0.0] + [100 * math.fsum(column) / len(curves) for column in zip(*curves.values(), strict=True)]
        axes.plot(range(widest + 1), mean, color=theme.text, lw=2.2, label="mean over layers")
    axes.plot([0, widest], [0, 100], color=theme.text, lw=0.9, ls="--", label="uniform router")
    axes.set(xlim=(0, widest), ylim=(0, 102))
    axes.set_xlabel("k, hottest experts of the layer" if together else "hottest experts, % of the layer's")
    axes.set_ylabel("tokens routed to them, %" if score == "count" else f"{score} that they get, %")
    axes.grid(color=theme.quiet, lw=0.4, alpha=0.6)
    if title:
        axes.set_title(title, loc="left")
    handles = axes.get_legend_handles_labels()[0]
    shares = [covered[layer] for layer in curves if chosen.get(layer)]
    if shares:
        mean_share = math.fsum(shares) / len(shares)
        number = math.fsum(len(chosen[layer]) for layer in curves if chosen.get(layer)) / len(shares)
        label = f"selected: {number:.3g} a layer, {mean_share:.1%}"
        handles.append(axes.plot([], [], "o", color=theme.quiet, ms=4, mec=theme.text, mew=0.6, label=label)[0])
    axes.legend(handles=handles, loc="lower right", fontsize=FONT)
    if len(layers) > 1:
        bar = figure.colorbar(colours, ax=axes, label="layer, by position", pad=0.02, aspect=30)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(nbins=8, integer=True)
        bar.update_ticks()
    dress(figure, theme)
    return figure
