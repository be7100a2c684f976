"""The numbers behind the figures, against naive counts and the paper's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_sieve import RoutingProfile, SieveError, select_experts
from peft_sieve.routing.comparison import coverage_curves, jaccard_matrix, resampled_stability, smaller_sample_stability


def test_curves_are_the_coverage_of_every_k(olmoe: dict[str, RoutingProfile]) -> None:
    profile = olmoe["gsm8k"]
    for score in ("count", "mass"):
        curves = coverage_curves(profile, score=score)
        assert list(curves) == list(profile.counts)
        for k in (1, 7, 16, 64):
            selected = select_experts(profile, top_k=k, score=score).coverage(profile, score=score)
            assert {layer: curve[k - 1] for layer, curve in curves.items()} == pytest.approx(selected, abs=1e-12)
    mean = np.mean([curve[15] for curve in coverage_curves(profile).values()])
    assert f"{mean:.1%}" == "56.7%"  # MoE-Sieve, Table 9


def test_curves_of_layers_of_several_sizes_and_without_tokens() -> None:
    profile = RoutingProfile(counts={"a": [1, 3], "b": [0, 0, 0], "c": [2, 2, 4]})
    assert coverage_curves(profile) == {"a": [0.75, 1.0], "c": [0.5, 0.75, 1.0]}
    with pytest.raises(SieveError, match="needs a profile with mass"):
        coverage_curves(profile, score="mass")


def test_jaccard_between_data_sets(olmoe: dict[str, RoutingProfile]) -> None:
    some = {name: olmoe[name] for name in ("gsm8k", "mbpp", "wikitext")}
    matrix = jaccard_matrix(some, top_k=8)
    naive = torch.eye(3, dtype=torch.float64)
    hottest = [{layer: set(c.topk(8).indices.tolist()) for layer, c in p.counts.items()} for p in some.values()]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        shares = [len(hottest[i][n] & hottest[j][n]) / len(hottest[i][n] | hottest[j][n]) for n in hottest[i]]
        naive[i, j] = naive[j, i] = sum(shares) / len(shares)
    torch.testing.assert_close(matrix, naive)


def test_profiles_of_different_models_do_not_compare(olmoe: dict[str, RoutingProfile]) -> None:
    with pytest.raises(SieveError, match="the profiles 'gsm8k' and 'small'"):
        jaccard_matrix({"gsm8k": olmoe["gsm8k"], "small": RoutingProfile.from_arrays([[1, 2]])})
    with pytest.raises(SieveError, match="no routing profile"):
        jaccard_matrix({})


def test_parts_agree_more_the_larger_they_are(olmoe: dict[str, RoutingProfile]) -> None:
    profile = olmoe["gsm8k"]
    few, more, many, whole = resampled_stability(profile, [1e-5, 1e-3, 0.1, 1.0], repeats=2, top_k=16)
    # Without knowledge, two draws of 16 of 64 agree by about 4 / 28.
    assert 1 / 7 < few < more < many < whole == 1.0
    assert resampled_stability(profile, [1e-3], repeats=2) == resampled_stability(profile, [1e-3], repeats=2)


def test_a_part_is_drawn_from_what_was_counted() -> None:
    # All but one dispatch: whichever is left out, the order of the experts stays.
    profile = RoutingProfile(counts={"a": [0, 10, 5, 0], "b": [0, 0, 0, 0]})
    assert resampled_stability(profile, [14 / 15, 1 / 15], top_k=1, repeats=20, seed=1)[0] == 1.0
    # A single one may hit either; never an expert without tokens, so the two hottest are hit or shared.
    single = resampled_stability(profile, [1 / 15], top_k=1, repeats=200)[0]
    assert 0.55 < single < 0.78  # two thirds of the draws are of the hottest
    with pytest.raises(SieveError, match="fraction must be .*got 0"):
        resampled_stability(profile, [0])


def test_counts_beyond_what_can_be_drawn_exactly() -> None:
    profile = RoutingProfile(counts={"a": [4 * 10**9, 10**9, 10**9 - 10**7, 7]})
    assert resampled_stability(profile, [0.5], top_k=1, repeats=1) == [1.0]


def test_smaller_samples_of_a_data_set() -> None:
    def sample(counts: list[int], tokens: int | None, data: str | None, model: str = "m") -> RoutingProfile:
        metadata = {"dataset": data, "model": model} if data else {}
        return RoutingProfile(counts={"a": counts}, num_tokens=tokens, metadata=metadata)

    profiles = {
        "large": sample([9, 8, 1, 0], 18, "text"),
        "medium": sample([5, 1, 4, 0], 10, "text"),
        "small": sample([2, 1, 0, 0], 3, "text"),
        "alone": sample([1, 1, 1, 1], 4, "other"),
        "other model": sample([1, 1, 1, 1], 2, "text", "n"),
        "unknown size": sample([1, 1, 1, 1], None, "text"),
        "unknown data": sample([1, 1, 1, 1], 1, None),
    }
    assert smaller_sample_stability(profiles, top_k=2) == {"text": [("small", 3, 1.0), ("medium", 10, 1 / 3)]}
