"""Saving and loading: what is written, that every way to load it gives the same model, and what a crash leaves."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft.peft_model
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.config import PeftConfigMixin
from safetensors.torch import load_file, save
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import peft_sieve.files
from peft_sieve import SieveError, SieveLoraConfig
from tests.deepseek_like import deepseek_like
from tests.models import TINY_OLMOE, randomize_adapters, small_olmoe, small_tokenizer, tiny_model, token_batch

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FILES = {CONFIG, WEIGHTS, CARD}
MASK = {"model.layers.0.mlp.experts": [1, 6], "model.layers.1.mlp.experts": [0, 3, 4]}
OTHER_MASK = {"model.layers.0.mlp.experts": [6, 7], "model.layers.1.mlp.experts": [2]}


@dataclass
class Saved:
    """A saved adapter. `base` is never adapted itself: `fresh` gives copies."""

    base: PreTrainedModel
    batch: dict[str, torch.Tensor]
    model: PeftModel
    path: str

    @property
    def fresh(self) -> PreTrainedModel:
        return copy.deepcopy(self.base)

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**self.batch).logits


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_model("olmoe").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Calibrated on random tokens; the base model has a path of its own."""
    base = AutoModelForCausalLM.from_pretrained(base_path).eval()
    batch = token_batch(base)
    return saved(base, batch, SieveLoraConfig(r=4, calib_dataset=[batch], task_type="CAUSAL_LM"), tmp_path_factory)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The small trained model, calibrated on text, with experts of one projection only."""
    base = small_olmoe()
    texts = ["Tom has three apples and buys two more.", "How many pens does each of 4 friends get?"]
    batch = dict(small_tokenizer()(texts, padding=True, return_tensors="pt"))
    config = SieveLoraConfig(r=8, calib_dataset=texts, expert_projections=["up_proj"], task_type="CAUSAL_LM")
    return saved(base, batch, config, tmp_path_factory)


def saved(
    base: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    config: SieveLoraConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Saved:
    path = str(tmp_path_factory.mktemp("adapter"))
    model = adapted(copy.deepcopy(base), config)
    model.save_pretrained(path)
    return Saved(base, batch, model, path)


def adapted(base: nn.Module, config: Any = None, seed: int = 1) -> PeftModel:
    """`base` with an adapter of random values, in evaluation mode."""
    model = get_peft_model(base, given() if config is None else config)
    randomize_adapters(model, seed=seed)
    return model.eval()


def given(**settings: Any) -> SieveLoraConfig:
    """A configuration with a mask, so that nothing is calibrated."""
    return SieveLoraConfig(**{"r": 4, "selected_experts": MASK, "task_type": "CAUSAL_LM", **settings})


def contents(folder: str | Path) -> dict[str, bytes]:
    """Everything below a folder, hidden files and empty folders included."""
    found = sorted(Path(folder).rglob("*"))
    return {str(p.relative_to(folder)): b"" if p.is_dir() else p.read_bytes() for p in found}


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("calibrates again")

    monkeypatch.setattr("peft_sieve.tuners.sieve.model.calibrate", refuse)


# What is written


@pytest.mark.parametrize("which", ["tiny", "example"])
def test_the_config_tells_mask_and_provenance_to_a_reader(which: str, request: pytest.FixtureRequest) -> None:
    one: Saved = request.getfixturevalue(which)
    config = one.model.peft_config["default"]
    text = Path(one.path, CONFIG).read_text()
    written = json.loads(text)
    assert set(contents(one.path)) == FILES
    assert written["peft_type"] == "SIEVE_LORA"
    assert written["selected_experts"] == config.selected_experts
    assert written["calibration"] == config.calibration
    for path, ids in config.selected_experts.items():
        assert f'"{path}": [{", ".join(map(str, ids))}]' in text
    known = written["calibration"]
    assert {"dataset", "fingerprint", "samples", "tokens", "score", "strategy", "peft_sieve_version"} <= known.keys()
    assert known["coverage"].keys() == config.selected_experts.keys()
    assert (known["samples"], known["tokens"]) == (len(one.batch["input_ids"]), int(one.batch["attention_mask"].sum()))
    assert not {"calib_dataset", "calib_tokenizer", "calib_formatting_func"} & written.keys()


@pytest.mark.parametrize("which", ["tiny", "example"])
def test_the_weights_are_those_of_the_selected_experts_and_nothing_else(
    which: str, request: pytest.FixtureRequest
) -> None:
    one: Saved = request.getfixturevalue(which)
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(Path(one.path, WEIGHTS)).items()}
    assert shapes == expected_shapes(one.base.config, one.model.peft_config["default"])
    header_size = int.from_bytes(Path(one.path, WEIGHTS).read_bytes()[:8], "little")
    assert Path(one.path, WEIGHTS).stat().st_size == 8 + header_size + 4 * sum(map(num_elements, shapes.values()))


def expected_shapes(base: Any, config: SieveLoraConfig) -> dict[str, tuple[int, ...]]:
    """What a saved adapter of OLMoE holds, in float32 and int32, all of 4 bytes."""
    hidden, inner, r = base.hidden_size, base.intermediate_size, config.r
    kv = hidden // base.num_attention_heads * base.num_key_value_heads
    names = config.expert_projections or ["gate_proj", "up_proj", "down_proj"]
    inputs = sum(name != "down_proj" for name in names)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(base.num_hidden_layers):
        prefix = f"base_model.model.model.layers.{layer}"
        for name, out in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            shapes[f"{prefix}.self_attn.{name}.lora_A.weight"] = (r, hidden)
            shapes[f"{prefix}.self_attn.{name}.lora_B.weight"] = (out, r)
        shapes[f"{prefix}.mlp.gate.lora_A.weight"] = (r, hidden)
        shapes[f"{prefix}.mlp.gate.lora_B.weight"] = (base.num_experts, r)
        slots = len(config.selected_experts[f"model.layers.{layer}.mlp.experts"])
        assert 0 < slots < base.num_experts
        shapes[f"{prefix}.mlp.experts.lora_experts.slots"] = (base.num_experts,)
        shapes[f"{prefix}.mlp.experts.lora_gate_up_A.weight"] = (slots, inputs * r, hidden)
        shapes[f"{prefix}.mlp.experts.lora_gate_up_B.weight"] = (slots, inputs * r, inner)
        if "down_proj" in names:
            shapes[f"{prefix}.mlp.experts.lora_down_A.weight"] = (slots, r, inner)
            shapes[f"{prefix}.mlp.experts.lora_down_B.weight"] = (slots, r, hidden)
    return shapes


def num_elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def test_all_experts_are_written_when_all_are_selected(tiny: Saved, tmp_path: Path) -> None:
    adapted(tiny.fresh, given(selected_experts={path: range(8) for path in MASK})).save_pretrained(tmp_path)
    factors = {k: v for k, v in load_file(tmp_path / WEIGHTS).items() if ".experts." in k}
    assert {tensor.shape[0] for tensor in factors.values()} == {8}


@pytest.mark.parametrize("which", ["tiny", "example"])
def test_saving_again_gives_the_same_bytes(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    one: Saved = request.getfixturevalue(which)
    before = contents(one.path)
    one.model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    one.model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_the_order_of_a_set_does_not_reach_the_file(tiny: Saved, tmp_path: Path) -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for folder, order in (("a", names), ("b", names[::-1])):
        given(target_modules=set(order)).save_pretrained(tmp_path / folder)
    assert (tmp_path / "a" / CONFIG).read_bytes() == (tmp_path / "b" / CONFIG).read_bytes()
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"] == sorted(names)


# Every way to load it


def trained_further(one: Saved) -> PeftModel:
    """As when training is resumed: the adapter is there before its weights."""
    config = PeftConfig.from_pretrained(one.path)
    config.inference_mode = False
    model = get_peft_model(one.fresh, config)
    model.load_adapter(one.path, "default", is_trainable=True)
    return model


def by_transformers(one: Saved, **options: Any) -> nn.Module:
    base = one.fresh
    base.load_adapter(one.path, **options)
    return base


TRAINABLE: dict[str, Callable[[Saved], nn.Module]] = {
    "PeftModel": lambda one: PeftModel.from_pretrained(one.fresh, one.path, is_trainable=True),
    "AutoPeftModel": lambda one: AutoPeftModelForCausalLM.from_pretrained(one.path, is_trainable=True),
    "transformers": lambda one: by_transformers(one, is_trainable=True),
    "resumed": trained_further,
}
FROZEN: dict[str, Callable[[Saved], nn.Module]] = {
    "PeftModel": lambda one: PeftModel.from_pretrained(one.fresh, one.path),
    "PeftModel, empty first": lambda one: PeftModel.from_pretrained(one.fresh, one.path, low_cpu_mem_usage=True),
    "PeftModel, other name": lambda one: PeftModel.from_pretrained(one.fresh, one.path, adapter_name="mine"),
    "PeftModel, config": lambda one: PeftModel.from_pretrained(
        one.fresh, one.path, config=PeftConfig.from_pretrained(one.path)
    ),
    "AutoPeftModel": lambda one: AutoPeftModelForCausalLM.from_pretrained(one.path),
    "transformers": by_transformers,
    "transformers, other name": lambda one: by_transformers(one, adapter_name="mine"),
    "transformers, empty first": lambda one: by_transformers(one, low_cpu_mem_usage=True),
    "AutoModel": lambda one: AutoModelForCausalLM.from_pretrained(one.path),
}


@pytest.mark.parametrize("way", FROZEN)
def test_loads_to_the_bit_and_frozen(tiny: Saved, no_calibration: None, way: str) -> None:
    model = FROZEN[way](tiny)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.model))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == []


@pytest.mark.parametrize("way", TRAINABLE)
def test_loads_to_the_bit_and_trainable(tiny: Saved, no_calibration: None, way: str) -> None:
    model = TRAINABLE[way](tiny)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.model))
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in names if "lora_" in n}


@pytest.mark.parametrize("way", ["AutoPeftModel", "transformers", "AutoModel"])
def test_the_small_trained_model_loads_to_the_bit(example: Saved, no_calibration: None, way: str) -> None:
    loaders: dict[str, Callable[[], Any]] = {
        "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(example.path, dtype=torch.float32),
        "transformers": lambda: by_transformers(example),
        "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(example.path, dtype=torch.float32),
    }
    model = loaders[way]()
    assert model.name_or_path == str(TINY_OLMOE)
    assert torch.equal(example.logits(model), example.logits(example.model))
    assert not torch.equal(example.logits(model), example.logits(example.base))


def test_transformers_does_not_map_the_adapter_from_its_file(
    example: Saved, no_calibration: None, tmp_path: Path
) -> None:
    """Products round differently in memory that is not aligned, and a file may be written to."""
    path = Path(shutil.copytree(example.path, tmp_path / "adapter"))
    tensors, expected = load_file(Path(example.path, WEIGHTS)), example.logits(example.model)
    places = set()
    for padding in (0, 8, 24, 40):
        (path / WEIGHTS).write_bytes(save(tensors, {"format": "pt", "padding": "-" * padding}))
        places.add(int.from_bytes((path / WEIGHTS).read_bytes()[:8], "little") % 64)
        model = by_transformers(dataclasses.replace(example, path=str(path)))
        with open(path / WEIGHTS, "rb+") as file:
            file.write(b"\xff" * (path / WEIGHTS).stat().st_size)
        assert torch.equal(example.logits(model), expected), f"with {padding} bytes more in front of the tensors"
    assert len(places) == 4


def test_the_spy_notices_a_calibration(tiny: Saved, no_calibration: None) -> None:
    with pytest.raises(AssertionError, match="calibrates again"):
        get_peft_model(tiny.fresh, SieveLoraConfig(calib_dataset=[tiny.batch]))


def test_a_loaded_config_is_the_saved_one(tiny: Saved) -> None:
    for config_class in (PeftConfig, LoraConfig, SieveLoraConfig):
        config = config_class.from_pretrained(tiny.path)
        assert type(config) is SieveLoraConfig
        assert config.to_dict() == {**tiny.model.peft_config["default"].to_dict(), "inference_mode": True}


def test_a_loaded_config_makes_a_new_adapter_on_the_same_experts(tiny: Saved, no_calibration: None) -> None:
    config = PeftConfig.from_pretrained(tiny.path)
    config.r, config.inference_mode = 2, False
    model = get_peft_model(tiny.fresh, config)
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    assert experts.lora_down_A["default"].weight.shape[:2] == (2, 2)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.base))


@pytest.mark.parametrize("way", ["PeftModel", "AutoPeftModel", "resumed"])
def test_saving_what_was_loaded_gives_the_same_bytes(tiny: Saved, way: str, tmp_path: Path) -> None:
    model = {**FROZEN, **TRAINABLE}[way](tiny)
    model.save_pretrained(tmp_path)
    assert contents(tmp_path) == contents(tiny.path)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(base_path: Path, no_calibration: None, autocast: bool, tmp_path: Path) -> None:
    """Adapters in float32 over a bfloat16 model, as PEFT makes them, or in bfloat16 as well."""
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16)
    model = get_peft_model(copy.deepcopy(base), given(), autocast_adapter_dtype=autocast)
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "once")
    stored = load_file(tmp_path / "once" / WEIGHTS)
    expected = torch.float32 if autocast else torch.bfloat16
    assert {t.dtype for key, t in stored.items() if not key.endswith("slots")} == {expected}

    one = Saved(base, token_batch(base), model, str(tmp_path / "once"))
    again = PeftModel.from_pretrained(one.fresh, one.path, autocast_adapter_dtype=autocast)
    assert one.logits(again).dtype == torch.bfloat16
    assert torch.equal(one.logits(again), one.logits(model))
    again.save_pretrained(tmp_path / "twice")
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


# Several adapters in one folder


@pytest.fixture(scope="module")
def pair(tiny: Saved, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Adapters "default" and "second", of other experts, ranks and projections."""
    model = two_adapters(tiny.fresh, given(selected_experts=OTHER_MASK, r=2, expert_projections=["down_proj"]))
    path = str(tmp_path_factory.mktemp("pair"))
    model.save_pretrained(path)
    return Saved(tiny.base, tiny.batch, model, path)


def two_adapters(base: nn.Module, second: SieveLoraConfig, seed: int = 1) -> PeftModel:
    model = get_peft_model(base, given())
    model.add_adapter("second", second)
    randomize_adapters(model, seed=seed)
    return model.eval()


def test_each_adapter_is_saved_by_itself(pair: Saved, tmp_path: Path) -> None:
    assert set(contents(pair.path)) == {*FILES, "second", f"second/{CONFIG}", f"second/{WEIGHTS}"}
    for folder, mask in (("", MASK), ("second", OTHER_MASK)):
        assert json.loads(Path(pair.path, folder, CONFIG).read_text())["selected_experts"] == mask
        found = load_file(Path(pair.path, folder, WEIGHTS))
        for path, ids in mask.items():
            assert found[f"base_model.model.{path}.lora_down_A.weight"].shape[0] == len(ids)
    pair.model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert set(contents(tmp_path)) == {CARD, "second", f"second/{CONFIG}", f"second/{WEIGHTS}"}


def test_several_adapters_load_into_one_model(pair: Saved, no_calibration: None) -> None:
    first = PeftModel.from_pretrained(pair.fresh, pair.path)
    first.load_adapter(os.path.join(pair.path, "second"), "second")
    other_order = PeftModel.from_pretrained(pair.fresh, pair.path, "second", subfolder="second")
    other_order.load_adapter(pair.path, "default")
    by_transformers = pair.fresh
    by_transformers.load_adapter(pair.path, adapter_name="default")
    by_transformers.load_adapter(os.path.join(pair.path, "second"), adapter_name="second")
    expected = {}
    for name in ("default", "second"):
        pair.model.set_adapter(name)
        expected[name] = pair.logits(pair.model)
    assert not torch.equal(expected["default"], expected["second"])
    for name in ("second", "default"):
        for model in (first, other_order, by_transformers):
            model.set_adapter(name)
            assert torch.equal(pair.logits(model), expected[name])


# Copies of configurations and models


class Uncopyable:
    """A data set that holds a lock and takes offence at everything that people do to configurations."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("copied")


def generator_of_batches() -> Any:
    yield {"input_ids": torch.tensor([[3, 4, 5]])}


@pytest.mark.parametrize("make_data", [Uncopyable, generator_of_batches])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_copies_of_a_config_share_its_data_set(
    make_data: Callable[[], Any], duplicate: Callable[[SieveLoraConfig], SieveLoraConfig]
) -> None:
    config = SieveLoraConfig(r=4, calib_dataset=make_data(), calib_formatting_func=lambda row: row)
    clone = duplicate(config)
    assert clone is not config and clone == config
    assert clone.calib_dataset is config.calib_dataset
    assert clone.calib_formatting_func is config.calib_formatting_func


@pytest.mark.parametrize("make_data", [Uncopyable, generator_of_batches])
def test_what_leaves_the_process_holds_no_data_set(make_data: Callable[[], Any]) -> None:
    config = SieveLoraConfig(r=4, calib_dataset=make_data(), calib_formatting_func=lambda row: row)
    pickled = pickle.loads(pickle.dumps(config))
    assert pickled == config
    assert pickled.calib_dataset is pickled.calib_formatting_func is None
    for plain in (dataclasses.asdict(config), config.to_dict()):
        assert not {"calib_dataset", "calib_tokenizer", "calib_formatting_func"} & plain.keys()
    assert json.loads(json.dumps(config.to_dict()))["r"] == 4


def test_configs_are_compared_by_their_settings() -> None:
    config = SieveLoraConfig(r=4, calib_dataset=Uncopyable())
    assert config == SieveLoraConfig(r=4, calib_dataset=Uncopyable())
    assert config != dataclasses.replace(config, r=5)


def test_a_deep_copy_of_a_config_shares_nothing_else() -> None:
    config = given()
    clone = copy.deepcopy(config)
    clone.selected_experts["model.layers.0.mlp.experts"].append(7)
    clone.rank_pattern["q_proj"] = 2
    assert config == given()


def test_the_name_of_a_data_set_survives_pickling() -> None:
    config = pickle.loads(pickle.dumps(SieveLoraConfig(calib_dataset="openai/gsm8k", calib_tokenizer="me/tokenizer")))
    assert (config.calib_dataset, config.calib_tokenizer) == ("openai/gsm8k", "me/tokenizer")


@pytest.mark.parametrize("make_base", [lambda: tiny_model("olmoe"), deepseek_like], ids=["fused", "module list"])
def test_a_deep_copy_of_a_model_is_another_model(make_base: Callable[[], nn.Module]) -> None:
    """Only experts are adapted, and the data set is one that cannot be copied."""
    base = make_base()
    batch = token_batch(base)
    others = {"train_attention": False, "train_router": False, "train_shared_experts": False}
    model = adapted(base, SieveLoraConfig(r=4, top_k=3, calib_dataset=(b for b in [batch]), **others))
    with torch.no_grad():
        before = model(**batch).logits
        clone = copy.deepcopy(model)
        assert torch.equal(clone(**batch).logits, before)
        randomize_adapters(clone, seed=2)
        changed = clone(**batch).logits
        assert not torch.equal(changed, before)
        assert torch.equal(model(**batch).logits, before)
        without = model.unload()(**batch).logits
        assert torch.equal(clone(**batch).logits, changed)
        assert not torch.equal(without, changed)


# A crash in the middle

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "torn write"}


def killed(action: Callable[[], Any], below: Path, before: int | None) -> int | None:
    """Run `action` in a child process that is killed right before its `before`-th change to the files below a folder.

    Returns:
        None if it was killed; if it came to its end, how many changes it made.
    """
    child = os.fork()
    if child == 0:
        status = 255
        try:
            signal.alarm(60)
            status = _count_changes(action, below, before)
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) != 255, "the child failed"
    return os.WEXITSTATUS(status)


def _count_changes(action: Callable[[], Any], below: Path, before: int | None) -> int:
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and str(args[0]).startswith(str(below)) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            count += 1
            if count == before:
                os.kill(os.getpid(), signal.SIGKILL)

    def write_slowly(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str]) -> None:
        data = save(tensors, metadata)
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            sys.audit("torn write", path)
            file.write(data[len(data) // 2 :])

    peft.peft_model.safe_save_file = write_slowly
    sys.addaudithook(watch)
    action()
    return count


def outcome(one: Saved, path: Path, known: dict[str, torch.Tensor | None], seen: dict[Any, str]) -> str:
    """Which of the known adapters is found at `path`; None stands for no adapter. Each pair of files is loaded once."""
    try:
        PeftConfig.from_pretrained(str(path))
        files = tuple((path / name).read_bytes() for name in (CONFIG, WEIGHTS))
        if files in seen:
            return seen[files]
        logits = one.logits(PeftModel.from_pretrained(one.fresh, str(path)))
    except ValueError as error:
        assert not isinstance(error, SieveError) and f"Can't find '{CONFIG}' at" in str(error)
        return next(name for name, expected in known.items() if expected is None)
    for name, expected in known.items():
        if expected is not None and torch.equal(logits, expected):
            seen[files] = name
            return name
    raise AssertionError(f"{path} loads as something else")


@pytest.fixture(scope="module")
def versions(tiny: Saved) -> tuple[PeftModel, PeftModel]:
    """Two versions of two adapters. The second adapter's have one mask, so only the outputs tell a mixture."""
    old = two_adapters(tiny.fresh, given(selected_experts=OTHER_MASK, lora_alpha=8), seed=1)
    new = get_peft_model(tiny.fresh, given(selected_experts={"model.layers.1.mlp.experts": [5, 7]}))
    new.add_adapter("second", given(selected_experts=OTHER_MASK, lora_alpha=32))
    randomize_adapters(new, seed=2)
    return old, new.eval()


def logits_by_adapter(one: Saved, model: PeftModel) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        found[name] = one.logits(model)
    model.set_adapter("default")
    return found


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@needs_fork
@pytest.mark.parametrize(("overwrites", "step"), [(True, 1), (False, 4)])
def test_a_killed_save_leaves_the_old_adapters_or_the_new_ones(
    tiny: Saved, versions: tuple[PeftModel, PeftModel], tmp_path: Path, overwrites: bool, step: int
) -> None:
    """At every moment of a save, which reads as old adapters (or none) up to one moment and as new ones after it."""
    old, new = versions
    olds, news = logits_by_adapter(tiny, old), logits_by_adapter(tiny, new)
    (tmp_path / "old").mkdir()
    if overwrites:
        old.save_pretrained(tmp_path / "old")
    outcomes: dict[str, list[str]] = {"default": [], "second": []}
    seen: dict[Any, str] = {}
    moment, changes = 1, None
    while changes is None:
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / str(moment)))
        changes = killed(lambda folder=folder: new.save_pretrained(folder), folder, before=moment)
        # The second one first: reading the other would finish the save for both.
        for name, path in (("second", folder / "second"), ("default", folder)):
            known = {"old": olds[name] if overwrites else None, "new": news[name]}
            outcomes[name].append(outcome(tiny, path, known, seen))
        moment += step
    for name, found in outcomes.items():
        assert found == sorted(found, reverse=True), f"{name}: {found}"
        assert {"old", "new"} == set(found), f"{name}: {found}"


@needs_fork
def test_the_next_save_removes_what_a_killed_one_left(
    tiny: Saved, versions: tuple[PeftModel, PeftModel], tmp_path: Path
) -> None:
    _, new = versions
    new.save_pretrained(tmp_path / "expected")
    left, moment, changes = 0, 1, None
    while changes is None:
        folder = tmp_path / str(moment)
        folder.mkdir()
        changes = killed(lambda folder=folder: new.save_pretrained(folder), folder, before=moment)
        left += contents(folder) != contents(tmp_path / "expected")
        new.save_pretrained(folder)
        assert contents(folder) == contents(tmp_path / "expected"), f"left by a save that was killed at {moment}"
        moment += 9
    assert left > 2


@needs_fork
def test_a_reader_killed_while_it_finishes_a_save_leaves_the_new_adapter(
    tiny: Saved, versions: tuple[PeftModel, PeftModel], tmp_path: Path
) -> None:
    old, new = versions
    committed(old, new, tmp_path / "committed")
    expected: dict[str, torch.Tensor | None] = {"new": logits_by_adapter(tiny, new)["default"]}
    seen: dict[Any, str] = {}
    moment, changes = 1, None
    while changes is None:
        folder = Path(shutil.copytree(tmp_path / "committed", tmp_path / str(moment)))
        changes = killed(lambda folder=folder: PeftConfig.from_pretrained(str(folder)), folder, before=moment)
        assert outcome(tiny, folder, expected, seen) == "new"
        moment += 1
    assert moment > 4, "the reader changed nothing"


def committed(old: PeftModel, new: PeftModel, folder: Path) -> None:
    """A folder with `old`, and a complete save of `new` none of whose files is in its place."""
    old.save_pretrained(folder)
    new.save_pretrained(folder / peft_sieve.files.COMPLETE)


def test_resuming_from_an_interrupted_save_gets_its_weights(
    tiny: Saved, versions: tuple[PeftModel, PeftModel], tmp_path: Path
) -> None:
    """The configuration is not read then: the adapter is there already."""
    old, new = versions
    committed(old, new, tmp_path)
    for name, path in (("second", tmp_path / "second"), ("default", tmp_path)):
        model = get_peft_model(tiny.fresh, copy.deepcopy(new.peft_config[name]))
        model.load_adapter(str(path), "default", is_trainable=True)
        assert torch.equal(tiny.logits(model), logits_by_adapter(tiny, new)[name])


def test_two_readers_may_finish_a_save_at_once(
    tiny: Saved, versions: tuple[PeftModel, PeftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a job of several processes starts again after a crash."""
    old, new = versions
    expected: dict[str, torch.Tensor | None] = {"new": logits_by_adapter(tiny, new)["default"]}
    committed(old, new, tmp_path)
    replace, others = os.replace, 0

    def after_another_process(source: Any, target: Any) -> None:
        nonlocal others
        if not others:
            others += 1
            peft_sieve.files.finish_interrupted_save(tmp_path)
        replace(source, target)

    monkeypatch.setattr(os, "replace", after_another_process)
    assert outcome(tiny, tmp_path, expected, {}) == "new"
    assert others == 1


def test_a_failed_save_leaves_the_folder_as_it_was(
    tiny: Saved, versions: tuple[PeftModel, PeftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = versions
    old.save_pretrained(tmp_path)
    before = contents(tmp_path)

    def disk_full(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(peft.peft_model, "safe_save_file", disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        new.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_save_leaves_other_files_of_the_folder_alone(tiny: Saved, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"state")
    tiny.model.save_pretrained(tmp_path)
    assert contents(tmp_path) == {
        **contents(tiny.path),
        "notes.txt": b"mine",
        "checkpoint-1": b"",
        "checkpoint-1/optimizer.pt": b"state",
    }


def test_only_the_main_process_writes(tiny: Saved, tmp_path: Path) -> None:
    tiny.model.save_pretrained(str(tmp_path / "adapter"), is_main_process=False)
    assert [name for name in contents(tmp_path) if name != "adapter"] == []
    tiny.model.save_pretrained(str(tmp_path / "adapter"), is_main_process=True)
    assert contents(tmp_path / "adapter") == contents(tiny.path)


# Other methods of PEFT


OTHERS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "ia3": lambda: IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
}


def without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put PEFT's own methods back."""
    for owner, name in (
        (PeftModel, "save_pretrained"),
        (PeftModel, "create_or_update_model_card"),
        (PeftModel, "load_adapter"),
        (PeftConfigMixin, "from_json_file"),
    ):
        current = owner.__dict__[name]
        if isinstance(current, classmethod):
            monkeypatch.setattr(owner, name, classmethod(current.__func__._peft_sieve_original))
        else:
            monkeypatch.setattr(owner, name, current._peft_sieve_original)


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_save_and_load_as_before(
    tiny: Saved, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Any) -> None:
        raise AssertionError("does not write in place")

    torch.manual_seed(0)
    model = get_peft_model(tiny.fresh, OTHERS[method]())
    monkeypatch.setattr("peft_sieve.hf.patches.replaced_when_done", refuse)
    model.save_pretrained(tmp_path / "with")
    loaded = PeftModel.from_pretrained(tiny.fresh, str(tmp_path / "with"))
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert not torch.equal(tiny.logits(loaded), tiny.logits(tiny.base))
    without_us(monkeypatch)
    model.save_pretrained(tmp_path / "without")
    found, expected = contents(tmp_path / "with"), contents(tmp_path / "without")
    # PEFT writes sets in the order of their hashes.
    assert json.loads(found.pop(CONFIG)) == json.loads(expected.pop(CONFIG))
    assert found == expected


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("size", [0, 7, 150])
def test_broken_files_of_other_methods_raise_what_they_raised(
    tiny: Saved, method: str, file: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_peft_model(tiny.fresh, OTHERS[method]()).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:size])
    with pytest.raises(Exception, match=r".") as ours:
        PeftModel.from_pretrained(tiny.fresh, str(tmp_path))
    without_us(monkeypatch)
    with pytest.raises(Exception, match=r".") as theirs:
        PeftModel.from_pretrained(tiny.fresh, str(tmp_path))
    assert not isinstance(ours.value, SieveError)
    assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))


def test_a_lora_config_without_its_type_raises_what_it_raised(tiny: Saved, tmp_path: Path) -> None:
    get_peft_model(tiny.fresh, OTHERS["lora"]()).save_pretrained(tmp_path)
    text = re.sub(r'"peft_type": "LORA",', "", (tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(KeyError, match="peft_type"):
        PeftModel.from_pretrained(tiny.fresh, str(tmp_path))


def test_peft_does_not_leave_it_mapped_either(tmp_path: Path) -> None:
    """With low_cpu_mem_usage it assigns tensors that lie in the file."""
    model = tiny_model("olmoe")
    batch = token_batch(model)
    adapted = get_peft_model(model, SieveLoraConfig(r=4, calib_dataset=[batch], task_type="CAUSAL_LM")).eval()
    randomize_adapters(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), str(tmp_path), low_cpu_mem_usage=True)
    with open(tmp_path / WEIGHTS, "rb+") as file:
        file.write(b"\xff" * (tmp_path / WEIGHTS).stat().st_size)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, adapted(**batch).logits)


def test_transformers_does_not_map_embedding_adapters_either(tmp_path: Path) -> None:
    """Their factors are bare parameters, not modules."""
    model = tiny_model("olmoe")
    batch = token_batch(model)
    config = SieveLoraConfig(
        r=4, calib_dataset=[batch], target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config).eval()
    randomize_adapters(adapted)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = tiny_model("olmoe")
    loaded.load_adapter(str(tmp_path))
    with open(tmp_path / WEIGHTS, "rb+") as file:
        file.write(b"\xff" * (tmp_path / WEIGHTS).stat().st_size)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, adapted(**batch).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_loading_draws_no_initial_values_and_rounds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_cpu_mem_usage: bool, autocast_adapter_dtype: bool
) -> None:
    """Over a base in half precision, factors trained in float32 come back to the bit, by either way of adding them."""
    model = tiny_model("olmoe").bfloat16()
    config = SieveLoraConfig(r=4, calib_dataset=[token_batch(model)], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    randomize_adapters(adapted)
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert all(any(part in key for key in saved) for part in ("experts.lora_", "q_proj.lora_", "gate.lora_"))
    assert any(value.dtype == torch.float32 and not torch.equal(value, value.bfloat16()) for value in saved.values())

    def draw(*args: object) -> None:
        raise AssertionError("initial values were drawn")

    monkeypatch.setattr("peft_sieve.tuners.common.experts.layer.initialize", draw)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": autocast_adapter_dtype}
    loaded = PeftModel.from_pretrained(tiny_model("olmoe").bfloat16(), str(tmp_path), **options)
    loaded.load_adapter(str(tmp_path), "second", **options)
    for name in ("default", "second"):
        found = get_peft_model_state_dict(loaded, adapter_name=name)
        for key, value in saved.items():
            exact = autocast_adapter_dtype or low_cpu_mem_usage or not value.is_floating_point()
            assert torch.equal(found[key], value if exact else value.bfloat16()), (name, key)
    with pytest.raises(AssertionError, match="initial values were drawn"):
        loaded.add_adapter("third", SieveLoraConfig(selected_experts=config.selected_experts))


def test_adapters_on_other_layers_are_loaded_empty_first(tmp_path: Path) -> None:
    """PEFT then calls every layer, also those that do not have the adapter."""
    masks = {"default": {"model.layers.0.mlp.experts": [1, 2]}, "second": {"model.layers.1.mlp.experts": [0]}}
    configs = {name: SieveLoraConfig(r=4, selected_experts=mask) for name, mask in masks.items()}
    adapted = get_peft_model(tiny_model("olmoe"), configs["default"])
    adapted.add_adapter("second", configs["second"])
    randomize_adapters(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), str(tmp_path), low_cpu_mem_usage=True)
    loaded.load_adapter(str(tmp_path / "second"), "second", low_cpu_mem_usage=True)
    for name in masks:
        want, found = (get_peft_model_state_dict(model, adapter_name=name) for model in (adapted, loaded))
        assert want.keys() == found.keys() and all(torch.equal(found[key], value) for key, value in want.items())


@pytest.mark.parametrize("option", ["top_k_frac", "coverage", "top_p", "hellori_density", "calib_stability", "top_k"])
def test_numbers_of_numpy_are_saved(option: str, tmp_path: Path) -> None:
    value = np.int64(2) if option == "top_k" else np.float32(0.25)
    config = SieveLoraConfig(selected_experts={"model.layers.0.mlp.experts": [1, 2]}, **{option: value})
    config.save_pretrained(str(tmp_path))
    assert getattr(PeftConfig.from_pretrained(str(tmp_path)), option) == value
