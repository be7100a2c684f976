"""Cold experts by depth: the share of each layer's experts that its router nearly ignores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..routing.comparison import check_same_layers
from ..routing.profile import RoutingProfile
from ..routing.statistics import routing_statistics
from .canvas import dress, head, legend_beside, new_figure, series_style
from .themes import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cold_figure(profiles: Mapping[str, RoutingProfile], *, theme: Theme = LIGHT) -> Figure:
    """One line a profile: share of cold experts, those with fewer than half the uniform share, layer by layer.

    Args:
        profiles: by the name to show, of the same model.
        theme: `LIGHT` or `DARK`.

    Raises:
        SieveError: if matplotlib is not installed, or the profiles are of different models.
    """
    check_same_layers(profiles)
    figure = new_figure(7.2, 3.6)
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    highest = 0.0
    for position, profile in enumerate(profiles.values()):
        cold = [100 * layer.cold_fraction for layer in routing_statistics(profile).layers.values()]
        axes.plot(range(len(cold)), cold, label=str(position), **series_style(position, theme))
        highest = max([highest, *(share for share in cold if not math.isnan(share))])
    axes.set_xlim(-0.5, len(next(iter(profiles.values())).counts) - 0.5)
    axes.set_ylim(0, max(10.0, 1.08 * highest))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set_xlabel("layer, by position")
    axes.set_ylabel("cold experts, %")
    head(figure, "Experts with fewer than half the uniform share of tokens", theme)
    axes.grid(color=theme.quiet, lw=0.4, alpha=0.6)
    legend_beside(figure, axes, list(profiles))
    dress(figure, theme)
    return figure
