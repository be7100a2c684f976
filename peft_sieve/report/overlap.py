"""Overlap of data sets: how far the experts selected for one are those selected for another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import SieveError
from ..routing.comparison import jaccard_matrix
from ..routing.profile import RoutingProfile
from .canvas import FONT, dress, head, new_figure, shares_map
from .themes import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL, _MOST_CELLS = 0.46, 9.0  # inches
_MOST_NUMBERS = 20  # profiles; beyond, the cells are too small to write in


def overlap_figure(profiles: Mapping[str, RoutingProfile], *, theme: Theme = LIGHT, **options: Any) -> Figure:
    """The Jaccard overlap of the selections for each two profiles, mean over layers, as a matrix.

    Args:
        profiles: by the name to show, at least two, of the same model.
        theme: `LIGHT` or `DARK`.
        options: of `select_experts`.

    Raises:
        SieveError: if matplotlib is not installed, there is only one profile, or they are of different models.
    """
    if len(profiles) < 2:
        raise SieveError(
            f"An overlap needs at least 2 routing profiles, got {len(profiles)}. Add the profile of another data set."
        )
    overlaps = jaccard_matrix(profiles, **options)
    number = len(profiles)
    side = min(number * _CELL, _MOST_CELLS)
    longest = 0.07 * max(map(len, profiles))
    figure = new_figure(max(side + longest + 1.4, 4.2), max(side + 0.7 * longest + 0.8, 2.4))
    figure.set_layout_engine("compressed")  # for square cells
    axes = figure.add_subplot()
    colours = shares_map(theme)
    image = axes.imshow(overlaps.numpy(), cmap=colours, vmin=0, vmax=1)
    axes.set_xticks(range(number), list(profiles), rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(number), list(profiles), parse_math=False)
    head(figure, "Experts selected for both, of those for either", theme)
    if number <= _MOST_NUMBERS:
        for row in range(number):
            for column in range(number):
                value = float(overlaps[row, column])
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=FONT - 1,
                    color=_readable_on(colours(value)),
                )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, label="Jaccard", pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    dress(figure, theme)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _readable_on(colour: tuple[float, float, float, float]) -> str:
    red, green, blue, _ = colour
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
