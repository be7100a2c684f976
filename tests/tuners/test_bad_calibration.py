"""Calibration data and settings of every wrong kind: one sentence each, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, NamedSplit
from peft import get_peft_model
from torch import nn

from peft_sieve import SieveError, SieveLoraConfig, profile_routing, warm_up_profile
from tests.models import tiny_model, token_batch
from tests.tuners.errors import assert_plain

IDS = torch.ones(2, 3, dtype=torch.long)
NAN = float("nan")


class Weird:
    """Of no kind that anything takes."""


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"no/such/file.txt"


def failing() -> Any:
    yield {"input_ids": IDS}
    raise ZeroDivisionError("in the data")


class FailingRows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        raise FileNotFoundError("row.json")


def ready(**inputs: Any) -> list[dict[str, Any]]:
    return [{"input_ids": IDS, **inputs}]


DATA: list[tuple[Callable[[], Any], str]] = [
    (lambda: "word " * 2000, "is neither a file nor a Hub id. To calibrate on a text, pass"),
    (lambda: "w" * 2000, "is neither a file nor a Hub id"),
    (lambda: "Tom has three apples.", "neither a file nor a Hub id"),
    (lambda: "a\0 b", "neither a file nor a Hub id"),
    (lambda: "~nobody-of-that-name/data", "neither a file nor a Hub id"),
    (BytesPath, "'no/such/file.txt' does not exist"),
    (lambda: " ", "empty str"),
    (lambda: NAN, "of type float"),
    (lambda: True, "of type bool"),
    (lambda: Weird(), "of type Weird"),
    (lambda: Weird, "of type type"),
    (lambda: {"text": "hi"}, "of type dict"),
    (lambda: torch.tensor(3), "'Tensor' could not be read: TypeError: iteration over a 0-d tensor"),
    (lambda: np.asarray(3), "'ndarray' could not be read: TypeError: iteration over a 0-d array"),
    (lambda: IDS, "a Tensor, yield items of type Tensor"),
    (lambda: np.array([[1], [2, 3]], dtype=object), "a ndarray, yield items of type list"),
    (lambda: [torch.tensor(3)], "row 0 of the calibration data must be a str or a dict"),
    (lambda: [[IDS]], "row 0 of the calibration data must be a str or a dict"),
    (lambda: [{"input_ids": torch.tensor(3)}], "`input_ids` of row 0 of the calibration data must be a flat list"),
    (lambda: [{"input_ids": [2**70]}], "`input_ids` of row 0 of the calibration data must be a flat list"),
    (lambda: [{"input_ids": np.array([1, None], dtype=object)}], "`input_ids` of row 0 .* must be a flat list"),
    (lambda: [{"input_ids": [1], "attention_mask": torch.tensor(1)}], "`attention_mask` of row 0"),
    (lambda: [{"input_ids": np.array([[1, 2]], dtype=object)}], "`input_ids` of item 0 .* an array of numbers"),
    (lambda: [{"input_ids": np.array([["a"]])}], "`input_ids` of item 0 .* an array of numbers"),
    (lambda: [{"input_ids": IDS.bool()}], "`input_ids` of item 0 .* integers, got torch.bool"),
    (lambda: [{"input_ids": IDS.to(torch.complex64)}], "`input_ids` of item 0 .* integers, got torch.complex64"),
    (lambda: [{"input_ids": IDS.to("meta")}], "`input_ids` of item 0 .* a dense tensor"),
    (lambda: [{"input_ids": IDS.to_sparse()}], "`input_ids` of item 0 .* a dense tensor"),
    (lambda: [{"input_ids": IDS + 1000}], "token id 1001"),
    (lambda: ready(attention_mask=torch.tensor(1)), "`attention_mask` of item 0"),
    (lambda: ready(attention_mask=[[1, 1, 1]] * 2), "`attention_mask` of item 0"),
    (lambda: ready(labels=np.array([None, {}], dtype=object)), "`labels` of item 0 .* an array of numbers"),
    (lambda: [{"input_ids": IDS, 5: 1}], "name of an input of item 0 .* a str, got 5"),
    (
        lambda: ready(position_ids=torch.ones(5, 7).long()),
        r"rejects .* `input_ids` \(2, 3\), `position_ids` \(5, 7\)\. Ru",
    ),
    (lambda: ready(position_ids=torch.tensor(1)), "`position_ids` of item 0 .* a tensor with a number for each token"),
    (lambda: ready(position_ids="first"), "`position_ids` of item 0 .* a tensor with a number for each token"),
    (
        lambda: ready(inputs_embeds=torch.ones(2, 3, 7)),
        r"rejects a calibration batch of .* `inputs_embeds` \(2, 3, 7\)",
    ),
    (lambda: ready(past_key_values=3), r"rejects a calibration batch of .* `past_key_values` \(int\)"),
    (failing, "'generator' could not be read: ZeroDivisionError: in the data"),
    (FailingRows, "'FailingRows' could not be read: FileNotFoundError: row.json"),
]

BAD = [NAN, float("inf"), 1.5, "8", True, [1], {"a": 1}, b"x", torch.tensor([1, 2]), np.array([1, 2]), Weird()]


def state_of(model: nn.Module) -> Any:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return (
        {name: (parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()},
        [(name, type(module), module.training) for name, module in model.named_modules()],
        hooks,
        hasattr(model, "peft_config"),
    )


def assert_unchanged(model: nn.Module, before: Any) -> None:
    after = state_of(model)
    assert after[1:] == before[1:]
    assert all(after[0][name][0] == flag and torch.equal(after[0][name][1], v) for name, (flag, v) in before[0].items())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("olmoe")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(("make", "match"), DATA)
def test_data(make: Callable[[], Any], match: str, model: nn.Module) -> None:
    before = state_of(model)
    with pytest.raises(SieveError, match=match) as caught:
        profile_routing(model, make(), progress=False)
    with pytest.raises(SieveError, match=match):
        get_peft_model(model, SieveLoraConfig(calib_dataset=make(), task_type="CAUSAL_LM"))
    text = str(caught.value)
    assert_plain(text)
    assert len(text) < 500
    if "could not be read" in text or "rejects" in text:
        assert caught.value.__cause__ is not None
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "setting", ["max_samples", "max_length", "batch_size", "seed", "split", "stability", "selection"]
)
def test_settings(setting: str, model: nn.Module) -> None:
    before = state_of(model)
    data = DatasetDict(train=Dataset.from_list([{"input_ids": [3, 4]}] * 4))
    wrong = [value for value in BAD if not (setting == "split" and isinstance(value, str))]
    others = {"split": [None], "max_length": [0, -1, None], "seed": [None], "selection": [{"top_k": 0}, {"seed": NAN}]}
    for value in wrong + others.get(setting, []):
        more = {"stability": 0.5} if setting == "selection" else {}
        with pytest.raises(SieveError, match=setting if not isinstance(value, dict) else ".") as caught:
            profile_routing(model, data, progress=False, **{setting: value}, **more)
        assert_plain(str(caught.value))
        if setting == "selection":
            continue
        field = {"max_samples": "calib_samples"}.get(setting, f"calib_{setting}")
        with pytest.raises(SieveError, match=field):
            get_peft_model(model, SieveLoraConfig(calib_dataset=data, task_type="CAUSAL_LM", **{field: value}))
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [*BAD, len, Path("no/such"), "no/such", "two words"])
def test_tokenizers(value: Any, model: nn.Module) -> None:
    before = state_of(model)
    with pytest.raises(SieveError, match="tokenizer") as caught:
        profile_routing(model, ["two words"], tokenizer=value, progress=False)
    with pytest.raises(SieveError, match="tokenizer"):
        get_peft_model(model, SieveLoraConfig(calib_dataset=["two words"], calib_tokenizer=value))
    assert_plain(str(caught.value))
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [value for value in BAD if not isinstance(value, str)])
def test_formatting_functions(value: Any, model: nn.Module) -> None:
    before = state_of(model)
    with pytest.raises(SieveError, match="calib_formatting_func must be a function"):
        profile_routing(model, ["two words"], formatting_func=value, progress=False)
    with pytest.raises(SieveError, match="calib_formatting_func must"):
        get_peft_model(model, SieveLoraConfig(calib_dataset=["a"], calib_formatting_func=lambda row: value))
    assert_unchanged(model, before)


def test_a_split_of_datasets_is_one(model: nn.Module) -> None:
    data = DatasetDict(train=Dataset.from_list([{"input_ids": [3, 4]}]))
    assert profile_routing(model, data, split=NamedSplit("train"), progress=False).num_tokens == 2


def test_the_warm_up_names_the_batch_too() -> None:
    model = tiny_model("olmoe")
    before = state_of(model)
    with pytest.raises(SieveError, match=r"rejects a calibration batch of .* `labels` \(2, 7\)") as caught:
        warm_up_profile(model, ready(labels=torch.ones(2, 7).long()), fraction=1.0, progress=False)
    assert isinstance(caught.value.__cause__, ValueError)
    assert_unchanged(model, before)


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt, NotImplementedError])
def test_errors_that_are_not_of_the_input_pass(failure: type[BaseException], model: nn.Module) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise failure("of the machine")

    def rows() -> Any:
        raise failure("of the machine")
        yield

    before = state_of(model)
    handle = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(failure, match="of the machine"):
            profile_routing(model, [token_batch(model)], progress=False)
    finally:
        handle.remove()
    if failure is not NotImplementedError:
        for more in ({}, {"formatting_func": fail}, {"tokenizer": fail}):
            with pytest.raises(failure, match="of the machine"):
                profile_routing(model, ["two words"] if more else rows(), progress=False, **more)
    assert_unchanged(model, before)


def test_an_error_of_the_model_itself_passes(model: nn.Module) -> None:
    """One that no batch can avoid: even two plain tokens meet it."""

    def fail(*args: Any) -> None:
        raise RuntimeError("broken weights")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="broken weights"):
            profile_routing(model, [token_batch(model)], progress=False)
    finally:
        handle.remove()
