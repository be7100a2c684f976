"""What all figures share: a canvas without side effects, one look, and the picture as PNG.

matplotlib is not installed everywhere and slow to import, so only functions that draw import it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import SieveError
from ..files import write_file
from .themes import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

FONT = 8  # points
DPI = 150
_PAD = 0.1  # inches around the axes
_MARKERS = "osD^vP*X<>"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)))


def new_figure(width: float = 7.0, height: float = 4.0, *, constrained: bool = True) -> Figure:
    """An empty figure, sizes in inches, that no window system or pyplot knows of.

    Args:
        constrained: make room for labels by itself.

    Raises:
        SieveError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise SieveError(
            f"Figures need matplotlib, which cannot be imported ({error}). Run `pip install peft-sieve[report]`."
        ) from error
    layout = ConstrainedLayoutEngine(w_pad=_PAD, h_pad=_PAD) if constrained else None
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    # Notebooks call it to show an object; without pyplot, matplotlib's own figures do not have it.
    figure._repr_png_ = partial(as_png, figure)  # type: ignore[attr-defined]
    return figure


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


def as_png(figure: Figure) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def save_png(figure: Figure, path: str | os.PathLike[str], what: str) -> None:
    """Write the figure as a PNG file, whatever the path's suffix.

    Raises:
        SieveError: if nothing can be written there.
    """
    write_file(path, as_png(figure), what)
