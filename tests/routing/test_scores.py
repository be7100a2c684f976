"""Scores by which experts are selected: those of the package, and registered ones."""

import pytest
import torch

from peft_sieve.errors import SieveError
from peft_sieve.routing import scores as scores_module
from peft_sieve.routing.scores import register_score
from peft_sieve.routing.selection import select_experts
from tests.routing.profiles import profile_of


@pytest.fixture
def scores_restored(monkeypatch):
    monkeypatch.setattr(scores_module, "_SCORES", dict(scores_module._SCORES))


def test_a_registered_score_can_be_used_everywhere(scores_restored):
    register_score("mean_weight", lambda profile, layer: profile.mass[layer] / profile.counts[layer].clamp(min=1))
    profile = profile_of([9, 1, 2], mass=[[0.9, 0.8, 0.4]])
    chosen = select_experts(profile, score="mean_weight", top_k=1)
    assert chosen["layers.0"] == (1,)
    assert chosen.coverage(profile, "mean_weight")["layers.0"] == pytest.approx(0.8 / 1.1)
    with pytest.raises(SieveError, match="'count', 'mass', 'esft_gate', 'esft_token', 'mean_weight', got 'other'"):
        select_experts(profile, score="other")


@pytest.mark.parametrize(
    "values", [[1.0, float("nan")], [1.0, float("inf")], [-1.0, 1.0], [1.0], [[1.0, 1.0]], [1.0, 1.0, 1.0]]
)
def test_a_score_must_give_one_finite_number_an_expert(scores_restored, values):
    register_score("broken", lambda profile, layer: torch.tensor(values))
    with pytest.raises(SieveError, match=r"score 'broken' returns.*2 finite numbers.*layer 'layers.0'"):
        select_experts(profile_of([1, 1]), score="broken")


@pytest.mark.parametrize(("name", "function"), [("", len), (3, len), ("own", None)])
def test_a_score_needs_a_name_and_a_function(scores_restored, name, function):
    with pytest.raises(SieveError, match=f"score.* must be .*got {function if name == 'own' else repr(name)}"):
        register_score(name, function)
    with pytest.raises(SieveError, match="one of 'count', 'mass', 'esft_gate', 'esft_token', got"):
        select_experts(profile_of([1, 2]), score=name)


def test_mass_needs_a_profile_with_mass():
    with pytest.raises(SieveError, match=r"score='mass' needs a profile with mass"):
        select_experts(profile_of([1, 2]), score="mass")
