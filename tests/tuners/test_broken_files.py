"""Files of the related methods that were cut short or changed: refused in a sentence, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sieve import SieveError
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
    "configuration cut short": (cut(CONFIG), "is not JSON"),
    "configuration without a type": (cut(CONFIG, 0.2), "is not JSON"),
    "a tensor too many": (with_a_foreign_tensor, "foo"),
}


def by_peft(base: nn.Module, folder: Path) -> None:
    PeftModel.from_pretrained(base, str(folder))


def by_transformers(base: Any, folder: Path) -> None:
    base.load_adapter(str(folder))


@pytest.mark.parametrize("load", [by_peft, by_transformers])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("method", ["epng", "perft_r", "perft_e", "lora_moe"])
def test_is_refused(method: str, edit: str, load: Callable[..., Any], tmp_path: Path) -> None:
    get_peft_model(tiny_model("olmoe"), CONFIGS[method]()).save_pretrained(tmp_path)
    change, text = EDITS[edit]
    change(tmp_path)
    base = tiny_model("olmoe")
    before = state(base)
    with pytest.raises(SieveError, match=text) as caught:
        load(base, tmp_path)
    assert_plain(str(caught.value))
    assert state(base) == before
