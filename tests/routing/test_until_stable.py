"""Calibration that stops once two halves of the data select the same experts, against a loop that recounts them."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from peft_sieve import RoutingProfile, SieveError, SieveLoraConfig, profile_routing, select_experts, selection_stability
from peft_sieve.routing.data.batches import calibration_batches
from peft_sieve.routing.until_stable import StabilityRule
from tests.models import small_olmoe, small_tokenizer, tiny_model, token_batch

ROWS = Path(__file__).parents[1] / "data" / "gsm8k_train_64.jsonl"
QUESTIONS = [json.loads(line)["question"] for line in ROWS.read_text(encoding="utf-8").splitlines()]
READ: dict[str, Any] = {"max_length": 32, "batch_size": 2}
THRESHOLD = 0.5


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return small_olmoe()


def compared(model: PreTrainedModel, seed: int, **selection: Any) -> list[tuple[int, dict[str, float], RoutingProfile]]:
    """Whenever the batches have doubled: samples so far, agreement of every second with the rest, profile of all."""
    batches = list(calibration_batches(QUESTIONS, tokenizer=small_tokenizer(), seed=seed, **READ).batches)
    random.Random(seed).shuffle(batches)
    found, number = [], 2
    while number <= len(batches):
        halves = [profile_routing(model, batches[turn:number:2]) for turn in (0, 1)]
        found.append((2 * number, selection_stability(*halves, **selection), profile_routing(model, batches[:number])))
        number *= 2
    return found


def assert_same_counts(one: RoutingProfile, other: RoutingProfile) -> None:
    assert one.num_tokens == other.num_tokens
    assert one.num_experts_per_tok == other.num_experts_per_tok
    for path in one.counts:
        assert torch.equal(one.counts[path], other.counts[path]), path
        torch.testing.assert_close(one.mass[path], other.mass[path])


@pytest.mark.parametrize("selection", [{}, {"top_k": 3, "score": "mass"}])
def test_stops_at_the_first_doubling_that_is_stable_in_every_layer(
    model: PreTrainedModel, selection: dict[str, Any]
) -> None:
    found = compared(model, 0, **selection)
    samples, agreement, expected = next(step for step in found if min(step[1].values()) >= THRESHOLD)
    assert found[0][0] < samples < len(QUESTIONS), "the data must make it stop in between"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile = profile_routing(
            model, QUESTIONS, tokenizer=small_tokenizer(), stability=THRESHOLD, selection=selection, **READ
        )
    assert_same_counts(profile, expected)
    assert profile.metadata["samples"] == samples
    assert profile.metadata["tokens"] == expected.num_tokens
    assert profile.metadata["stability"] == agreement
    assert profile.metadata["stability_threshold"] == THRESHOLD


def test_without_end_all_data_are_used_and_a_warning_names_the_layer(model: PreTrainedModel, tmp_path: Path) -> None:
    _, agreement, _ = compared(model, 0)[-1]
    everything = profile_routing(model, QUESTIONS, tokenizer=small_tokenizer(), **READ)
    below = [path for path, value in agreement.items() if value < 1]
    lowest = min(below, key=agreement.__getitem__)
    with pytest.warns(UserWarning) as caught:
        profile = profile_routing(model, QUESTIONS, tokenizer=small_tokenizer(), stability=1, **READ)
    assert str(caught[0].message) == (
        f"The calibration data 'list' ended after {everything.num_tokens:,} tokens, before the selection was stable: "
        f"their halves agree on less than 1 of the experts in {len(below)} of 6 layers, least in {lowest!r} with "
        f"{agreement[lowest]:.2f}. Pass more data, or raise max_samples (calib_samples)."
    )
    assert_same_counts(profile, everything)
    profile.save(tmp_path / "profile.safetensors")
    assert RoutingProfile.load(tmp_path / "profile.safetensors").metadata["stability"] == agreement


@pytest.mark.parametrize("number", [1, 3])
def test_numbers_of_batches_that_do_not_double(number: int) -> None:
    """One batch makes no halves, which counts as unstable; of three, the third is compared as well."""
    model = tiny_model("olmoe")
    batches = [token_batch(model, seed=seed) for seed in range(number)]
    with pytest.warns(UserWarning, match="are a single batch" if number == 1 else "ended after"):
        profile = profile_routing(model, batches, stability=1.0)
    assert_same_counts(profile, profile_routing(model, batches))
    if number == 1:
        assert set(profile.metadata["stability"].values()) == {0.0}


def test_a_layer_without_tokens_is_stable_and_warned_of_once() -> None:
    halves = [RoutingProfile(counts={"a": [3, 1, 0], "b": [0, 0, 0]}) for _ in range(2)]
    rule = StabilityRule(1.0, {"top_k": 1}, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rule.measured(*halves) == {"a": 1.0, "b": 1.0}
    assert rule.unstable({"a": 1.0, "b": 0.999}) == {"b": 0.999}


@pytest.mark.parametrize("threshold", [0, 1.01, float("nan"), True, "0.7"])
def test_thresholds(threshold: Any) -> None:
    """Refused before the model is looked at."""
    with pytest.raises(SieveError, match=f"stability must be a number above 0 and at most 1, got {threshold!r}"):
        profile_routing(torch.nn.Linear(1, 1), [], stability=threshold)


def test_the_configuration_stops_there_too_and_saves_how_sure_its_mask_is(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    found = compared(model, 3, top_k=5)
    threshold = max(min(agreement.values()) for _, agreement, _ in found[:-1])
    samples, agreement, expected = next(step for step in found if min(step[1].values()) >= threshold)
    config = SieveLoraConfig(
        r=4,
        top_k=5,
        task_type="CAUSAL_LM",
        calib_dataset=QUESTIONS,
        calib_stability=threshold,
        calib_seed=3,
        **{f"calib_{name}": value for name, value in READ.items()},
    )
    get_peft_model(small_olmoe(), config).save_pretrained(tmp_path)
    saved = SieveLoraConfig.from_pretrained(tmp_path)
    assert saved.selected_experts == select_experts(expected, top_k=5).to_dict()
    assert (saved.calibration["samples"], saved.calibration["tokens"]) == (samples, expected.num_tokens)
    assert saved.calibration["stability"] == {path: round(value, 4) for path, value in agreement.items()}
    assert saved.calibration["stability_threshold"] == saved.calib_stability == threshold


def test_without_a_threshold_nothing_is_said_of_stability() -> None:
    model = tiny_model("olmoe")
    assert SieveLoraConfig().calib_stability is None
    config = SieveLoraConfig(r=4, task_type="CAUSAL_LM", calib_dataset=[token_batch(model)])
    get_peft_model(model, config)
    assert not any("stability" in name for name in config.calibration)
    assert "stability" not in profile_routing(model, [token_batch(model)]).metadata
