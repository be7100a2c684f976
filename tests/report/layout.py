"""Whether the texts of a figure can be read: none over another, none beyond the edge."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Affine2D


def visible_texts(figure: Figure) -> list[Text]:
    """Everything written in a figure."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            # An axis also makes labels for ticks beyond its ends, and does not draw them.
            hidden |= {id(tick.label1) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
            hidden |= {id(tick.label2) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in texts if id(text) not in hidden]


def check_layout(figure: Figure) -> None:
    """No text overlaps another or leaves the figure."""
    renderer = figure.canvas.get_renderer()
    outlines = [(text.get_text(), _outline(text, renderer)) for text in visible_texts(figure)]
    for text, outline in outlines:
        box = outline.get_extents()
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for i, (text, outline) in enumerate(outlines):
        for other_text, other in outlines[:i]:
            assert not outline.intersects_path(other), f"{text!r} over {other_text!r}"


def _outline(text: Text, renderer: Any) -> Path:
    """The rectangle that a text fills, rotated as it is."""
    angle = text.get_rotation()
    if angle % 90 and text.get_rotation_mode() == "anchor":
        text.set_rotation(0)
        box = text.get_window_extent(renderer)
        text.set_rotation(angle)
        anchor = text.get_transform().transform(text.get_unitless_position())
        turn = Affine2D().rotate_deg_around(*anchor, angle)
    else:
        box, turn = text.get_window_extent(renderer), Affine2D()
    corners = [(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)]
    return Path([*corners, corners[0]], closed=True).transformed(turn)
