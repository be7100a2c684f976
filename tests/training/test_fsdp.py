"""Training under accelerate's FSDP2 is training on one process: two real ones, connected by gloo on loopback.

One pair goes through all scenarios of tests/workers/fsdp.py, since starting it takes longer than they do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_sieve import SieveError, SieveLoraConfig
from tests.models import randomize_adapter, tiny_model, token_batch
from tests.workers.fsdp import MASK, SCENARIOS, rows, train
from tests.workers.pair import run_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pair of processes left its results."""
    return run_pair("tests.workers.fsdp", tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Callable[[str], dict[str, Any]]:
    def read(name: str) -> dict[str, Any]:
        both = []
        for rank in range(2):
            path = folder / f"{name}.{rank}.json"
            if not path.exists():
                log = (folder / f"log.{rank}").read_text("utf-8", errors="replace")
                pytest.fail(f"process {rank} did not finish {name!r}; the end of its output:\n{log[-4000:]}")
            both.append(json.loads(path.read_text("utf-8")))
            if "crash" in both[-1]:
                pytest.fail(f"process {rank} failed in {name!r}:\n{both[-1]['crash']}")
        assert both[0] == both[1]
        return both[0]

    return read


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """Outcome and folder of a scenario on one process; those that come to the same train once."""
    done: dict[Any, tuple[dict[str, Any], Path]] = {}

    def once(name: str) -> tuple[dict[str, Any], Path]:
        kind = SCENARIOS[name].config, SCENARIOS[name].sft
        if kind not in done:
            folder = tmp_path_factory.mktemp("alone")
            done[kind] = train(SCENARIOS[name], folder), folder
        return done[kind]

    return once


EQUAL = {name: scenario for name, scenario in SCENARIOS.items() if not scenario.aux_loss}
RUNS = [(name, False) for name in EQUAL] + [(name, True) for name, scenario in SCENARIOS.items() if scenario.resumed]


@pytest.mark.parametrize(("name", "resumed"), RUNS)
def test_losses_and_saved_adapter_are_those_of_one_process(
    name: str, resumed: bool, outcome: Any, alone: Any, folder: Path
) -> None:
    expected, reference = alone(name)
    found = outcome(f"{name}.resumed" if resumed else name)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    saved = folder / name / ("resumed" if resumed else "adapter")
    tensors, wanted = (load_file(path / "adapter_model.safetensors") for path in (saved, reference / "adapter"))
    assert tensors.keys() == wanted.keys()
    for key, value in wanted.items():
        if key.endswith(".lora_usage.tokens"):  # what DMEP counts is of one process; it refuses to prune with several
            continue
        torch.testing.assert_close(
            tensors[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
    PeftModel.from_pretrained(tiny_model("olmoe"), saved)


def test_training_changes_what_is_compared(alone: Any) -> None:
    losses, folder = alone("full")
    again = get_peft_model(tiny_model("olmoe"), SCENARIOS["full"].config())
    randomize_adapter(again)
    trained = load_file(folder / "adapter" / "adapter_model.safetensors")
    started = {key.replace(".default", ""): value for key, value in again.state_dict().items() if ".default." in key}
    moved = [float((trained[key] - started[key]).abs().max()) for key in trained if key.endswith(".weight")]
    assert len(moved) > 20 and min(moved) > 5e-3, moved
    assert len(set(losses["losses"])) == 3


@pytest.mark.parametrize(("name", "times"), [("ddp_aux_loss", 2), ("sft_aux_loss", 1)])
def test_the_routers_balance_loss_is_that_of_each_process(name: str, times: int, outcome: Any) -> None:
    """So the loss on two processes is not that on one with both batches, with PEFT's own adapters neither.

    A balance loss is not a mean over tokens. Trainer adds it up over the processes: to average over the tokens of all
    of them, it multiplies what the model returns by their number. SFTTrainer averages it.
    """
    losses = outcome(name)["losses"]
    model = get_peft_model(tiny_model("olmoe", output_router_logits=True), SCENARIOS[name].config())
    randomize_adapter(model)
    outputs = [model(input_ids=part, labels=part) for part in rows()[:4].split(2)]
    added = [model.config.router_aux_loss_coef * float(out.aux_loss) for out in outputs]
    without = [float(out.loss) - part for out, part in zip(outputs, added, strict=True)]
    assert losses[0] == pytest.approx((sum(without) + times * sum(added)) / 2, rel=1e-5)
    assert min(added) > 0.03


@pytest.mark.parametrize(
    ("name", "words"),
    [("tensor_parallel", "Tensor parallelism (tp_size=2)"), ("expert_parallel", "expert parallelism")],
)
def test_models_that_are_spread_in_another_way_are_refused(name: str, words: str, outcome: Any) -> None:
    """Before calibration, in which processes with other batches would wait for each other forever."""
    found = outcome(name)
    assert words in found["refusal"] and found["untouched"]


def adapted() -> PeftModel:
    model = get_peft_model(tiny_model("olmoe"), SieveLoraConfig(r=4, selected_experts=MASK, task_type="CAUSAL_LM"))
    randomize_adapter(model)
    return model.eval()


@pytest.mark.parametrize("left", [0, 1])
def test_a_save_without_some_of_the_adapter_is_refused_and_leaves_the_last_one(left: int, tmp_path: Path) -> None:
    """Sharded engines hand out a state dict of nothing in places, on a process that gathers nothing for example."""
    model = adapted()
    model.save_pretrained(tmp_path / "a")
    before = load_file(tmp_path / "a" / "adapter_model.safetensors")
    partial = dict(list(model.state_dict().items())[: left * 40])
    with pytest.raises(SieveError, match=r"lacks \d+ of the \d+ tensors of adapter 'default'"):
        model.save_pretrained(tmp_path / "a", state_dict=partial)
    after = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    model.save_pretrained(tmp_path / "b", state_dict=partial, is_main_process=False)  # writes nothing


def test_the_meta_device_loses_no_map_between_experts_and_slots() -> None:
    """What is loaded has parameters only, as when accelerate shards a model there."""
    model = adapted()
    batch = token_batch(model)
    expected = model(**batch).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to("meta")
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict({key: value for key, value in state.items() if not key.endswith(".slots")}, assign=True)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:  # of the rotary embedding, which is in no state dict
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, buffers[name])
        else:
            assert torch.equal(buffer, buffers[name])
    assert torch.equal(model(**batch).logits, expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_memory_of_its_own_after_the_meta_device_has_the_map_again() -> None:
    model = adapted()
    slots = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("slots")}
    model.to("meta").to_empty(device="cpu")
    for name, value in slots.items():
        assert torch.equal(model.get_buffer(name), value)
