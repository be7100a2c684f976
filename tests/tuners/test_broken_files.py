"""Files of every method that were cut short or changed: refused in a sentence, and nothing is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sieve import SieveError, export_lora
from tests.models import tiny_model
from tests.tuners.errors import assert_plain
from tests.tuners.test_injection import CONFIGS, state

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def cut(name: str, share: float = 0.9) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return change


def with_a_foreign_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = "perft_A" if any("perft_A" in key for key in weights) else "lora_A"
    save_file({**weights, f"base_model.model.model.foo.{name}.weight": torch.ones(2)}, folder / WEIGHTS)


EDITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut short": (cut(WEIGHTS), "cannot be read as safetensors"),
    "weights empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "cannot be read as safetensors"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "configuration cut short": (cut(CONFIG), "cannot be read as JSON"),
    "configuration without a type": (cut(CONFIG, 0.2), "cannot be read as JSON"),
    "a tensor too many": (with_a_foreign_tensor, "foo"),
}


def by_peft(base: nn.Module, folder: Path) -> None:
    PeftModel.from_pretrained(base, str(folder))


def by_transformers(base: Any, folder: Path) -> None:
    base.load_adapter(str(folder))


def assert_refused(load: Callable[..., Any], folder: Path, text: str) -> None:
    """It is refused in plain words, and the model is as it was."""
    base = tiny_model("olmoe")
    before = state(base)
    with pytest.raises(SieveError, match=text) as caught:
        load(base, folder)
    assert_plain(str(caught.value))
    assert state(base) == before


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Adapters by method, saved once."""
    root = tmp_path_factory.mktemp("good")

    def folder(method: str) -> Path:
        if not (root / method).exists():
            get_peft_model(tiny_model("olmoe"), CONFIGS[method]()).save_pretrained(root / method)
        return root / method

    return folder


@pytest.fixture
def saved(good: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the adapter of a method, to be broken."""
    return lambda method: Path(shutil.copytree(good(method), tmp_path / "broken"))


@pytest.mark.parametrize("load", [by_peft, by_transformers])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("method", ["epng", "perft_r", "perft_e", "lora_moe"])
def test_is_refused(saved: Callable[[str], Path], method: str, edit: str, load: Callable[..., Any]) -> None:
    folder = saved(method)
    change, text = EDITS[edit]
    change(folder)
    assert_refused(load, folder, text)


# What no save writes: refused before a layer is made, or where it is compared, and by a loader into an adapter, too


def into_an_adapter(base: nn.Module, folder: Path, method: str) -> None:
    """As a trainer resumes."""
    get_peft_model(base, CONFIGS[method]()).load_adapter(str(folder), "default", is_trainable=True)


def raw(content: bytes) -> Callable[[Path], Any]:
    """The configuration with something before its end."""

    def change(folder: Path) -> None:
        text = (folder / CONFIG).read_bytes().rstrip().removesuffix(b"}")
        (folder / CONFIG).write_bytes(text + b', "more": ' + content + b"}")

    return change


def setting(name: str, value: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        assert name in content
        (folder / CONFIG).write_text(json.dumps({**content, name: value}))

    return change


def folder_in_place_of(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


SETTINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nested": (raw(b"[" * 3000 + b"]" * 3000), "cannot be read as JSON"),
    "5,000 digits": (raw(b"9" * 5000), "cannot be read as JSON"),
    "not UTF-8": (raw(b'"\xff"'), "cannot be read as JSON"),
    "a folder for weights": (folder_in_place_of(WEIGHTS), "cannot be read as safetensors"),
    "too large for a float": (setting("lora_alpha", 10**400), "lora_alpha must be"),
    "a rank of a billion": (setting("r", 10**9), "r=1000000000, and the weights"),
    "task type": (setting("task_type", "x" * 9000), "Invalid task type: 'xxx"),
}
OF_A_METHOD: dict[tuple[str, str], tuple[Callable[[Path], Any], str]] = {
    ("perft_r", "a billion adapters"): (setting("num_adapters", 10**9), "num_adapters=1000000000, and the weights"),
    ("perft_r", "a long pattern"): (setting("target_modules", "x" * 9000), "target_modules='xxx"),
    ("lora_moe", "a long pattern"): (setting("target_modules", "x" * 9000), "target_modules='xxx"),
    ("lora_moe", "a billion experts"): (setting("num_experts", 10**9), "num_experts=1000000000, and the weights"),
    ("sieve", "a number for parameters"): (setting("target_parameters", 1.5), "target_parameters must be"),
    ("sieve", "a long parameter"): (setting("target_parameters", ["x" * 9000]), "target_parameters must be"),
    ("sieve", "a number for tokens"): (setting("trainable_token_indices", 1.5), "trainable_token_indices must be"),
    ("sieve", "no tokens"): (setting("trainable_token_indices", []), "trainable_token_indices must be"),
    ("sieve", "a negative token"): (setting("trainable_token_indices", [-1]), "trainable_token_indices must be"),
    ("sieve", "tokens of experts"): (setting("trainable_token_indices", {"mlp.experts": [1]}), "has no embeddings"),
    ("sieve", "a switch for a mapping"): (setting("kasa_config", 0), "`KasaConfig` must be"),
    ("sieve", "an alpha"): (setting("alpha_pattern", {"x": 10**400}), "alpha_pattern.* must be"),
}


@pytest.mark.parametrize("load", [by_peft, by_transformers])
@pytest.mark.parametrize(
    ("method", "edit", "expected"),
    [
        *(
            (method, *one)
            for method in ("sieve", "epng", "perft_r", "perft_e", "lora_moe")
            for one in SETTINGS.values()
        ),
        *((method, *one) for (method, _), one in OF_A_METHOD.items()),
    ],
)
def test_a_setting_that_no_save_writes_is_refused(
    saved: Callable[[str], Path], method: str, edit: Callable[[Path], Any], expected: str, load: Callable[..., Any]
) -> None:
    folder = saved(method)
    edit(folder)
    assert_refused(load, folder, expected)


def stand_for_numbers(folder: Path, ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(folder / WEIGHTS)
    key = next(key for key in weights if key.endswith(ending))
    save_file({**weights, key: change(weights[key]).contiguous()}, folder / WEIGHTS)


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a scalar": lambda t: t.flatten()[0].clone(),
    "an axis more": lambda t: t[None],
    "longer": lambda t: torch.cat([t, t]),
    "complex": lambda t: t.to(torch.complex64),
    "in eight bits": lambda t: t.to(torch.float8_e4m3fn),
}
BOOKKEEPING = {
    "sieve": ["slots"],
    "epng": ["slots", "blocks", "importance"],
    "perft_e": ["perft_experts.slots"],
    "lora_moe": ["lora_usage.tokens", "lora_usage.experts", "lora_usage.pruned"],
}


@pytest.mark.parametrize(
    ("method", "name", "kind"),
    [
        (method, name, kind)
        for method, names in BOOKKEEPING.items()
        for name in names
        for kind in KINDS
        if (name, kind) != ("importance", "in eight bits")  # which is an importance, rounded
    ],
)
def test_bookkeeping_of_another_kind_is_refused(
    saved: Callable[[str], Path], method: str, name: str, kind: str
) -> None:
    folder = saved(method)
    stand_for_numbers(folder, name, KINDS[kind])
    for load in (by_peft, by_transformers):
        assert_refused(load, folder, "")
    with pytest.raises(SieveError):
        into_an_adapter(tiny_model("olmoe"), folder, method)


@pytest.mark.parametrize("load", [by_peft, by_transformers])
@pytest.mark.parametrize("method", ["sieve", "epng", "perft_r", "perft_e", "lora_moe"])
def test_factors_of_whole_numbers_are_refused(
    saved: Callable[[str], Path], method: str, load: Callable[..., Any]
) -> None:
    folder = saved(method)
    stand_for_numbers(folder, "_A.weight", lambda t: t.to(torch.int8))
    with pytest.raises(SieveError, match="not in a floating-point type"):
        load(tiny_model("olmoe"), folder)


def test_a_type_that_nobody_knows_is_not_repeated_whole(saved: Callable[[str], Path]) -> None:
    folder = saved("sieve")
    (folder / CONFIG).write_text(json.dumps({"peft_type": "x" * 9000}))
    with pytest.raises(SieveError, match="No adapter can be read") as caught:
        export_lora(folder, folder / "out")
    assert_plain(str(caught.value))
