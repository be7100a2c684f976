"""Weights of adapters whose experts share factors, under the settings that they were saved with and under others."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sieve import PerftConfig, SieveError, SieveLoraConfig
from peft_sieve.tuners.common.bookkeeping import scale_of
from peft_sieve.tuners.common.experts.factors import slots_of
from tests.models import randomize_adapters, tiny_model, token_batch
from tests.tuners.errors import assert_plain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
PREFIX = "base_model.model."
MASK = {FIRST: [1, 6], SECOND: [0, 3]}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"cold_experts": "frozen", "share_outer": False},
    "cold": {"cold_experts": "shared", "share_outer": False},
    "outer": {"cold_experts": "frozen", "share_outer": True},
    "both": {"cold_experts": "shared", "share_outer": True},
}
PAIRS = list(itertools.permutations(SETTINGS, 2))


def adapted(settings: dict[str, Any], seed: int = 1, **others: Any) -> PeftModel:
    given = {"r": 4, "selected_experts": MASK, "task_type": "CAUSAL_LM", **settings, **others}
    model = get_peft_model(tiny_model("olmoe"), SieveLoraConfig(**given))
    randomize_adapters(model, seed=seed)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**token_batch(model)).logits


def name_a_difference(text: str, of: dict[str, Any], into: dict[str, Any]) -> None:
    """The message names a setting in which the two differ, and no other."""
    assert_plain(text)
    differ = {name for name in of if of[name] != into[name]}
    named = {name for name in of if f"{name}=" in text}
    assert named and named <= differ, text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in SETTINGS}
    for name, folder in folders.items():
        adapted(SETTINGS[name]).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def models() -> dict[str, PeftModel]:
    """Adapters that exist when weights are loaded, as when a run resumes."""
    return {name: adapted(settings, seed=2) for name, settings in SETTINGS.items()}


def as_state_dict(model: nn.Module, folder: Path) -> None:
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))


def as_resumed(model: Any, folder: Path) -> None:
    model.load_adapter(str(folder), "default", is_trainable=True)


def whole(model: nn.Module, folder: Path) -> None:
    """As Trainer's best model and averages of models do, with all tensors of a model by their names in it."""
    state = model.state_dict()
    tensors = load_file(folder / WEIGHTS)
    state |= {
        key.replace(".weight", ".default.weight").replace(".slots", ".default.slots"): t for key, t in tensors.items()
    }
    model.load_state_dict(state)


@pytest.mark.parametrize("load", [as_state_dict, as_resumed])
@pytest.mark.parametrize(("of", "into"), PAIRS)
def test_weights_for_an_adapter_of_other_settings_are_refused(
    load: Callable[[Any, Path], None], of: str, into: str, saved: dict[str, Path], models: dict[str, PeftModel]
) -> None:
    before = {name: p.clone() for name, p in models[into].named_parameters()}
    with pytest.raises(SieveError) as refusal:
        load(models[into], saved[of])
    name_a_difference(str(refusal.value), SETTINGS[of], SETTINGS[into])
    assert all(torch.equal(p, before[name]) for name, p in models[into].named_parameters())


def edited(folder: Path, copied: Path, **changes: Any) -> Path:
    """A copy with other settings in its configuration; None takes one out."""
    shutil.copytree(folder, copied)
    content = {**json.loads((folder / CONFIG).read_text()), **changes}
    (copied / CONFIG).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return copied


def by_transformers(base: Any, folder: Path) -> Any:
    base.load_adapter(str(folder))
    return base


LOADERS: list[Callable[[Any, Path], Any]] = [lambda base, path: PeftModel.from_pretrained(base, path), by_transformers]


@pytest.mark.parametrize("load", LOADERS, ids=["PeftModel", "transformers"])
@pytest.mark.parametrize(("of", "settings"), [*PAIRS, *((name, None) for name in ("cold", "outer", "both"))])
def test_a_configuration_of_other_settings_beside_weights_is_refused(
    load: Callable[[Any, Path], Any], of: str, settings: str | None, saved: dict[str, Path], tmp_path: Path
) -> None:
    """Also one without the fields, as earlier versions wrote it."""
    into = SETTINGS["plain" if settings is None else settings]
    changes = dict.fromkeys(into) if settings is None else into
    base = tiny_model("olmoe")
    modules = dict(base.named_modules())
    with pytest.raises(SieveError) as refusal:
        load(base, edited(saved[of], tmp_path / "edited", **changes))
    name_a_difference(str(refusal.value), SETTINGS[of], into)
    assert dict(base.named_modules()) == modules


def test_weights_without_the_fields_are_those_of_a_plain_adapter(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(saved["plain"], tmp_path / "edited", cold_experts=None, share_outer=None)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), folder)
    assert torch.equal(logits(loaded), logits(adapted(SETTINGS["plain"])))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cold_experts": "warm"}, "cold_experts must be one of 'frozen', 'shared', got 'warm'"),
        ({"cold_experts": True}, "cold_experts must be one of 'frozen', 'shared', got True"),
        ({"share_outer": "yes"}, "share_outer must be True or False, got 'yes'"),
        ({"share_outer": 1}, "share_outer must be True or False, got 1"),
    ],
)
def test_values_that_are_not_settings(
    settings: dict[str, Any], text: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    for make in (
        lambda: SieveLoraConfig(**settings),
        lambda: PeftModel.from_pretrained(tiny_model("olmoe"), edited(saved["both"], tmp_path / "edited", **settings)),
    ):
        with pytest.raises(SieveError, match=text) as refusal:
            make()
        assert_plain(str(refusal.value))


def with_slots(folder: Path, copied: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(folder, copied)
    tensors = load_file(copied / WEIGHTS)
    key = f"{PREFIX}{FIRST}.lora_experts.slots"
    save_file({**tensors, key: change(tensors[key])}, copied / WEIGHTS, metadata={"format": "pt"})
    return copied


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda t: torch.where(t == -2, -1, t),
            "does not hold an adapter that the other experts|cold_experts='frozen'",
        ),
        (lambda t: t.roll(1), r"experts \[2, 7\]"),
        (lambda t: torch.where(torch.arange(8) == 3, -1, t), "not those of any experts"),
        (lambda t: torch.where(torch.arange(8) == 3, -3, t), "not those of any experts"),
        (lambda t: torch.where(t == -2, 2, t), "not those of any experts"),
    ],
)
def test_maps_of_other_experts_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], text: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = with_slots(saved["both"], tmp_path / "edited", change)
    model = adapted(SETTINGS["both"])
    for load in (
        lambda: PeftModel.from_pretrained(tiny_model("olmoe"), folder),
        lambda: as_state_dict(model, folder),
        lambda: whole(model, folder),
    ):
        with pytest.raises(SieveError, match=f"{text}|belong to other experts") as refusal:
            load()
        assert_plain(str(refusal.value))


@pytest.mark.parametrize(("of", "into"), [("plain", "cold"), ("cold", "plain"), ("plain", "both"), ("both", "outer")])
def test_maps_of_one_expert_that_are_multiples_of_each_other(of: str, into: str) -> None:
    """0 for it and -1 or -2 for all others: an average of state dicts may be a multiple of a map."""
    mask = {FIRST: [2], SECOND: [5]}
    state = get_peft_model_state_dict(adapted(SETTINGS[of], selected_experts=mask))
    with pytest.raises(SieveError) as refusal:
        set_peft_model_state_dict(adapted(SETTINGS[into], selected_experts=mask), state)
    name_a_difference(str(refusal.value), SETTINGS[of], SETTINGS[into])


@pytest.mark.parametrize("name", ["cold", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_averages_of_adapters_that_share_factors_are_loaded(name: str, dtype: torch.dtype) -> None:
    first, second = adapted(SETTINGS[name], seed=1), adapted(SETTINGS[name], seed=2)
    states = [get_peft_model_state_dict(model) for model in (first, second)]
    average = {
        key: 0.25 * value.float() + 0.75 * states[1][key].float()
        if value.is_floating_point()
        else (0.25 * value + 0.75 * states[1][key]).to(dtype)
        for key, value in states[0].items()
    }
    model = adapted(SETTINGS[name], seed=3)
    set_peft_model_state_dict(model, average)
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, average[key].to(value.dtype)), key
    assert torch.equal(value, states[0][key])


def test_long_averages_of_one_map_with_shared_experts_are_that_map() -> None:
    expected = slots_of(128, range(3, 100), [*range(3), *range(100, 128)])
    for decay, dtype in itertools.product((0.9, 0.995, 0.9999), (torch.float32, torch.bfloat16)):
        average = expected.to(dtype)
        for _ in range(500):
            average = decay * average + (1 - decay) * expected.to(dtype)
        assert scale_of(average, expected) == 1
    assert scale_of(expected, slots_of(128, range(3, 100))) is None


def test_an_average_of_two_maps_with_shared_experts_is_refused() -> None:
    states = [
        get_peft_model_state_dict(adapted(SETTINGS["both"], selected_experts={FIRST: ids, SECOND: [0, 3]}))
        for ids in ([1, 6], [1, 5])
    ]
    average = {key: 0.5 * value + 0.5 * states[1][key] for key, value in states[0].items()}
    with pytest.raises(SieveError, match="not those of any experts"):
        set_peft_model_state_dict(adapted(SETTINGS["both"]), average)


def test_perft_has_no_shared_experts() -> None:
    config = PerftConfig(variant="E", r=2, selected_experts={FIRST: [1, 6]}, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("olmoe"), config)
    state = dict(get_peft_model_state_dict(model))
    (key,) = (key for key in state if key.endswith("slots"))
    state[key] = torch.where(state[key] == -1, -2, state[key])
    with pytest.raises(SieveError, match="not those of any experts"):
        set_peft_model_state_dict(model, state)


def test_copies_of_a_state_dict_are_checked_before_anything_is_assigned(saved: dict[str, Path]) -> None:
    model = adapted(SETTINGS["both"], seed=2)
    before = copy.deepcopy(get_peft_model_state_dict(model))
    tensors = load_file(saved["both"] / WEIGHTS)
    broken = tensors | {
        f"{PREFIX}{SECOND}.lora_down_B.weight": tensors[f"{PREFIX}{SECOND}.lora_down_B.weight"].repeat(3, 1, 1)
    }
    with pytest.raises(SieveError, match="share_outer=False"):
        set_peft_model_state_dict(model, broken)
    assert all(torch.equal(value, before[key]) for key, value in get_peft_model_state_dict(model).items())


def test_factors_of_equal_shapes_are_told_by_their_maps() -> None:
    """Two experts and one adapter for all others, against three experts."""
    three = {FIRST: [1, 6, 7], SECOND: [0, 3, 5]}
    for of, into in (("cold", "plain"), ("plain", "cold"), ("both", "outer"), ("outer", "both")):
        masks = [MASK if SETTINGS[name]["cold_experts"] == "shared" else three for name in (of, into)]
        state = get_peft_model_state_dict(adapted(SETTINGS[of], selected_experts=masks[0]))
        model = adapted(SETTINGS[into], selected_experts=masks[1])
        shapes = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}
        assert shapes == {key: value.shape for key, value in state.items()}
        with pytest.raises(SieveError, match=r"experts \[1, 6\].*\[1, 6, 7\]|experts \[1, 6, 7\].*\[1, 6\]"):
            set_peft_model_state_dict(model, dict(state))
        base: Any = tiny_model("olmoe")
        bare = {key.removeprefix(PREFIX): value for key, value in state.items()}
        config = SieveLoraConfig(r=4, task_type="CAUSAL_LM", selected_experts=masks[1], **SETTINGS[into])
        with pytest.raises(SieveError, match=r"experts \[1, 6\].*\[1, 6, 7\]|experts \[1, 6, 7\].*\[1, 6\]"):
            base.load_adapter(peft_config=config, adapter_state_dict=bare)
        assert not any("lora_" in name for name, _ in base.named_parameters())
