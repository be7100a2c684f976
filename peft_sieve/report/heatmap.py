"""A picture of a router: which share of its tokens each layer sends to each expert."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..routing.profile import RoutingProfile, check_profile
from ..routing.selection import ExpertSelection
from .canvas import FONT, dress, new_figure, save_png, shares_map
from .themes import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLE = "Share of its layer's routed tokens that each expert receives"
_OUTLINE_WIDTH = 1.0  # points
# Inches. A cell is as large as a line of text where there is room, and never too small to see its outline.
_LARGEST_CELL, _SMALLEST_CELL, _WIDEST_GRID, _TALLEST_GRID = 0.28, 0.08, 10.0, 9.0
_SMALLEST_GRID = (4.0, 1.2)  # the title and the colour bar need that much
_RIGHT, _TOP, _BOTTOM = 0.95, 0.75, 0.55
_LINE, _CHARACTER = 0.15, 0.07  # height of a line of tick labels, width of a character of one
_LONGEST_LABEL = 30  # characters


def save_heatmap(
    profile: RoutingProfile,
    path: str | os.PathLike[str],
    selection: Mapping[str, Iterable[int]] | None = None,
) -> None:
    """Draw each layer's routed tokens over its experts, as a PNG file.

    One row a layer, the first on top, one column an expert id. The colour is the expert's share of the tokens routed in
    its layer; a layer that no token reached is all 0. The colour bar marks the share that every expert would get from
    a uniform router, if the layers have as many experts. Places without an expert, in layers that have fewer than
    others, are hatched.

    Args:
        profile: what the router did.
        path: file to write, whatever its suffix; an older file there is replaced.
        selection: layer name -> ids of the experts to outline, for example those to adapt.

    Raises:
        SieveError: if matplotlib is not installed, nothing can be written to `path`, or the selection names a layer or
            an expert that the profile lacks.
    """
    save_png(heatmap_figure(profile, selection), path, "heat map")


def heatmap_figure(
    profile: RoutingProfile, selection: Mapping[str, Iterable[int]] | None = None, *, theme: Theme = LIGHT
) -> Figure:
    """The picture that `save_heatmap` writes, as a figure of matplotlib.

    Args:
        profile: what the router did.
        selection: layer name -> ids of the experts to outline.
        theme: `LIGHT` or `DARK`.

    Raises:
        SieveError: if matplotlib is not installed, or the selection names a layer or an expert that the profile lacks.
    """
    check_profile(profile)
    chosen = ExpertSelection(selection or {})
    chosen.coverage(profile)  # raises for layers and experts of another model
    shares = _shares(profile)
    num_layers, num_experts = shares.shape
    labels, layers = short_names(list(profile.counts))
    grid = _Grid(num_layers, num_experts, left=0.45 + _CHARACTER * max(map(len, labels)))
    figure = new_figure(*grid.figure_size, constrained=False)
    from matplotlib.collections import PolyCollection

    axes = figure.add_axes(grid.place(grid.left, grid.width))
    image = axes.pcolormesh(100 * shares.numpy(), cmap=shares_map(theme), vmin=0)
    boxes = PolyCollection(_outlines(profile, chosen, grid), facecolors="none", edgecolors=theme.emphasis)
    boxes.set(linewidth=_OUTLINE_WIDTH, zorder=3)  # above the frame (2.5), which would hide the outer sides
    axes.add_collection(boxes)
    axes.set(xlim=(0, num_experts), ylim=(num_layers, 0))
    # Side by side, labels of three digits need twice the room of a line.
    axes.set_xticks(*_ticks([str(expert) for expert in range(num_experts)], grid.width / (2 * _LINE)))
    axes.set_yticks(*_ticks(labels, grid.height / _LINE))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for text, line, size in ((_TITLE, 0, FONT + 2), (layers, 1, FONT), (_summary(profile, chosen), 2, FONT)):
        x, y = 0.12 / grid.figure_size[0], 1 - (0.12 + 0.2 * line) / grid.figure_size[1]
        figure.text(x, y, text, fontsize=size, va="top", parse_math=False, color=theme.text)

    bar_axes = figure.add_axes(grid.place(grid.left + grid.width + 0.15, 0.14))
    bar = figure.colorbar(image, cax=bar_axes, format="%.3g%%")
    bar.outline.set_visible(False)
    uniform = _uniform_share(profile)
    if uniform is not None:
        bar_axes.axhline(100 * uniform, color=theme.text, linewidth=1.5)
    dress(figure, theme)
    axes.patch.set(hatch="////", edgecolor=theme.quiet)  # seen where the image has no value
    for spine in axes.spines.values():
        spine.set_visible(True)
    return figure


class _Grid:
    """Where the cells stand in the figure; all sizes in inches."""

    def __init__(self, num_layers: int, num_experts: int, left: float) -> None:
        self.left = left
        self.width = max(num_experts * _cell(num_experts, _WIDEST_GRID), _SMALLEST_GRID[0])
        self.height = max(num_layers * _cell(num_layers, _TALLEST_GRID), _SMALLEST_GRID[1])
        self.cell = (self.width / num_experts, self.height / num_layers)
        self.figure_size = (left + self.width + _RIGHT, _TOP + self.height + _BOTTOM)

    def place(self, left: float, width: float) -> tuple[float, float, float, float]:
        """A rectangle as high as the grid, in shares of the figure."""
        across, up = self.figure_size
        return left / across, _BOTTOM / up, width / across, self.height / up


def _cell(number: int, space: float) -> float:
    """Inches for each of `number` rows or columns in `space` inches; more space than that if they would vanish."""
    return max(min(space / number, _LARGEST_CELL), _SMALLEST_CELL)


def _shares(profile: RoutingProfile) -> Tensor:
    """Share of its layer's tokens that each expert gets, `(layers, most experts)`; NaN where there is no expert."""
    most = max(len(counts) for counts in profile.counts.values())
    shares = torch.full((len(profile.counts), most), torch.nan, dtype=torch.float64)
    for row, counts in zip(shares, profile.counts.values(), strict=True):
        row[: len(counts)] = counts / max(int(counts.sum()), 1)
    return shares


def _outlines(profile: RoutingProfile, selection: ExpertSelection, grid: _Grid) -> list[list[tuple[float, float]]]:
    """The corners (x, y) of a rectangle just inside each selected cell, so that those of neighbours stay apart."""
    # In cells; an outline's centre line keeps two thirds of its width from the border.
    dx, dy = (2 / 3 * _OUTLINE_WIDTH / 72 / inches for inches in grid.cell)
    return [
        [(x + dx, y + dy), (x + 1 - dx, y + dy), (x + 1 - dx, y + 1 - dy), (x + dx, y + 1 - dy)]
        for y, layer in enumerate(profile.counts)
        for x in selection.get(layer, ())
    ]


def _ticks(labels: Sequence[str], room: float) -> tuple[list[float], list[str]]:
    """Where to write which labels: each, or every 2nd, 4th, 8th, ... so that no more than `room` stand in a row."""
    step = 1
    while len(labels) / step > room:
        step *= 2
    return [index + 0.5 for index in range(0, len(labels), step)], list(labels[::step])


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """What tells the layers apart, and what they have in common with a star in its place.

    `a.0.b` and `a.1.b` become `0` and `1` and the pattern `a.*.b`.
    """
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts)) - 1  # something must be left of each
    start = next((i for i in range(shortest) if len({name[i] for name in parts}) > 1), shortest)
    room = shortest - start
    end = next((i for i in range(room) if len({name[-1 - i] for name in parts}) > 1), room)
    labels = [".".join(name[start : len(name) - end]) for name in parts]
    pattern = ".".join([*parts[0][:start], "*", *parts[0][len(parts[0]) - end :]])
    return [name if len(name) <= _LONGEST_LABEL else f"...{name[3 - _LONGEST_LABEL :]}" for name in labels], pattern


def _uniform_share(profile: RoutingProfile) -> float | None:
    """What every expert would get from a uniform router; None if layers have different numbers of experts."""
    sizes = {len(counts) for counts in profile.counts.values()}
    return 1 / sizes.pop() if len(sizes) == 1 else None


def _summary(profile: RoutingProfile, selection: ExpertSelection) -> str:
    parts = [] if profile.num_tokens is None else [f"{profile.num_tokens:,} tokens"]
    selected, total = sum(map(len, selection.values())), sum(map(len, profile.counts.values()))
    if selected:
        parts.append(f"outlined: {selected:,} of {total:,} experts")
    uniform = _uniform_share(profile)
    if uniform is not None:
        parts.append(f"line in the colour bar: uniform share, {100 * uniform:.3g}%")
    return "; ".join(parts)
