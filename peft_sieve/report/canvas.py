"""What all figures share: a light and a dark look, a canvas without side effects, and writing the picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import SieveError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from .figure import ReportFigure

FONT = 8  # points
_MARKERS = "osD^vP*X<>"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)))


@dataclass(frozen=True)
class Theme:
    """Colours of a figure.

    Attributes:
        background, text, quiet: of the page, of what is read, and of lines that only guide the eye.
        shares: from none to much of one hue, so that every kind of colour vision sees the order.
        emphasis: a hue that all kinds of colour vision tell from `shares`.
        series: colours for lines, told apart by all kinds of colour vision, and with markers and dashes besides.
        depth: name of a colour map of even steps, from the first layer to the last.
    """

    name: str
    background: str
    text: str
    quiet: str
    shares: tuple[str, ...]
    emphasis: str
    series: tuple[str, ...]
    depth: str
    depth_range: tuple[float, float]


# The series are those of Okabe and Ito that stand out from the background.
LIGHT = Theme(
    name="light",
    background="#ffffff",
    text="#1f2328",
    quiet="#b5bbc2",
    shares=("#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b"),
    emphasis="#D55E00",
    series=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"),
    depth="viridis_r",
    depth_range=(0.1, 1.0),
)
DARK = Theme(
    name="dark",
    background="#0d1117",
    text="#e6edf3",
    quiet="#4d5661",
    shares=("#131c27", "#15395c", "#2a74b0", "#7fbce6", "#f0f8ff"),
    emphasis="#FF9E3D",
    series=("#56B4E9", "#FF8A3D", "#2BC79A", "#E79AC6", "#F0E442", "#6E8FE8", "#C9D1D9"),
    depth="viridis",
    depth_range=(0.3, 1.0),
)
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


def new_figure(width: float = 7.0, height: float = 4.0, *, constrained: bool = True) -> ReportFigure:
    """An empty figure, sizes in inches, that no window system or pyplot knows of.

    Args:
        constrained: make room for labels by itself.

    Raises:
        SieveError: if matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401  (first, so that its absence is what the sentence names)

        from .figure import ReportFigure
    except ImportError as error:
        raise SieveError(
            f"figures are drawn with matplotlib, which cannot be imported ({error}): pip install peft-sieve[report]"
        ) from error
    return ReportFigure(width, height, constrained)


def dress(figure: Figure, theme: Theme) -> None:
    """Give everything drawn so far the theme's background, text colours and sizes."""
    figure.set_facecolor(theme.background)
    for axes in figure.axes:
        axes.set_facecolor(theme.background)
        axes.tick_params(which="both", color=theme.quiet, labelcolor=theme.text, labelsize=FONT, length=2)
        for side, spine in axes.spines.items():
            spine.set(edgecolor=theme.quiet, visible=spine.get_visible() and side in ("left", "bottom"))
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=theme.text, fontsize=FONT + 1)
        for title in (axes.title, axes._left_title, axes._right_title):  # type: ignore[attr-defined]
            title.set(color=theme.text, fontsize=FONT + 2, parse_math=False)
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
        if legend is not None:
            legend.get_frame().set(facecolor=theme.background, edgecolor="none")
            for text in legend.get_texts():
                text.set(color=theme.text, fontsize=FONT, parse_math=False)


def head(figure: Figure, title: str, theme: Theme) -> None:
    """A title over the whole width, legend included."""
    figure.suptitle(title, x=0.02, ha="left", fontsize=FONT + 2, color=theme.text)


def shares_map(theme: Theme) -> Colormap:
    """The colour map of shares."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(f"peft_sieve_{theme.name}", list(theme.shares))


def series_style(position: int, theme: Theme) -> dict[str, Any]:
    """How to draw the line of that position: colour, marker and dashes, repeated late enough to tell lines apart."""
    return {
        "color": theme.series[position % len(theme.series)],
        "marker": _MARKERS[position % len(_MARKERS)],
        "linestyle": _DASHES[position // len(theme.series) % len(_DASHES)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def legend_beside(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """A legend to the right of the axes; the figure grows until it has room for it."""
    handles = axes.get_legend_handles_labels()[0]
    figure.legend(
        handles, list(names), loc="outside right center", handlelength=3.2, borderaxespad=0.8, labelspacing=0.5
    )
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, max(height, 0.8 + 0.19 * len(names)))


def save_png(figure: Figure, path: str | os.PathLike[str], what: str) -> None:
    """Write the figure as a PNG file, whatever the path's suffix.

    Raises:
        SieveError: if nothing can be written there.
    """
    try:
        figure.savefig(path, format="png", dpi=figure.dpi)
    except OSError as error:
        raise SieveError(
            f"could not write the {what} to {os.fspath(path)} ({error.strerror or error}), expected a file name in a "
            "writable folder: create the folder or choose another path"
        ) from error
