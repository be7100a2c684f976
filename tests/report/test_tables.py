"""The coverage table: its numbers against those of the selection and the statistics, and its layout."""

import math
from pathlib import Path

import numpy as np
import pytest

from peft_sieve import RoutingProfile, SieveError, routing_statistics, select_experts
from peft_sieve.report.tables import coverage_table

TELEMETRY = Path(__file__).parent.parent / "data" / "olmoe_1b_7b.npz"


@pytest.fixture(scope="module")
def olmoe() -> RoutingProfile:
    """Real routing of OLMoE-1B-7B on GSM8K."""
    arrays = np.load(TELEMETRY)
    names = [f"model.layers.{layer}.mlp.experts" for layer in range(16)]
    return RoutingProfile.from_arrays(arrays["gsm8k.counts"], num_experts_per_tok=8, layer_names=names)


def test_a_small_table_in_full():
    profile = RoutingProfile.from_arrays([[70, 10, 10, 10], [10, 40, 30, 20]], layer_names=["layers.0", "layers.10"])
    assert coverage_table(profile, {"layers.0": [0], "layers.10": [1, 2]}).split("\n") == [
        "layer       adapted  coverage    cold    CV",
        "-------------------------------------------",
        "layers.0     1 of 4     70.0%  3 of 4  1.04",
        "layers.10    2 of 4     70.0%  1 of 4  0.45",
        "-------------------------------------------",
        "all layers   3 of 8     70.0%  4 of 8  0.74",
    ]


def test_real_routing_against_selection_and_statistics(olmoe):
    selection = select_experts(olmoe, top_k_frac=0.25)
    coverage, statistics = selection.coverage(olmoe), routing_statistics(olmoe)
    lines = coverage_table(olmoe, selection).split("\n")
    assert len({len(line) for line in lines}) == 1
    rows = [line.split() for line in lines[2:18]]
    for (name, *cells), layer in zip(rows, olmoe.layer_names, strict=True):
        measured = statistics.layers[layer]
        cold = str(round(64 * measured.cold_fraction))
        assert name == layer
        assert cells == ["16", "of", "64", f"{coverage[layer]:.1%}", cold, "of", "64", f"{measured.cv:.2f}"]
    cold = sum(round(64 * layer.cold_fraction) for layer in statistics.layers.values())
    mean = math.fsum(coverage.values()) / 16
    total = ["all", "layers", "256", "of", "1024", f"{mean:.1%}", str(cold), "of", "1024"]
    assert lines[19].split() == [*total, f"{statistics.mean_layer_cv:.2f}"]


def test_the_score_that_coverage_is_a_share_of():
    profile = RoutingProfile.from_arrays([[3, 1]], [[0.2, 1.8]])
    by_count, by_mass = (coverage_table(profile, {"layers.0": [0]}, score=score) for score in ("count", "mass"))
    assert "75.0%" in by_count
    assert "10.0%" in by_mass


def test_the_mask_of_a_configuration_with_layers_left_out(olmoe):
    first = olmoe.layer_names[0]
    lines = coverage_table(olmoe, {first: [3]}).split("\n")
    assert lines[2].split()[1:4] == ["1", "of", "64"]
    assert lines[3].split()[1:5] == ["0", "of", "64", "0.0%"]
    assert lines[19].split()[2:5] == ["1", "of", "1024"]
    # An empty list is how all experts of a layer share one adapter.
    assert coverage_table(olmoe, {first: [3], olmoe.layer_names[1]: []}).split("\n") == lines


def test_layers_without_tokens_and_layers_of_several_sizes():
    profile = RoutingProfile(counts={"a": [4, 0], "b": [0, 0, 0]})
    lines = coverage_table(profile, {"a": [0], "b": [2]}).split("\n")
    assert lines[2].split() == ["a", "1", "of", "2", "100.0%", "1", "of", "2", "1.00"]
    assert lines[3].split() == ["b", "1", "of", "3", "-", "-", "-"]
    assert lines[5].split() == ["all", "layers", "2", "of", "5", "100.0%", "1", "of", "2", "1.00"]
    empty = coverage_table(RoutingProfile(counts={"a": [0, 0]}), {}).split("\n")
    assert empty[-1].split() == ["all", "layers", "0", "of", "2", "-", "-", "-"]


def test_a_selection_for_another_model(olmoe):
    with pytest.raises(SieveError, match="profile of the same model"):
        coverage_table(olmoe, {"model.layers.99.mlp.experts": [0]})
    with pytest.raises(SieveError, match="has 64 experts"):
        coverage_table(olmoe, {olmoe.layer_names[0]: [64]})
