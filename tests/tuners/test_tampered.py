"""Adapters that were cut short, edited or made for another model: refused in plain words, and nothing is changed."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_sieve import SieveError, SieveLoraConfig
from tests.models import randomize_adapters, tiny_model, token_batch
from tests.tuners.errors import assert_plain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
MASK = {FIRST: [1, 6], SECOND: [0, 3]}
KEY = "base_model.model."
Edit = Callable[[Path], Any]


@dataclass
class Saved:
    """A good adapter and the base model that it belongs to, which is never adapted itself."""

    base: PreTrainedModel
    batch: dict[str, torch.Tensor]
    path: Path
    plain: torch.Tensor
    adapted: torch.Tensor

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**self.batch).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("good")
    tiny_model("olmoe").save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    config = SieveLoraConfig(r=4, selected_experts=MASK, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    randomize_adapters(model)
    model.save_pretrained(folder / "adapter")
    batch = token_batch(base)
    with torch.no_grad():
        return Saved(base, batch, folder / "adapter", base(**batch).logits, model.eval()(**batch).logits)


# Ways to load an adapter into a model


def by_peft(model: nn.Module, path: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, str(path))


def by_peft_with_config(model: nn.Module, path: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, str(path), config=PeftConfig.from_pretrained(str(path)))


def by_peft_empty_first(model: nn.Module, path: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, str(path), low_cpu_mem_usage=True, is_trainable=True)


def by_transformers(model: Any, path: Path) -> nn.Module:
    model.load_adapter(str(path))
    return model


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "PeftModel": by_peft,
    "PeftModel, config": by_peft_with_config,
    "PeftModel, empty first": by_peft_empty_first,
    "transformers": by_transformers,
}
# Two that differ in everything that matters, for the long lists of edits.
MAIN_WAYS = ["PeftModel", "transformers"]


# Ways to break it


def edited(**changes: Any) -> Edit:
    """Change keys of the configuration; a function gets the old value."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        for key, value in changes.items():
            content[key] = value(content[key]) if callable(value) else value
        (folder / CONFIG).write_text(json.dumps(content))

    return edit


def without(*keys: str) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in content.items() if k not in keys}))

    return edit


def both(first: Edit, second: Edit) -> Edit:
    return lambda folder: (first(folder), second(folder))


def mask(ids: Any) -> Edit:
    """Other experts for the first layer."""
    return edited(selected_experts={**MASK, FIRST: ids})


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def no_tensor(name: str) -> Edit:
    return tensors(lambda content: content.pop(KEY + name))


def other_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return tensors(lambda content: content.__setitem__(KEY + name, make(content[KEY + name]).contiguous()))


def file_text(text: str) -> Edit:
    return lambda folder: (folder / CONFIG).write_text(text)


SLOTS, DOWN_A = f"{FIRST}.lora_experts.slots", f"{FIRST}.lora_down_A.weight"
QUERY_B, ROUTER_B = "model.layers.0.self_attn.q_proj.lora_B.weight", "model.layers.0.mlp.gate.lora_B.weight"

EDITS: dict[str, Edit] = {
    "other ids": mask([1, 5]),
    "an id more": mask([1, 5, 6]),
    "an id less": mask([1]),
    "no ids": mask([]),
    "ids out of range": mask([1, 8]),
    "a negative id": mask([1, -2]),
    "a repeated id": mask([1, 1]),
    "ids as floats": mask([1.0, 6.0]),
    "ids as strings": mask(["1", "6"]),
    "a string for ids": mask("16"),
    "null for ids": mask(None),
    "nested ids": mask([[1, 6]]),
    "booleans for ids": mask([True, False]),
    "a layer more": edited(selected_experts={**MASK, "model.layers.7.mlp.experts": [1]}),
    "a layer less": edited(selected_experts={FIRST: MASK[FIRST]}),
    "layers swapped": edited(selected_experts={FIRST: MASK[SECOND], SECOND: MASK[FIRST]}),
    "a layer renamed": edited(selected_experts={"model.layers.5.mlp.experts": MASK[FIRST], SECOND: MASK[SECOND]}),
    "mask null": edited(selected_experts=None),
    "mask a list": edited(selected_experts=[1, 6]),
    "mask empty": edited(selected_experts={}),
    "mask gone": without("selected_experts"),
    "shapes of another model": edited(expert_shapes={FIRST: [8, 32, 25], SECOND: [8, 32, 24]}),
    "shapes a list": edited(expert_shapes=[8, 32, 24]),
    "shapes negative": edited(expert_shapes={FIRST: [-8, 32, 24]}),
    "shapes as strings": edited(expert_shapes={FIRST: ["8", "32", "24"]}),
    "type LORA": edited(peft_type="LORA"),
    "type IA3": edited(peft_type="IA3"),
    "type unknown": edited(peft_type="SIEVE_LORA_2"),
    "type null": edited(peft_type=None),
    "type gone": without("peft_type"),
    "type LORA, mask gone": both(edited(peft_type="LORA"), without("selected_experts")),
    "not an object": file_text("[1, 2]"),
    "rank": edited(r=8),
    "rank a string": edited(r="4"),
    "alpha a string": edited(lora_alpha="64"),
    "calibration a list": edited(calibration=[1]),
    "fewer projections": edited(expert_projections=["down_proj"], target_parameters=None),
    "fewer targets": edited(target_modules=lambda names: names[:-1]),
    "no router": edited(train_router=False, target_parameters=None),
    "slots gone": no_tensor(SLOTS),
    "factor gone": no_tensor(DOWN_A),
    "attention gone": no_tensor(QUERY_B),
    "router gone": no_tensor(ROUTER_B),
    "slots of other experts": other_tensor(SLOTS, lambda t: t.roll(1)),
    "slots in another order": other_tensor(SLOTS, lambda t: torch.where(t < 0, t, 1 - t)),
    "slots with a gap": other_tensor(SLOTS, lambda t: torch.where(t == 1, 5, t)),
    "slots all free": other_tensor(SLOTS, lambda t: torch.full_like(t, -1)),
    "slots of more experts": other_tensor(SLOTS, lambda t: torch.cat([t, t[:1]])),
    "slots in two dimensions": other_tensor(SLOTS, lambda t: t[None]),
    "factor wider": other_tensor(DOWN_A, lambda t: t.repeat(1, 1, 2)),
    "factor of more experts": other_tensor(DOWN_A, lambda t: t.repeat(2, 1, 1)),
    "factor transposed": other_tensor(DOWN_A, lambda t: t.transpose(1, 2)),
    "factor read as integers": other_tensor(DOWN_A, lambda t: t.view(torch.int32)),
    "attention of another rank": other_tensor(QUERY_B, lambda t: t.repeat(1, 2)),
    "attention read as integers": other_tensor(QUERY_B, lambda t: t.view(torch.int32)),
    "router of more experts": other_tensor(ROUTER_B, lambda t: t.repeat(2, 1)),
    "no tensor at all": tensors(lambda content: content.clear()),
    "a module more": tensors(lambda content: content.update({KEY + "model.norm.lora_A.weight": torch.ones(4, 32)})),
}


@pytest.fixture
def broken(saved: Saved, tmp_path: Path) -> Path:
    """A copy of the adapter, to be broken."""
    return Path(shutil.copytree(saved.path, tmp_path / "broken"))


def assert_refused(
    saved: Saved, path: Path, load: Callable[[nn.Module, Path], nn.Module], afterwards: bool = True
) -> str:
    """It is refused, the model is as it was, and takes a good adapter afterwards; returns the message."""
    base = copy.deepcopy(saved.base)
    modules, trainable = describe(base)
    with pytest.raises(SieveError) as refusal:
        load(base, path)
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert describe(base) == (modules, trainable)
    assert not hasattr(base, "peft_config")
    assert torch.equal(saved.logits(base), saved.plain)
    if afterwards:
        assert torch.equal(saved.logits(load(base, saved.path)), saved.adapted)
    message = str(refusal.value)
    assert_plain(message)
    return message


def describe(model: nn.Module) -> tuple[list[Any], list[str]]:
    """Modules by name and identity, and what is trainable."""
    modules = [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return modules, [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("way", MAIN_WAYS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_adapter_is_refused(saved: Saved, broken: Path, edit: str, way: str) -> None:
    EDITS[edit](broken)
    assert_refused(saved, broken, WAYS[way], afterwards=way == "PeftModel")


# One that is noticed from the configuration, one from the weights beside it, and two from the weights in the model.
@pytest.mark.parametrize("edit", ["mask a list", "other ids", "factor gone", "attention of another rank"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "PeftModel"])
def test_every_way_to_load_refuses(saved: Saved, broken: Path, edit: str, way: str) -> None:
    EDITS[edit](broken)
    assert_refused(saved, broken, WAYS[way])


@pytest.mark.parametrize("edit", ["mask a list", "other ids", "factor gone", "attention of another rank"])
def test_auto_classes_refuse(saved: Saved, broken: Path, edit: str) -> None:
    EDITS[edit](broken)
    for auto_class in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(SieveError):
            auto_class.from_pretrained(str(broken))


def test_the_good_adapter_is_taken(saved: Saved) -> None:
    """The way that refusals are tested above can fail."""
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_refused(saved, saved.path, by_peft)
    assert torch.equal(saved.logits(by_peft(copy.deepcopy(saved.base), saved.path)), saved.adapted)
    assert not torch.equal(saved.adapted, saved.plain)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ("other ids", ("[1, 6]", "[1, 5]", FIRST, CONFIG)),
        ("ids as floats", ("1.0", FIRST, "whole numbers")),
        ("shapes of another model", ("intermediate size 25", "intermediate size 24", FIRST)),
        ("type LORA", ("'LORA'", "SIEVE_LORA")),
        ("factor wider", ("(2, 4, 48)", "(2, 4, 24)", DOWN_A)),
        ("router gone", (ROUTER_B,)),
    ],
)
def test_the_message_names_what_was_found_and_what_was_expected(
    saved: Saved, broken: Path, edit: str, told: tuple[str, ...]
) -> None:
    EDITS[edit](broken)
    with pytest.raises(SieveError) as refusal:
        by_peft(copy.deepcopy(saved.base), broken)
    assert [part for part in told if part not in str(refusal.value)] == []


# Files cut short


def cut_points(path: Path, number: int) -> Iterator[int]:
    """Sizes to cut a file to: a few small ones, the last bytes, and some spread over the rest."""
    size = path.stat().st_size
    yield from sorted({0, 1, 7, 8, 9, size - 2, *(size * i // number for i in range(1, number))})


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_cut_short_is_refused_wherever_it_is_cut(saved: Saved, broken: Path, file: str) -> None:
    base = copy.deepcopy(saved.base)
    before = describe(base)
    whole = (broken / file).read_bytes()
    cuts = list(cut_points(broken / file, 40))
    assert len(cuts) > 40
    for cut in cuts:
        (broken / file).write_bytes(whole[:cut])
        for load in (by_peft, by_transformers):
            with pytest.raises(SieveError) as refusal:
                load(base, broken)
            assert_plain(str(refusal.value))
            assert str(broken / file) in str(refusal.value)
        with pytest.raises(SieveError):
            AutoPeftModelForCausalLM.from_pretrained(str(broken))
    assert describe(base) == before
    assert torch.equal(saved.logits(by_peft(base, saved.path)), saved.adapted)


def cut_in_half(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("way", MAIN_WAYS)
@pytest.mark.parametrize("edit", ["cut in half", "other ids", "layers swapped", "slots in another order"])
def test_weights_that_come_after_the_config_was_read_are_refused(
    saved: Saved, broken: Path, edit: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the Hub, whose client brings the configuration first."""
    monkeypatch.setattr("peft_sieve.hf.adapter_files.weights_file", lambda folder: None)
    {"cut in half": cut_in_half, **EDITS}[edit](broken)
    assert_refused(saved, broken, WAYS[way])


def test_weights_of_another_type_that_come_after_the_config_was_read_are_refused(
    saved: Saved, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_sieve.hf.adapter_files.weights_file", lambda folder: None)
    EDITS["attention read as integers"](broken)
    assert_refused(saved, broken, by_peft)


@pytest.mark.parametrize("load", [by_peft, by_transformers])
def test_a_config_without_weights_is_refused(
    saved: Saved, broken: Path, load: Callable[[nn.Module, Path], nn.Module]
) -> None:
    (broken / WEIGHTS).unlink()
    assert WEIGHTS in assert_refused(saved, broken, load)


@pytest.mark.parametrize("seed", range(4))
def test_bytes_flipped_in_the_header_of_the_weights_never_load_as_something_else(
    saved: Saved, broken: Path, seed: int
) -> None:
    """Such a file is refused; or it loads, to the same outputs, when nothing that counts was hit."""
    random_state = random.Random(seed)
    base = copy.deepcopy(saved.base)
    whole = (broken / WEIGHTS).read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(30):
        content = bytearray(whole)
        position = random_state.randrange(header_end)
        # A bit at random, or another letter or digit, with which the header stays text.
        flipped = content[position] ^ 1 << random_state.randrange(8)
        content[position] = random_state.choice([flipped, random_state.choice(b"0123456789abI")])
        if content == whole:
            continue
        (broken / WEIGHTS).write_bytes(content)
        try:
            model = by_peft(base, broken)
        except SieveError:
            refused += 1
            continue
        assert torch.equal(saved.logits(model), saved.adapted), f"byte {position} became {content[position]}"
        base = copy.deepcopy(saved.base)
    assert refused > 15
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


# Other models


@pytest.mark.parametrize("way", MAIN_WAYS)
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_experts": 16}, ("experts 8", "experts 16")),
        ({"hidden_size": 64, "num_attention_heads": 8}, ("hidden size 32", "hidden size 64")),
        ({"intermediate_size": 40}, ("intermediate size 24", "intermediate size 40")),
        ({"num_hidden_layers": 1}, (repr(SECOND),)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("shapes", [True, False], ids=["shapes known", "shapes unknown"])
def test_an_adapter_of_another_model_is_refused(
    saved: Saved, broken: Path, changes: dict[str, int], told: tuple[str, ...], shapes: bool, way: str
) -> None:
    """Also one whose configuration lost the shapes: all ids are in range."""
    if not shapes:
        edited(expert_shapes=None)(broken)
    model = tiny_model("olmoe", **changes)
    before, plain = describe(model), saved.logits(model)
    with pytest.raises(SieveError) as refusal:
        WAYS[way](model, broken)
    assert_plain(str(refusal.value))
    if shapes:
        assert [part for part in told if part not in str(refusal.value)] == []
    assert describe(model) == before
    assert torch.equal(saved.logits(model), plain)


# A second adapter


SECOND_EDITS = ["type gone", "other ids", "ids out of range", "factor gone", "attention of another rank", "rank"]


@pytest.mark.parametrize("edit", SECOND_EDITS)
def test_a_broken_second_adapter_leaves_the_first_working(saved: Saved, broken: Path, edit: str) -> None:
    EDITS[edit](broken)
    model = by_peft(copy.deepcopy(saved.base), saved.path)
    before = describe(model)
    with pytest.raises(SieveError):
        model.load_adapter(str(broken), "second")
    assert list(model.peft_config) == ["default"] == model.active_adapters
    assert describe(model) == before
    assert [key for key in model.state_dict() if "second" in key] == []
    assert torch.equal(saved.logits(model), saved.adapted)
    model.load_adapter(str(saved.path), "second")
    model.set_adapter("second")
    assert torch.equal(saved.logits(model), saved.adapted)


@pytest.mark.parametrize("edit", SECOND_EDITS)
def test_a_broken_second_adapter_leaves_the_first_working_in_transformers(
    saved: Saved, broken: Path, edit: str
) -> None:
    EDITS[edit](broken)
    model = by_transformers(copy.deepcopy(saved.base), saved.path)
    before = describe(model)
    with pytest.raises(SieveError):
        model.load_adapter(str(broken), adapter_name="second")
    assert list(model.peft_config) == ["default"] == model.active_adapters()
    assert describe(model) == before
    assert [key for key in model.state_dict() if "second" in key] == []
    assert torch.equal(saved.logits(model), saved.adapted)


def test_refused_weights_leave_an_adapter_that_was_there_as_it_was(saved: Saved, broken: Path) -> None:
    """As when training is resumed: nothing is taken out, and nothing is loaded."""
    EDITS["factor wider"](broken)
    config = SieveLoraConfig(r=4, selected_experts=MASK, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(saved.base), config)
    before, state = describe(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SieveError):
        model.load_adapter(str(broken), "default", is_trainable=True)
    assert describe(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_adapter_on_fewer_layers_is_added_and_taken_out_without_a_trace(saved: Saved, broken: Path) -> None:
    """A second adapter that brings new layers: those go as well."""
    config = SieveLoraConfig(r=4, selected_experts={SECOND: [2]}, train_attention=False, train_router=False)
    model = get_peft_model(copy.deepcopy(saved.base), config)
    randomize_adapters(model)
    before, outputs = describe(model), saved.logits(model)
    EDITS["factor gone"](broken)
    with pytest.raises(SieveError):
        model.load_adapter(str(broken), "second")
    assert describe(model) == before
    assert torch.equal(saved.logits(model), outputs)


def test_weights_without_a_tensor_are_refused_when_the_config_is_read(broken: Path) -> None:
    EDITS["no tensor at all"](broken)
    with pytest.raises(SieveError, match=r"has no .*lora_experts.slots, .*selects experts \[1, 6\]"):
        PeftConfig.from_pretrained(str(broken))
