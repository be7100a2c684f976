"""A figure that a notebook shows by itself, without pyplot."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

DPI = 150
_PAD = 0.1  # inches around the axes


class ReportFigure(Figure):
    """A figure of matplotlib with a canvas of its own; pyplot, which would keep it, does not know of it."""

    def __init__(self, width: float, height: float, constrained: bool) -> None:
        layout = ConstrainedLayoutEngine(w_pad=_PAD, h_pad=_PAD) if constrained else None
        super().__init__(figsize=(width, height), dpi=DPI, layout=layout)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()
