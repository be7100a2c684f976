"""What an earlier commit wrote (`write.py`) loads with today's code: the same bits, logits, and losses of resumed runs.

Numbers are equal to the bit on the kind of machine that wrote them. Elsewhere sums round differently: logits that are
computed in float64 then agree to ten digits, and losses of training in float32 to five.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from peft_sieve import RoutingProfile
from tests.landed import write
from tests.landed.write import PLACES, RECIPES, adapters_in, base_model, begun, in_float64, loaded, logits_of

SAVED = Path(__file__).parent / "saved"
MACHINE = json.loads((SAVED / "machine.json").read_text())["machine"]
SAME_MACHINE = write.machine() == MACHINE
WEIGHTS = "adapter_model.safetensors"
RESUMED = [name for name, recipe in RECIPES.items() if recipe.adapter_in_float32]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As when the files were written. Each training run collects garbage, in which what is imported need not be."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def base_of(name: str) -> Any:
    recipe = RECIPES[name]
    return base_model(recipe.base, recipe.dtype, SAVED / f"{recipe.base}.safetensors")


@cache
def inputs() -> dict[str, torch.Tensor]:
    return load_file(SAVED / "inputs.safetensors")


@cache
def expected_of(name: str) -> dict[str, torch.Tensor]:
    return load_file(SAVED / name / "expected.safetensors")


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def assert_close(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    """Equal to the bit on a machine like the one that wrote what is expected."""
    if SAME_MACHINE:
        assert torch.equal(found, expected), (found - expected).abs().max()
    else:
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def check_logits(model: nn.Module, name: str, place: str) -> None:
    expected = expected_of(name)
    ids = inputs()["eval"]
    adapters = list(adapters_in(SAVED / name / place))
    for adapter in adapters:
        model.set_adapter(adapter)
        # bfloat16 has three digits, of which rounding in other places may take one.
        rtol = 1e-4 if RECIPES[name].dtype == torch.float32 else 0.1
        assert_close(logits_of(model, ids), expected[f"{place}.{adapter}"], rtol)
    with in_float64(model):
        for adapter in adapters:
            model.set_adapter(adapter)
            assert_close(logits_of(model, ids), expected[f"{place}.{adapter}.float64"], 1e-10)


each_place = pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name in RECIPES for place in PLACES if place == "adapter" or name in RESUMED]
)


@each_place
@pytest.mark.parametrize("empty_first", [False, True])
def test_loaded_by_peft(name: str, place: str, empty_first: bool) -> None:
    options = {"autocast_adapter_dtype": RECIPES[name].adapter_in_float32, "low_cpu_mem_usage": empty_first}
    model = loaded(base_of(name), SAVED / name / place, **options)
    for adapter, folder in adapters_in(SAVED / name / place).items():
        assert_same_bits(get_peft_model_state_dict(model, adapter_name=adapter), load_file(folder / WEIGHTS))
    check_logits(model, name, place)


@each_place
def test_loaded_by_transformers(name: str, place: str) -> None:
    model = base_of(name)
    rounded = RECIPES[name].dtype != torch.float32 and RECIPES[name].adapter_in_float32
    for adapter, folder in adapters_in(SAVED / name / place).items():
        model.load_adapter(str(folder), adapter_name=adapter)
        found = get_peft_model_state_dict(model, adapter_name=adapter)
        saved = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
        if rounded:
            # transformers makes adapters of the model's type, which PEFT does not.
            saved = {key: tensor.to(found[key].dtype) for key, tensor in saved.items()}
        assert_same_bits(found, saved)
    if not rounded:
        check_logits(model, name, place)


@each_place
def test_saved_again(name: str, place: str, tmp_path: Path) -> None:
    """The weights are the same bytes. Fields of the configuration may have other names today, and new ones defaults."""
    model = loaded(base_of(name), SAVED / name / place, autocast_adapter_dtype=RECIPES[name].adapter_in_float32)
    model.save_pretrained(tmp_path)
    again = adapters_in(tmp_path)
    for adapter, folder in adapters_in(SAVED / name / place).items():
        assert (again[adapter] / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        old, new = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, again[adapter]))
        assert {key: new[key] for key in old if key in new} == {key: old[key] for key in old if key in new}
        assert PeftConfig.from_pretrained(again[adapter]).to_dict() == PeftConfig.from_pretrained(folder).to_dict()


def from_configurations(name: str) -> PeftModel:
    """As a run that is started again: new adapters, over which the checkpoint is loaded."""
    torch.manual_seed(3)
    folders = adapters_in(SAVED / name / "start")
    return begun(base_of(name), {adapter: PeftConfig.from_pretrained(path) for adapter, path in folders.items()})


def from_checkpoint(name: str) -> PeftModel:
    return loaded(base_of(name), SAVED / name / "checkpoint", is_trainable=True)


@pytest.mark.parametrize("begin", [from_configurations, from_checkpoint])
@pytest.mark.parametrize("name", RESUMED)
def test_training_goes_on(name: str, begin: Any, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    versions = [{key: one[key] for key in ("torch", "numpy")} for one in (write.machine(), MACHINE)]
    trainer = write.trainer_of(begin(name), inputs()["train"], tmp_path)
    trainer.train(resume_from_checkpoint=str(SAVED / name / "checkpoint"))
    if recipe.random and versions[0] != versions[1]:
        pytest.skip("it resumes; other versions may draw other random numbers, and the losses are not comparable")
    losses = torch.tensor(trainer.losses, dtype=torch.float64)
    in_float32 = recipe.dtype == torch.float32
    assert_close(losses, expected_of(name)["losses"], 1e-5 if in_float32 else 0.02)
    for adapter, folder in adapters_in(SAVED / name / "adapter").items():
        config = trainer.model.peft_config[adapter].to_dict()
        written = json.loads((folder / "adapter_config.json").read_text())
        for field in ("selected_experts", "expert_blocks", "ledger", "kept_experts"):
            assert config.get(field) == written.get(field)
        found, saved = get_peft_model_state_dict(trainer.model, adapter_name=adapter), load_file(folder / WEIGHTS)
        assert found.keys() == saved.keys()
        for key, tensor in saved.items():
            assert_close(found[key], tensor, 1e-4 if in_float32 else 0.1)


# PERFT's settings as that commit named them, and as other methods name the same.
OLD_NAMES = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "init_weights": "init_lora_weights",
    "aux_loss_coef": "balance_loss_coef",
}


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("perft")])
def test_old_names_of_settings(name: str) -> None:
    """What the files say reaches the configuration, which has each setting under one name."""
    for place in PLACES:
        written = json.loads((SAVED / name / place / "adapter_config.json").read_text())
        read = PeftConfig.from_pretrained(SAVED / name / place).to_dict()
        for old, other in OLD_NAMES.items():
            assert [read[key] for key in (old, other) if key in read] == [written[old]]


@pytest.mark.parametrize("version", [1, 2])
def test_profiles(version: int, tmp_path: Path) -> None:
    path = SAVED / f"profile_{version}.safetensors"
    profile = RoutingProfile.load(path)
    profile.save(tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    held = {
        f"{what}.{layer}": tensor
        for what in ("counts", "mass", "sample_share", "sample_mass")
        for layer, tensor in (getattr(profile, what) or {}).items()
    }
    assert_same_bits(held, load_file(path))
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["peft_sieve_routing_profile"])
    assert header["version"] == version
    assert header["layers"] == list(profile.layer_names)
    for field in ("num_tokens", "num_experts_per_tok", "num_samples", "metadata"):
        assert header.get(field) == getattr(profile, field)
