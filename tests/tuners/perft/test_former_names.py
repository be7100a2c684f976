"""The names that settings of PERFT had go on working: as arguments, as attributes, and in saved files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel

from peft_sieve import PerftConfig, SieveError
from tests.models import tiny_model, token_batch
from tests.tuners.perft.adapted import adapted, logits

# Former name -> (name, a value that is not the default, another).
FORMER: dict[str, tuple[str, Any, Any]] = {
    "alpha": ("lora_alpha", 7, 9),
    "dropout": ("lora_dropout", 0.25, 0.5),
    "init_weights": ("init_lora_weights", False, True),
    "aux_loss_coef": ("balance_loss_coef", 0.5, 0.0),
}


@pytest.mark.parametrize("former", FORMER)
def test_as_an_argument_and_as_an_attribute(former: str) -> None:
    name, value, other = FORMER[former]
    config = PerftConfig(**{former: value})
    assert getattr(config, former) == getattr(config, name) == value != getattr(PerftConfig(), name)
    assert config == PerftConfig(**{name: value})
    setattr(config, former, other)
    assert getattr(config, name) == getattr(config, former) == other
    setattr(config, name, value)
    assert getattr(config, former) == value


@pytest.mark.parametrize("former", FORMER)
def test_a_copy_with_changes(former: str) -> None:
    name, value, other = FORMER[former]
    config = PerftConfig(**{former: value})
    assert getattr(dataclasses.replace(config, r=3), name) == value
    assert getattr(dataclasses.replace(config, **{name: other}), former) == other


@pytest.mark.parametrize("former", FORMER)
def test_a_copy_with_changes_by_former_names(former: str) -> None:
    name, value, other = FORMER[former]
    assert getattr(dataclasses.replace(PerftConfig(**{former: value}), **{former: other}), name) == other


@pytest.mark.parametrize("former", FORMER)
def test_both_names_at_once_are_refused(former: str) -> None:
    name, value, other = FORMER[former]
    with pytest.raises(SieveError, match=rf"\b{former}\b.*\b{name}\b"):
        PerftConfig(**{former: value, name: other})


def test_they_are_checked() -> None:
    with pytest.raises(SieveError, match="lora_alpha .*nan"):
        PerftConfig(alpha=float("nan"))


def test_files_have_the_new_names_and_those_with_former_names_are_read(tmp_path: Path) -> None:
    values = {former: value for former, (_, value, _) in FORMER.items()}
    model = adapted("R", **{name: value for name, value, _ in FORMER.values()})
    batch = token_batch(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    assert not written.keys() & FORMER.keys()
    for name, value, _ in FORMER.values():
        assert written[name] == value
    # As an earlier version wrote it.
    for former, (name, _, _) in FORMER.items():
        written[former] = written.pop(name)
    file.write_text(json.dumps(written))
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert type(read) is PerftConfig and {former: getattr(read, former) for former in FORMER} == values
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), str(tmp_path))
    assert torch.equal(logits(loaded, batch), expected)
    native = tiny_model("olmoe")
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native, batch), expected)
