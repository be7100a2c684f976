"""Several processes hold one mask or stop: two real ones, connected by gloo on loopback.

Starting a process takes longer than any scenario, so one pair goes through all of them
(tests/workers/two_processes.py), and each test judges how one of them ended on both ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from tests.models import tiny_model, token_batch
from tests.reference import assert_same
from tests.workers.pair import run_pair
from tests.workers.sharded import SHARDED, adapted, train_a_step

Outcome = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pair of processes left its results."""
    return run_pair("tests.workers.two_processes", tmp_path_factory.mktemp("two_processes"))


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    def read(name: str, rank: int) -> dict[str, Any]:
        path = folder / f"{name}.{rank}.json"
        if not path.exists():
            log = (folder / f"log.{rank}").read_text("utf-8", errors="replace")
            pytest.fail(f"process {rank} did not finish {name!r}; the end of its output:\n{log[-4000:]}")
        content = json.loads(path.read_text("utf-8"))
        if "crash" in content:
            pytest.fail(f"process {rank} failed in {name!r}:\n{content['crash']}")
        return content

    def both(name: str) -> list[dict[str, Any]]:
        ranks = {"alone_on_texts": [0], "alone_summed": [1], "left_alone": [0]}.get(name, [0, 1])
        return [read(name, rank) for rank in ranks]

    return both


def test_different_data_give_the_mask_of_the_summed_counts(outcome: Outcome) -> None:
    (expected,) = outcome("alone_summed")
    assert expected["question"] != expected["answer"], "the data must ask for different masks"
    assert expected["mask"] not in (expected["question"], expected["answer"])

    first, second = outcome("different_data")
    assert first["mask"] == second["mask"] == expected["mask"]
    assert first["tokens"] == second["tokens"] == expected["tokens"]
    assert first["coverage"] == second["coverage"]
    assert first["fingerprint"] == second["fingerprint"]


def test_calibration_stops_at_the_same_time_on_every_process(outcome: Outcome) -> None:
    """Also where one has no batch left; what is compared are the halves of all data."""
    (expected,) = outcome("alone_summed")
    first, second = outcome("never_stable")
    assert first == second
    assert {name: first[name] for name in ("mask", "tokens")} == expected["uneven"]
    assert first["samples"] == 16 and min(first["stability"].values()) < 1
    early, other = outcome("stable_at_once")
    assert early == other
    assert early["samples"] == 12 and early["tokens"] < first["tokens"]
    assert min(early["stability"].values()) >= 0.01


def test_same_data_give_what_one_process_gets(outcome: Outcome) -> None:
    """The mask, and its provenance: samples, tokens, coverage, fingerprint and all the rest."""
    (alone,) = outcome("alone_on_texts")
    assert alone["samples"] == 20
    first, second = outcome("same_data")
    assert first == alone
    assert second == alone


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("different_masks", ["processes [1] of 2 hold other selected_experts than process 0"]),
        ("different_cold_experts", ["processes [1] of 2 hold other cold_experts than process 0"]),
        ("mask_and_calibration", ["processes [1] of 2", "than process 0"]),
        ("masks_made_before_connecting", ["processes [1] of 2 hold other selected experts than process 0"]),
        ("native_masks_made_before_connecting", ["processes [1] of 2 hold other selected experts than process 0"]),
        ("settings_made_before_connecting", ["hold other settings of the experts' adapters than process 0"]),
    ],
)
def test_disagreement_stops_every_process(scenario: str, words: list[str], outcome: Outcome) -> None:
    """Masks of the same size, so nothing else would notice; the last one in the first forward of DDP training."""
    for end in outcome(scenario):
        assert end["refusal"] is not None, "went on with different masks"
        assert all(word in end["refusal"] for word in words), end["refusal"]
        assert end.get("untouched", True), "an adapter was left on the model"


def test_broken_data_on_one_process_stop_every_process(outcome: Outcome) -> None:
    first, second = outcome("empty_data")
    assert first["refusal"] is not None and second["refusal"] is not None
    assert first["refusal"].startswith("process 1 of 2 failed, so this one stops too; it said: ")
    assert first["refusal"].endswith(second["refusal"]), (first["refusal"], second["refusal"])
    assert first["untouched"] and second["untouched"]


def test_a_process_that_ends_during_calibration_is_named_by_the_others(outcome: Outcome) -> None:
    (end,) = outcome("left_alone")
    assert "with process 1, which stopped" in end["refusal"] and end["untouched"], end["refusal"]


def test_training_leaves_the_same_adapter_on_every_process(outcome: Outcome, folder: Path) -> None:
    for end in outcome("training"):
        assert end["world_size"] == 2
        assert len(end["losses"]) == 3 and all(map(math.isfinite, end["losses"]))

    initial = [load_file(folder / f"initial.{rank}.safetensors") for rank in range(2)]
    trained = [load_file(folder / f"trained.{rank}.safetensors") for rank in range(2)]
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert trained[0].keys() == trained[1].keys() == saved.keys()
    factors = [name for name in saved if name.endswith(".weight")]
    assert any(not torch.equal(initial[0][name], initial[1][name]) for name in factors)
    for name in factors:
        assert not torch.equal(trained[0][name], initial[0][name]), f"{name} was not trained"
    for name in saved:
        assert torch.equal(trained[0][name], trained[1][name]), name
        assert torch.equal(trained[0][name], saved[name]), name


def test_drift_is_logged_over_all_processes(outcome: Outcome) -> None:
    """Both ranks log the same: the traffic of both, though each has batches of its own."""
    first, second = outcome("training")
    assert first["seen"] != second["seen"]
    assert first["drift"] == second["drift"]
    mask = range(8, 16)  # of the worker's mask_from(8), in every layer
    for step, logged in enumerate(first["drift"]):
        parts = [rank["seen"][step] for rank in (first, second)]
        layers = [torch.tensor(a) + torch.tensor(b) for a, b in zip(*(part["counts"] for part in parts), strict=True)]
        coverage = [float(counts[8:16].sum() / counts.sum()) for counts in layers]
        hottest = [sorted(range(len(counts)), key=lambda e: (-int(counts[e]), e))[:8] for counts in layers]
        jaccard = [len({*hot} & {*mask}) / len({*hot} | {*mask}) for hot in hottest]
        assert logged["routing_tokens"] == sum(sum(part["mask"]) for part in parts)
        assert logged["routing_coverage"] == pytest.approx(sum(coverage) / len(coverage))
        assert logged["routing_jaccard"] == pytest.approx(sum(jaccard) / len(jaccard))


@pytest.mark.parametrize("name", SHARDED)
def test_gradients_and_adapters_under_fsdp2_are_those_of_one_process(name: str, outcome: Outcome, folder: Path) -> None:
    held = [rank[name] for rank in outcome("sharded")]
    assert held == ([2, 1] if name == "plain" else [1, 0])
    model = adapted(**SHARDED[name])
    train_a_step(model, token_batch(model, batch=2))
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = load_file(folder / "sharded" / name / "gradients.safetensors")
    assert found.keys() == expected.keys()
    for parameter_name, gradient in expected.items():
        assert_same(found[parameter_name], gradient, parameter_name, rtol=1e-4, atol=1e-5)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), folder / "sharded" / name)
    saved = get_peft_model_state_dict(loaded)
    for key, value in get_peft_model_state_dict(model).items():
        assert_same(saved.pop(key) + 3, value.detach() + 3, key, rtol=1e-4, atol=1e-5)
    assert not saved
