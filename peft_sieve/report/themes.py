"""Colours of figures: a light and a dark look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


# Field: light, dark. The series are the colours of Okabe and Ito that stand out from the background.
_LOOKS: dict[str, tuple[Any, Any]] = {
    "name": ("light", "dark"),
    "background": ("#ffffff", "#0d1117"),
    "text": ("#1f2328", "#e6edf3"),
    "quiet": ("#b5bbc2", "#4d5661"),
    "shares": (
        ("#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b"),
        ("#131c27", "#15395c", "#2a74b0", "#7fbce6", "#f0f8ff"),
    ),
    "emphasis": ("#D55E00", "#FF9E3D"),
    "series": (
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"),
        ("#56B4E9", "#FF8A3D", "#2BC79A", "#E79AC6", "#F0E442", "#6E8FE8", "#C9D1D9"),
    ),
    "depth": ("viridis_r", "viridis"),
    "depth_range": ((0.1, 1.0), (0.3, 1.0)),
}
LIGHT = Theme(**{field: light for field, (light, _) in _LOOKS.items()})
DARK = Theme(**{field: dark for field, (_, dark) in _LOOKS.items()})
