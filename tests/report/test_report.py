"""The table and the heat map, drawn from real telemetry and from profiles of other shapes."""

import builtins
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from peft_sieve import RoutingProfile, SieveError, select_experts
from peft_sieve.report.heatmap import save_heatmap
from peft_sieve.report.tables import coverage_table

TELEMETRY = Path(__file__).parents[1] / "data" / "olmoe_1b_7b.npz"


@pytest.fixture(scope="module")
def gsm8k() -> RoutingProfile:
    with numpy.load(TELEMETRY) as arrays:
        return RoutingProfile.from_arrays(arrays["gsm8k.counts"], arrays["gsm8k.mass"], num_experts_per_tok=8)


def test_the_table_has_a_line_a_layer_and_the_papers_coverage(gsm8k: RoutingProfile) -> None:
    selection = select_experts(gsm8k)
    lines = coverage_table(gsm8k, selection).splitlines()
    assert len(lines) == 16 + 4  # header, two rules, sum
    assert {len(line) for line in lines} == {len(lines[0])}
    for name, line in zip(gsm8k.layer_names, lines[2:18], strict=True):
        assert line.split()[:4] == [name, "16", "of", "64"]
        assert f"{selection.coverage(gsm8k)[name]:.1%}" in line
    assert "256 of 1024" in lines[-1]
    assert "56.7%" in lines[-1]  # MoE-Sieve, Table 9


def test_the_table_of_a_layer_without_tokens() -> None:
    profile = RoutingProfile.from_arrays([[3, 1], [0, 0]])
    table = coverage_table(profile, {"layers.0": [0]}).splitlines()
    assert "75.0%" in table[2]
    assert table[3].split() == ["layers.1", "0", "of", "2", "-", "-", "-"]


def test_a_selection_of_another_model() -> None:
    with pytest.raises(SieveError, match="elsewhere"):
        coverage_table(RoutingProfile.from_arrays([[3, 1]]), {"elsewhere": [0]})


def _shape(layers: int, experts: int) -> RoutingProfile:
    generator = torch.Generator().manual_seed(0)
    return RoutingProfile.from_arrays(torch.randint(0, 1000, (layers, experts), generator=generator))


@pytest.mark.parametrize("profile", [_shape(6, 32), _shape(48, 128), RoutingProfile.from_arrays([[1, 2, 3], [4, 5]])])
def test_a_heat_map_of_any_shape(profile: RoutingProfile, tmp_path: Path) -> None:
    save_heatmap(profile, tmp_path / "map.png", select_experts(profile))
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert len(set(picture.convert("L").tobytes())) > 20  # something is drawn


def test_the_selection_is_marked(gsm8k: RoutingProfile, tmp_path: Path) -> None:
    save_heatmap(gsm8k, tmp_path / "plain.png")
    save_heatmap(gsm8k, tmp_path / "marked.png", select_experts(gsm8k))
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "marked.png").read_bytes()


def test_without_matplotlib(gsm8k: RoutingProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(SieveError, match=r"pip install peft-sieve\[report\]"):
        save_heatmap(gsm8k, tmp_path / "map.png")
    assert not list(tmp_path.iterdir())
