"""ExpertSelection: what it accepts, how it compares, what it covers."""

import copy
import pickle

import numpy as np
import pytest

from peft_sieve.errors import SieveError
from peft_sieve.routing.selection import ExpertSelection
from tests.routing.profiles import profile_of


def test_a_selection_is_an_immutable_mapping():
    source = {"b": [3, 1], "a": (np.int64(2),), "c": []}
    chosen = ExpertSelection(source)
    source["b"].append(9)
    assert dict(chosen) == {"b": (1, 3), "a": (2,), "c": ()}
    assert {type(expert) for experts in chosen.values() for expert in experts} == {int}
    assert list(chosen) == ["b", "a", "c"] and len(chosen) == 3 and "a" in chosen
    assert repr(chosen) == "ExpertSelection(3 layers, 3 experts)"
    with pytest.raises(TypeError):
        chosen["a"] = (1,)
    with pytest.raises(AttributeError, match="cannot be changed"):
        chosen.layers = {}
    with pytest.raises(AttributeError):
        chosen._experts = {}


def test_to_dict_is_plain_and_free_standing():
    chosen = ExpertSelection({"a": [2, 1]})
    plain = chosen.to_dict()
    assert plain == {"a": [1, 2]} and type(plain) is dict and type(plain["a"]) is list
    plain["a"].append(3)
    assert chosen["a"] == (1, 2)
    assert ExpertSelection(chosen.to_dict()) == chosen


def test_selections_compare_by_their_items():
    chosen = ExpertSelection({"a": [1, 2], "b": []})
    assert chosen == ExpertSelection({"b": [], "a": [2, 1]})
    assert chosen == {"a": (1, 2), "b": ()}
    assert chosen != ExpertSelection({"a": [1, 2]})
    assert chosen != ExpertSelection({"a": [1, 3], "b": []})


def test_selections_can_be_pickled_and_copied():
    chosen = ExpertSelection({"b": [1], "a": [0, 5]})
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(chosen, protocol))
        assert again == chosen and list(again) == list(chosen) and type(again) is ExpertSelection
    assert copy.deepcopy(chosen) == copy.copy(chosen) == chosen


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([1, 2], r"mapping from layer name to expert ids, got \[1, 2\]"),
        ({"a": [1, 1]}, "distinct whole numbers"),
        ({"a": [-1]}, "distinct whole numbers"),
        ({"a": [1.0]}, "distinct whole numbers"),
        ({"a": [True]}, "distinct whole numbers"),
        ({"a": ["1"]}, "distinct whole numbers"),
        ({"a": "12"}, "layer 'a'.*distinct whole numbers.*got '12'"),
        ({"a": 3}, "layer 'a'.*distinct whole numbers.*got 3"),
        ({0: [1]}, "name of a layer must be a string, got 0"),
    ],
)
def test_a_selection_refuses_what_are_no_experts(experts, message):
    with pytest.raises(SieveError, match=message):
        ExpertSelection(experts)


def test_coverage_of_a_selection():
    chosen = ExpertSelection({"layers.1": [0], "layers.0": [0, 2], "layers.2": [1]})
    profile = profile_of([5, 1, 4], [1, 0, 3], [0, 0, 0], [1, 1, 1], mass=[[1, 2, 1]] * 4)
    assert chosen.coverage(profile) == {"layers.1": 0.25, "layers.0": 0.9, "layers.2": 0.0}
    assert chosen.coverage(profile, score="mass") == {"layers.1": 0.25, "layers.0": 0.5, "layers.2": 0.5}
    assert ExpertSelection({"layers.0": []}).coverage(profile) == {"layers.0": 0.0}


@pytest.mark.parametrize(
    ("experts", "score", "message"),
    [
        ({"layers.0": [0], "x": [0]}, "count", "not have the layers 'x'"),
        ({"layers.0": [2]}, "count", "Expert 2 of layer 'layers.0' is selected, but the profile has 2"),
        ({"layers.0": [0]}, "mass", "needs a profile with mass"),
        ({"layers.0": [0]}, "weight", "got 'weight'"),
    ],
)
def test_coverage_needs_a_profile_that_fits(experts, score, message):
    with pytest.raises(SieveError, match=message):
        ExpertSelection(experts).coverage(profile_of([1, 2]), score)


def test_jaccard_is_the_mean_over_layers():
    one = ExpertSelection({"a": [0, 1, 2], "b": [0], "c": [], "d": [1]})
    other = ExpertSelection({"d": [], "c": [], "b": [0], "a": [1, 2, 3]})
    assert one.jaccard(other) == other.jaccard(one) == (0.5 + 1 + 1 + 0) / 4
    assert one.jaccard(one) == 1.0
    assert one.jaccard(other.to_dict()) == one.jaccard(other)
    assert ExpertSelection({}).jaccard({}) == 1.0


def test_jaccard_of_different_layers_names_them():
    with pytest.raises(SieveError, match="one of the two selections has 'b', 'c'"):
        ExpertSelection({"a": [0], "b": [0]}).jaccard(ExpertSelection({"a": [0], "c": [0]}))
