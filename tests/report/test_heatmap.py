"""The heat map: what is drawn, read back from matplotlib's objects and from the pixels of the file."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from peft_sieve import RoutingProfile, SieveError, select_experts
from peft_sieve.report import heatmap
from peft_sieve.report.heatmap import save_heatmap
from tests.report.layout import check_layout, visible_texts

TELEMETRY = Path(__file__).parent.parent / "data" / "olmoe_1b_7b.npz"
OUTLINE = np.array(colors.to_rgb("#D55E00"))


def skewed(layers: int, experts: int) -> np.ndarray:
    """Counts (layers, experts) with a few hot experts a layer, as routers have them."""
    return np.random.default_rng(0).gamma(0.5, 1000, size=(layers, experts)).astype(np.int64)


def named(counts: dict[int, np.ndarray] | np.ndarray) -> RoutingProfile:
    rows = counts if isinstance(counts, dict) else dict(enumerate(counts))
    return RoutingProfile(counts={f"model.layers.{layer}.mlp.experts": row for layer, row in rows.items()})


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved, in order."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


def grid_of(figure: Figure) -> Axes:
    return figure.axes[0]


RAGGED = named({0: skewed(1, 8)[0], 1: skewed(1, 64)[0], 2: np.zeros(16, dtype=np.int64)})
SIZES = {
    "tiny-olmoe": named(skewed(6, 32)),
    "OLMoE": named(skewed(16, 64)),
    "Qwen3-30B-A3B": named(skewed(48, 128)),
    "94 layers of 256": named(skewed(94, 256)),
    "ragged": RAGGED,
    "one expert": named(np.ones((1, 1), dtype=np.int64)),
    "no tokens": named(np.zeros((2, 8), dtype=np.int64)),
    "odd names": RoutingProfile(
        counts={
            "encoder.block.1.mlp": [5, 1],
            "decoder.block.1.a_module_with_quite_a_long_name.$x$.mlp": [1, 5],
        }
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("profile", SIZES.values(), ids=SIZES.keys())
def test_labels_of_every_size_of_model_stay_apart(profile, drawn, tmp_path):
    selection = select_experts(profile) if profile != SIZES["no tokens"] and profile != RAGGED else None
    save_heatmap(profile, tmp_path / "map.png", selection)
    check_layout(drawn[0])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_layout_check_can_fail(tmp_path, drawn):
    save_heatmap(SIZES["OLMoE"], tmp_path / "map.png")
    drawn[0].text(0.02, 0.5, "a text across the layers' names, from the left edge")
    with pytest.raises(AssertionError, match="over"):
        check_layout(drawn[0])


def test_real_routing_in_colours_and_outlines(drawn, tmp_path):
    arrays = np.load(TELEMETRY)
    profile = RoutingProfile.from_arrays(arrays["gsm8k.counts"], num_experts_per_tok=8)
    selection = select_experts(profile, top_k_frac=0.25)
    save_heatmap(profile, tmp_path / "map.png", selection)
    axes = grid_of(drawn[0])
    image, outlines = axes.collections
    counts = arrays["gsm8k.counts"]
    np.testing.assert_allclose(image.get_array(), 100 * counts / counts.sum(1, keepdims=True))
    centres = {tuple(np.floor(path.vertices.mean(0)).astype(int)) for path in outlines.get_paths()}
    assert centres == {(e, row) for row, layer in enumerate(profile.counts) for e in selection[layer]}
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(layer) for layer in range(16)]
    assert axes.yaxis_inverted()  # the first layer is on top
    assert any("outlined: 256 of 1,024 experts" in text.get_text() for text in visible_texts(drawn[0]))


def test_the_pixels_of_one_cell(drawn, tmp_path):
    """Hot cells are darker than cold ones, and only the selected cell has a border of the outline's colour."""
    profile = named(np.array([[97, 1, 1, 1], [25, 25, 25, 25]]))
    save_heatmap(profile, tmp_path / "map.png", {"model.layers.0.mlp.experts": [0]})
    pixels = imread(tmp_path / "map.png")[..., :3]

    def cell(layer: int, expert: int) -> np.ndarray:
        (left, bottom), (right, top) = grid_of(drawn[0]).transData.transform([(expert, layer + 1), (expert + 1, layer)])
        height = pixels.shape[0]
        return pixels[round(height - top) : round(height - bottom), round(left) : round(right)]

    def centre(layer: int, expert: int) -> float:
        area = cell(layer, expert)
        return float(area[area.shape[0] // 2, area.shape[1] // 2].mean())

    def has_outline(layer: int, expert: int) -> bool:
        return bool((np.abs(cell(layer, expert) - OUTLINE).max(-1) < 0.05).any())

    assert centre(0, 0) < centre(1, 0) < centre(0, 1)
    assert [has_outline(layer, expert) for layer in (0, 1) for expert in range(4)] == [True] + 7 * [False]


def test_places_without_an_expert_have_no_value(drawn, tmp_path):
    save_heatmap(RAGGED, tmp_path / "map.png")
    values = np.ma.filled(grid_of(drawn[0]).collections[0].get_array(), np.nan)
    assert [int(np.isfinite(row).sum()) for row in values] == [8, 64, 16]
    assert not any("uniform" in text.get_text() for text in visible_texts(drawn[0]))


def test_names_of_layers():
    short = heatmap.short_names
    assert short([f"model.layers.{i}.mlp.experts" for i in (3, 11)]) == (["3", "11"], "model.layers.*.mlp.experts")
    assert short(["a.0.mlp", "b.c.1.mlp"]) == (["a.0", "b.c.1"], "*.mlp")
    assert short(["model.layers.0.experts"]) == (["experts"], "model.layers.0.*")
    assert short(["x", "y"]) == (["x", "y"], "*")
    assert short(["x" * 40, "y"])[0][0] == "..." + "x" * 27


def test_drawing_leaves_pyplot_alone(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    save_heatmap(SIZES["one expert"], tmp_path / "map.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SieveError, match=r"pip install peft-sieve\[report\]"):
        save_heatmap(SIZES["one expert"], tmp_path / "map.png")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(SieveError, match="heat map cannot be written to .*missing"):
        save_heatmap(SIZES["one expert"], tmp_path / "missing" / "map.png")


def test_a_selection_for_another_model(tmp_path):
    with pytest.raises(SieveError, match="profile of the same model"):
        save_heatmap(SIZES["OLMoE"], tmp_path / "map.png", {"model.layers.0.mlp.experts": [64]})
    assert not (tmp_path / "map.png").exists()
