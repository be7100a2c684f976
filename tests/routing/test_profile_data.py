"""RoutingProfile: what it accepts, adds, compares, and that its file is whole, exact and told from any other."""

import copy
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from peft_sieve.errors import SieveError
from peft_sieve.routing.profile import RoutingProfile
from peft_sieve.routing.profile_file import HEADER_KEY

COUNTS = [[3, 0, 5], [4, 4, 0]]
MASS = [[0.1, 0.0, 1 / 3], [2.5, 1e-300, 0.0]]


def small_profile() -> RoutingProfile:
    """Two layers of different size in an order that sorting would change, with all the fields set."""
    return RoutingProfile(
        counts={"layers.10.mlp": torch.tensor([3, 0, 5]), "layers.2.mlp": torch.tensor([4, 4])},
        mass={"layers.10.mlp": torch.tensor([0.1, 0.0, 1 / 3]).double(), "layers.2.mlp": torch.tensor([2.5, 1e-20])},
        num_tokens=4,
        num_experts_per_tok=2,
        metadata={"dataset": "gsm8k", "samples": 512, "nested": {"täg": [1.5, None, True]}},
    )


def assert_same(left: RoutingProfile, right: RoutingProfile) -> None:
    """Equal to the bit, in order, types and metadata too: stricter than `==`."""
    assert left.layer_names == right.layer_names
    for mine, theirs in ((left.counts, right.counts), (left.mass or {}, right.mass or {})):
        assert list(mine) == list(theirs)
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert mine[name].numpy().tobytes() == theirs[name].numpy().tobytes()
    assert (left.num_tokens, left.num_experts_per_tok) == (right.num_tokens, right.num_experts_per_tok)
    assert left.metadata == right.metadata


# --- making one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, lambda rows: [np.array(row) for row in rows]])
def test_from_arrays_takes_lists_arrays_and_tensors(convert):
    profile = RoutingProfile.from_arrays(convert(COUNTS), convert(MASS), num_experts_per_tok=2)
    assert profile.layer_names == ("layers.0", "layers.1")
    assert [layer.tolist() for layer in profile.counts.values()] == COUNTS
    assert {layer.dtype for layer in profile.counts.values()} == {torch.int64}
    assert {layer.dtype for layer in profile.mass.values()} == {torch.float64}
    assert profile.mass["layers.0"][0].item() == pytest.approx(0.1, rel=1e-7)
    assert profile.num_experts_per_tok == 2
    assert profile.metadata == {}


def test_python_floats_keep_their_precision():
    """torch would make them float32, which cannot hold 2**24 + 1 or one third."""
    profile = RoutingProfile.from_arrays([[2.0**24 + 1, 0.0]], [[1 / 3, 0.1]])
    assert profile.counts["layers.0"].tolist() == [2**24 + 1, 0]
    assert profile.mass["layers.0"].tolist() == [1 / 3, 0.1]


def test_num_tokens_is_the_largest_layer_total_over_top_k_rounded_down():
    assert RoutingProfile.from_arrays([[3, 4], [1, 0]], num_experts_per_tok=2).num_tokens == 3
    assert RoutingProfile.from_arrays([[3, 4], [1, 0]]).num_tokens is None


def test_layers_may_have_different_numbers_of_experts():
    profile = RoutingProfile.from_arrays([[1, 2, 3], [4, 5]])
    assert [layer.numel() for layer in profile.counts.values()] == [3, 2]


def test_profile_keeps_nothing_of_the_callers_memory():
    counts, mass, metadata = torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]]).double(), {"a": [1]}
    profile = RoutingProfile(counts={"x": counts[0]}, mass={"x": mass[0]}, metadata=metadata)
    counts.zero_(), mass.zero_(), metadata["a"].append(2)
    assert profile.counts["x"].tolist() == [1, 2]
    assert profile.mass["x"].tolist() == [0.5, 0.25]
    assert profile.metadata == {"a": [1]}


def test_mass_follows_the_order_of_the_counts():
    profile = RoutingProfile(counts={"b": [1], "a": [2]}, mass={"a": [0.2], "b": [0.1]})
    assert {name: layer.tolist() for name, layer in profile.mass.items()} == {"b": [0.1], "a": [0.2]}
    assert list(profile.mass) == ["b", "a"]


def test_fields_cannot_be_set():
    with pytest.raises(AttributeError):
        small_profile().num_tokens = 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": [[1, -2]]}, "counts of layer 'layers.0'.*at least 0, got -2"),
        ({"counts": [[1.0, 2.5]]}, "whole numbers.*got 2.5"),
        ({"counts": [[1.0, float("nan")]]}, "whole numbers.*got nan"),
        ({"counts": [[1.0, float("inf")]]}, "whole numbers.*got inf"),
        ({"counts": [[2.0**63, 0.0]]}, "whole numbers.*got 9.22"),
        ({"counts": [[True, False]]}, r"torch\.bool"),
        ({"counts": torch.zeros(1, 2, dtype=torch.complex64)}, r"torch\.complex64"),
        ({"counts": [["many", "few"]]}, "counts of layer 'layers.0' must be numbers"),
        ({"counts": [[10**30, 1]]}, "counts of layer 'layers.0' must be numbers"),
        ({"counts": torch.zeros(1, 2, device="meta")}, "counts of layer 'layers.0' must be numbers"),
        ({"counts": [1, 2]}, r"layer 'layers.0'.*\(num_experts,\), got \(\)"),
        ({"counts": torch.ones(2, 2, 2)}, r"got \(2, 2\)"),
        ({"counts": [[], []]}, r"got \(0,\)"),
        ({"counts": []}, r"counts.*\(layers, experts\), got \[\]"),
        ({"counts": [], "num_experts_per_tok": 2}, "counts.*layers, experts"),
        ({"counts": torch.tensor(3)}, r"counts.*got tensor\(3\)"),
        ({"counts": 7}, r"counts.*\(layers, experts\), got 7"),
        ({"counts": {"a": [1]}}, "counts.*got {'a'"),
        ({"counts": COUNTS, "mass": [[1, float("nan"), 1], [1, 1, 1]]}, "mass of layer 'layers.0'.*finite.*got nan"),
        ({"counts": COUNTS, "mass": [[1, 1, 1], [1, float("inf"), 1]]}, "mass of layer 'layers.1'.*finite.*got inf"),
        ({"counts": COUNTS, "mass": [[1, 1, 1], [1, -0.5, 1]]}, "mass of layer 'layers.1'.*at least 0, got -0.5"),
        ({"counts": COUNTS, "mass": MASS[:1]}, "mass has 1 layers and counts has 2"),
        ({"counts": COUNTS, "mass": [[1, 1], [1, 1]]}, "layer 'layers.0' are 3 and 2 in counts and mass"),
        ({"counts": COUNTS, "layer_names": ["a", "a"]}, "'a' more than once"),
        ({"counts": COUNTS, "layer_names": ["a"]}, "layer_names.* 1 for 2 layers"),
        ({"counts": COUNTS, "layer_names": "ab"}, "layer_names.* 1 for 2 layers"),
        ({"counts": COUNTS, "layer_names": ["a", 2]}, "name of a layer.*got 2"),
        ({"counts": COUNTS, "layer_names": ["a", ""]}, "non-empty string"),
        ({"counts": COUNTS, "num_experts_per_tok": 0}, "num_experts_per_tok.*whole number.*got 0"),
        ({"counts": COUNTS, "num_experts_per_tok": True}, "num_experts_per_tok.*got True"),
        ({"counts": COUNTS, "num_experts_per_tok": 1.0}, "num_experts_per_tok.*got 1.0"),
        ({"counts": COUNTS, "num_experts_per_tok": 4}, "num_experts_per_tok.*at most 3.*got 4"),
    ],
)
def test_from_arrays_refuses_what_is_no_profile(arguments, message):
    with pytest.raises(SieveError, match=message) as caught:
        RoutingProfile.from_arrays(**arguments)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": {}}, "at least one layer, got {}"),
        ({"counts": [[1, 2]]}, "from_arrays"),
        ({"counts": {"a": [1]}, "mass": {"b": [1.0]}}, "one of counts and mass has 'a', 'b'"),
        ({"counts": {"a": [1]}, "num_tokens": -1}, "num_tokens.*got -1"),
        ({"counts": {"a": [1]}, "metadata": {"a": {1, 2}}}, "metadata.*JSON"),
        ({"counts": {"a": [1]}, "metadata": {"a": float("nan")}}, "metadata.*JSON"),
        ({"counts": {"a": [1]}, "metadata": None}, "metadata must be a dict, got None"),
    ],
)
def test_the_constructor_refuses_what_is_no_profile(arguments, message):
    with pytest.raises(SieveError, match=message):
        RoutingProfile(**arguments)


# --- adding, comparing, showing -------------------------------------------------------------------------------------


def reordered(profile: RoutingProfile) -> RoutingProfile:
    return RoutingProfile(
        counts=dict(reversed(profile.counts.items())),
        mass=dict(reversed(profile.mass.items())),
        num_tokens=profile.num_tokens,
        num_experts_per_tok=profile.num_experts_per_tok,
    )


def test_adding_sums_by_layer_name_whatever_the_order():
    one = small_profile()
    total = one + reordered(one)
    assert total.layer_names == one.layer_names
    assert total.counts["layers.10.mlp"].tolist() == [6, 0, 10]
    assert total.counts["layers.2.mlp"].tolist() == [8, 8]
    assert torch.equal(total.mass["layers.10.mlp"], 2 * one.mass["layers.10.mlp"])
    assert (total.num_tokens, total.num_experts_per_tok) == (8, 2)
    assert total == reordered(one) + one
    assert one == small_profile(), "the parts stay as they were"


def test_adding_keeps_the_metadata_of_every_part():
    parts = [RoutingProfile(counts={"a": [1]}, metadata={"run": run}) for run in range(3)]
    assert (parts[0] + parts[1] + parts[2]).metadata == {"parts": [{"run": 0}, {"run": 1}, {"run": 2}]}


def test_adding_knows_only_what_both_know():
    full = RoutingProfile(counts={"a": [1]}, mass={"a": [0.5]}, num_tokens=1, num_experts_per_tok=1)
    bare = RoutingProfile(counts={"a": [1]})
    for total in (full + bare, bare + full):
        assert total.mass is None
        assert total.num_tokens is None
        assert total.num_experts_per_tok == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"counts": {"a": [1, 2], "c": [1]}}, "one of the two profiles has 'b', 'c'"),
        ({"counts": {"a": [1, 2]}}, "one of the two profiles has 'b'"),
        ({"counts": {"a": [1], "b": [1]}}, "layer 'a' are 2 and 1"),
        ({"counts": {"a": [1, 2], "b": [1]}, "num_experts_per_tok": 2}, "num_experts_per_tok.* 1 and 2"),
    ],
)
def test_adding_refuses_another_models_profile(other, message):
    one = RoutingProfile(counts={"a": [1, 2], "b": [1]}, num_experts_per_tok=1)
    with pytest.raises(SieveError, match=message):
        one + RoutingProfile(**other)


def test_adding_something_else_is_a_type_error():
    with pytest.raises(TypeError):
        small_profile() + 1


def test_equality_is_that_of_the_numbers():
    base = {"counts": {"a": [1, 2]}, "mass": {"a": [0.5, 1.0]}, "num_tokens": 2, "num_experts_per_tok": 1}
    one = RoutingProfile(**base)
    assert one == RoutingProfile(**base, metadata={"other": 1})
    assert small_profile() == reordered(small_profile())
    changes = [
        {"counts": {"a": [2, 1]}},
        {"counts": {"b": [1, 2]}, "mass": {"b": [0.5, 1.0]}},
        {"mass": {"a": [0.5, 1.0 + 2**-52]}},
        {"mass": None},
        {"num_tokens": 3},
        {"num_tokens": None},
        {"num_experts_per_tok": 2},
    ]
    for change in changes:
        assert one != RoutingProfile(**(base | change)), change
    assert one != "a profile"


def test_copies_and_pickles_are_the_same():
    profile = small_profile()
    assert_same(copy.deepcopy(profile), profile)
    assert_same(pickle.loads(pickle.dumps(profile)), profile)


def test_repr_is_one_short_line():
    assert repr(small_profile()) == "RoutingProfile(2 layers x 2-3 experts, top-2, 4 tokens, with mass)"
    assert repr(RoutingProfile.from_arrays([[1, 2]])) == "RoutingProfile(1 layers x 2 experts, without mass)"


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["profile.safetensors", "no suffix"])
def test_round_trip_is_bit_identical(tmp_path, name):
    profile = small_profile()
    profile.save(tmp_path / name)
    assert_same(RoutingProfile.load(tmp_path / name), profile)
    bare = RoutingProfile.from_arrays([[0, 2**62]])
    bare.save(str(tmp_path / name))  # over the older file
    loaded = RoutingProfile.load(str(tmp_path / name))
    assert_same(loaded, bare)
    assert loaded.mass is None
    assert [entry.name for entry in tmp_path.iterdir()] == [name], "no scratch file is left"


def test_round_trip_of_real_telemetry(tmp_path):
    telemetry = np.load(os.path.join(os.path.dirname(__file__), "..", "data", "olmoe_1b_7b.npz"))
    profile = RoutingProfile.from_arrays(telemetry["gsm8k.counts"], telemetry["gsm8k.mass"], num_experts_per_tok=8)
    profile.save(tmp_path / "profile")
    loaded = RoutingProfile.load(tmp_path / "profile")
    assert_same(loaded, profile)
    assert np.array_equal(torch.stack(list(loaded.counts.values())).numpy(), telemetry["gsm8k.counts"])
    assert np.array_equal(torch.stack(list(loaded.mass.values())).numpy(), telemetry["gsm8k.mass"].astype("float64"))


def test_the_file_has_the_documented_keys(tmp_path):
    path = tmp_path / "profile"
    small_profile().save(path)
    layout = read_layout(path)
    keys = {"counts.layers.10.mlp", "counts.layers.2.mlp", "mass.layers.10.mlp", "mass.layers.2.mlp"}
    assert set(layout) == keys | {"__metadata__"}
    assert json.loads(layout["__metadata__"][HEADER_KEY])["version"] == 1


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "profile"
    small_profile().save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SieveError, match="could not read a routing profile"):
            RoutingProfile.load(path)
    path.write_bytes(whole)
    assert_same(RoutingProfile.load(path), small_profile())


def test_every_changed_number_is_refused(tmp_path):
    """One flipped bit in the tensors leaves a file of the right form: only the digest tells."""
    path = tmp_path / "profile"
    small_profile().save(path)
    whole = path.read_bytes()
    for position in range(header_end(whole), len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(SieveError, match="could not read a routing profile"):
            RoutingProfile.load(path)


def header_end(whole: bytes) -> int:
    return 8 + struct.unpack("<Q", whole[:8])[0]


def read_layout(path) -> dict:
    whole = path.read_bytes()
    return json.loads(whole[8 : header_end(whole)])


def rewrite_header(path, change) -> None:
    """Replace the profile's JSON header by what `change` makes of it, keeping a valid safetensors file."""
    whole, layout = path.read_bytes(), read_layout(path)
    changed = change(json.loads(layout["__metadata__"][HEADER_KEY]))
    layout["__metadata__"][HEADER_KEY] = changed if isinstance(changed, str) else json.dumps(changed)
    text = json.dumps(layout).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[header_end(whole) :])


def test_a_header_rewritten_unchanged_still_loads(tmp_path):
    """So that the refusals below come from the change and not from the rewriting."""
    path = tmp_path / "profile"
    small_profile().save(path)
    rewrite_header(path, lambda header: header)
    assert_same(RoutingProfile.load(path), small_profile())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: "{", "its header is not JSON"),
        (lambda header: "[" * 100_000, "its header is not JSON"),
        (lambda header: [], "no format version"),
        (lambda header: {}, "no format version"),
        (lambda header: header | {"version": 3}, "reads format versions 1 and 2, got 3"),
        (lambda header: header | {"layers": None}, "no list of layers"),
        (lambda header: header | {"layers": header["layers"][::-1]}, "do not match the digest"),
        (lambda header: header | {"layers": header["layers"][:1]}, "not those of the layers"),
        (lambda header: header | {"layers": header["layers"] + header["layers"]}, "do not match the digest"),
        (lambda header: header | {"layers": ["other", "names"]}, "not those of the layers"),
        (lambda header: header | {"num_tokens": 5}, "do not match the digest"),
        (lambda header: header | {"num_tokens": "4"}, "num_tokens.*got '4'"),
        (lambda header: header | {"num_experts_per_tok": None}, "do not match the digest"),
        (lambda header: header | {"metadata": {}}, "do not match the digest"),
        (lambda header: header | {"metadata": 3}, "metadata must be a dict, got 3"),
        (lambda header: header | {"digest": ""}, "do not match the digest"),
        (lambda header: header | {"extra": 1}, "do not match the digest"),
        (lambda header: {key: value for key, value in header.items() if key != "digest"}, "do not match the digest"),
    ],
)
def test_tampered_metadata_is_refused(tmp_path, change, message):
    path = tmp_path / "profile"
    small_profile().save(path)
    rewrite_header(path, change)
    with pytest.raises(SieveError, match=message) as caught:
        RoutingProfile.load(path)
    assert "could not read a routing profile" in str(caught.value)


def test_foreign_files_are_refused(tmp_path):
    missing, folder, text, model = (tmp_path / name for name in ("missing", "folder", "text", "model"))
    folder.mkdir()
    text.write_text("layer,expert,count\n" * 100)
    save_file({"weight": torch.zeros(2)}, model, metadata={"format": "pt"})
    for path in (missing, folder, text, model):
        with pytest.raises(SieveError, match=f"could not read a routing profile from .*{path.name}") as caught:
            RoutingProfile.load(path)
        assert "\n" not in str(caught.value)


def test_tensors_of_another_type_are_refused(tmp_path):
    path = tmp_path / "profile"
    small_profile().save(path)
    header = read_layout(path)["__metadata__"]
    tensors = {
        "counts.layers.10.mlp": torch.tensor([3, 0, 5], dtype=torch.int32),
        "counts.layers.2.mlp": torch.tensor([4, 4]),
    }
    save_file(tensors, path, metadata=header)
    with pytest.raises(SieveError, match=r"'counts.layers.10.mlp' has the type torch.int32"):
        RoutingProfile.load(path)


def test_a_failed_save_leaves_the_older_file_and_no_scratch(tmp_path, monkeypatch):
    path = tmp_path / "profile"
    small_profile().save(path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(SieveError, match=r"routing profile .*No space left on device"):
        RoutingProfile.from_arrays([[1]]).save(path)
    assert_same(RoutingProfile.load(path), small_profile())
    assert [entry.name for entry in tmp_path.iterdir()] == ["profile"]


def test_a_save_never_shows_half_a_file(tmp_path):
    """Who has the older file open still reads all of it: the new one takes its place, it does not overwrite it."""
    path = tmp_path / "profile"
    small_profile().save(path)
    older = path.read_bytes()
    with open(path, "rb") as file:
        RoutingProfile.from_arrays([[1]]).save(path)
        assert file.read() == older
    assert_same(RoutingProfile.load(path), RoutingProfile.from_arrays([[1]]))


def test_saving_where_nothing_can_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (tmp_path / "no" / "folder", tmp_path, file / "below", ""):
        with pytest.raises(SieveError, match="routing profile cannot be written"):
            small_profile().save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("method", [small_profile().save, RoutingProfile.load])
def test_a_path_must_be_one(method):
    with pytest.raises(SieveError, match="path must be .*got 7"):
        method(7)
