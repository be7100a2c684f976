"""Figures of coverage, depth, overlap and stability: what they draw, and that it can be read, light and dark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from peft_sieve import RoutingProfile, SieveError, routing_statistics, select_experts
from peft_sieve.report import (
    DARK,
    LIGHT,
    Theme,
    cold_figure,
    coverage_figure,
    heatmap_figure,
    overlap_figure,
    stability_figure,
)
from peft_sieve.routing.comparison import coverage_curves, jaccard_matrix
from tests.report.layout import check_layout, visible_texts

TELEMETRY = Path(__file__).parents[1] / "data" / "olmoe_1b_7b.npz"
THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])


@pytest.fixture(scope="module")
def olmoe() -> dict[str, RoutingProfile]:
    with np.load(TELEMETRY) as arrays:
        names = sorted({key.split(".")[0] for key in arrays})
        return {name: RoutingProfile.from_arrays(arrays[f"{name}.counts"], num_experts_per_tok=8) for name in names}


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in visible_texts(figure)]


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def check(figure: Figure, theme: Theme) -> None:
    """Nothing overlaps, everything contrasts with the background, and a notebook gets a picture."""
    figure.draw_without_rendering()
    check_layout(figure)
    assert to_hex(figure.get_facecolor()) == theme.background
    in_cells = {id(text) for axes in figure.axes for text in axes.texts}
    for text in visible_texts(figure):
        if id(text) not in in_cells:
            assert contrast(text.get_color(), theme.background) > 7, text.get_text()
    assert figure._repr_png_().startswith(b"\x89PNG")


@THEMES
def test_coverage_of_real_routing(olmoe: dict[str, RoutingProfile], theme: Theme) -> None:
    profile = olmoe["gsm8k"]
    figure = coverage_figure(profile, select_experts(profile), title="gsm8k", theme=theme)
    check(figure, theme)
    curves, lines = coverage_curves(profile), figure.axes[0].lines
    drawn = [line.get_ydata() for line in lines if len(line.get_xdata()) == 65]
    assert len(drawn) == 16 + 1
    for line, curve in zip(drawn, curves.values(), strict=False):
        np.testing.assert_allclose(line, [0, *(100 * share for share in curve)])
    np.testing.assert_allclose(drawn[16], np.mean(drawn[:16], axis=0))
    dots = [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in lines
        if line.get_marker() == "o" and len(line.get_xdata())
    ]
    assert dots == [(16, pytest.approx(100 * curve[15])) for curve in curves.values()]
    assert "selected: 16 a layer, 56.7%" in texts_of(figure)


def test_coverage_of_a_selection_that_is_not_the_hottest(olmoe: dict[str, RoutingProfile]) -> None:
    profile = olmoe["gsm8k"]
    selection = select_experts(profile, strategy="random")
    figure = coverage_figure(profile, selection)
    dots = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert dots == pytest.approx([100 * share for share in selection.coverage(profile).values()])


@pytest.mark.parametrize(
    "profile",
    [
        RoutingProfile(counts={"a": [3, 1], "b": [1, 2, 5], "c": [0, 0]}),
        RoutingProfile(counts={"a": [3, 1]}),
        RoutingProfile(counts={"a": [0, 0]}),
        RoutingProfile.from_arrays(np.arange(94 * 256).reshape(94, 256) % 97),
    ],
    ids=["ragged", "one layer", "no tokens", "94 layers of 256"],
)
def test_coverage_of_other_shapes(profile: RoutingProfile) -> None:
    check(coverage_figure(profile), LIGHT)
    check(cold_figure({"p": profile}), LIGHT)


@THEMES
def test_cold_experts_of_ten_data_sets(olmoe: dict[str, RoutingProfile], theme: Theme) -> None:
    figure = cold_figure(olmoe, theme=theme)
    check(figure, theme)
    lines = figure.axes[0].lines
    for line, profile in zip(lines, olmoe.values(), strict=True):
        cold = [100 * layer.cold_fraction for layer in routing_statistics(profile).layers.values()]
        np.testing.assert_allclose(line.get_ydata(), cold)
        assert contrast(line.get_color(), theme.background) > 2
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 10
    assert len({line.get_marker() for line in lines}) == 10
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == list(olmoe)


@THEMES
def test_overlap_of_ten_data_sets(olmoe: dict[str, RoutingProfile], theme: Theme) -> None:
    figure = overlap_figure(olmoe, theme=theme, top_k=16)
    check(figure, theme)
    matrix = jaccard_matrix(olmoe, top_k=16)
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), matrix)
    assert [text.get_text() for text in axes.texts] == [f"{value:.2f}" for value in matrix.flatten().tolist()]
    for text, value in zip(axes.texts, matrix.flatten().tolist(), strict=True):
        assert contrast(text.get_color(), to_hex(axes.images[0].cmap(value))) > 4


def test_overlap_of_many_and_of_one(olmoe: dict[str, RoutingProfile]) -> None:
    many = {f"a data set with a long name, number {i}": olmoe["gsm8k"] for i in range(30)}
    figure = overlap_figure(many)
    check(figure, LIGHT)
    assert not figure.axes[0].texts  # no room for numbers
    with pytest.raises(SieveError, match="at least 2 routing profiles, got 1"):
        overlap_figure({"gsm8k": olmoe["gsm8k"]})


@THEMES
def test_stability_of_ten_data_sets(olmoe: dict[str, RoutingProfile], theme: Theme) -> None:
    figure = stability_figure(olmoe, theme=theme)
    check(figure, theme)
    for line, profile in zip(figure.axes[0].lines, olmoe.values(), strict=True):
        assert line.get_xdata()[0] == pytest.approx(32)
        assert line.get_xdata()[-1] == profile.num_tokens
        assert line.get_ydata()[-1] == 1.0


def test_stability_of_real_samples() -> None:
    counts = np.random.default_rng(0).gamma(0.5, 1000, size=(4, 16)).astype(np.int64)

    def sample(divisor: int) -> RoutingProfile:
        rows = {f"layers.{i}": row // divisor for i, row in enumerate(counts)}
        return RoutingProfile(counts=rows, num_tokens=int(counts.sum()) // 8 // divisor, metadata={"dataset": "text"})

    figure = stability_figure({"half": sample(2), "all": sample(1), "tenth": sample(10)})
    check(figure, LIGHT)
    best_case, real = figure.axes[0].lines
    assert list(real.get_xdata()) == [sample(10).num_tokens, sample(2).num_tokens]
    assert best_case.get_color() == real.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all", "all, real samples"]


def test_stability_where_the_tokens_are_not_known(olmoe: dict[str, RoutingProfile]) -> None:
    profile = RoutingProfile(counts=olmoe["gsm8k"].counts)
    figure = stability_figure({"p": profile})
    check(figure, LIGHT)
    assert "part of the profile, %" in texts_of(figure)


def test_the_dark_heat_map(olmoe: dict[str, RoutingProfile]) -> None:
    check(heatmap_figure(olmoe["gsm8k"], select_experts(olmoe["gsm8k"]), theme=DARK), DARK)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_colours_of_shares_are_in_order(theme: Theme) -> None:
    """More is farther from the background, also without colour vision."""
    steps = [contrast(colour, theme.background) for colour in theme.shares]
    assert steps == sorted(steps)
    assert steps[-1] > 10


def test_names_are_no_formulas(olmoe: dict[str, RoutingProfile]) -> None:
    odd = {"a $x^2$ <b>": olmoe["gsm8k"], "$unfinished": olmoe["mbpp"]}
    for figure in (
        cold_figure(odd),
        overlap_figure(odd),
        stability_figure(odd),
        coverage_figure(odd["$unfinished"], title="$x"),
    ):
        check(figure, LIGHT)
