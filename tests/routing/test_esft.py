"""ESFT's scores and its rule of selection (arXiv 2407.01906), against published selections and by hand."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_sieve import RoutingProfile, SieveError, SieveLoraConfig, profile_routing, register_score, select_experts
from peft_sieve.cli import main
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing import scores as scores_module
from peft_sieve.routing.counting import DispatchCounter
from peft_sieve.routing.sample_averages import SampleAverages
from tests.models import tiny_model

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "esft_scores.json").read_text())


def published_profile(task: str) -> RoutingProfile:
    scores = PUBLISHED[task]
    counts = [[round(10_000 * share) for share in row] for row in scores["token_scores"]]
    return RoutingProfile.from_arrays(counts, sample_share=scores["token_scores"], sample_mass=scores["gate_scores"])


@pytest.mark.parametrize("task", ["intent", "law"])
def test_the_published_scores_give_the_published_selection(task: str) -> None:
    """All 26 layers of DeepSeek-V2-Lite, and the order in which the experts were selected."""
    profile = published_profile(task)
    chosen = select_experts(profile, strategy="cumulative", score="esft_token")
    assert list(chosen.hottest_first(profile, "esft_token").values()) == PUBLISHED[task]["selected"]
    assert len(chosen) == 26
    assert chosen == select_experts(profile, strategy="cumulative", score="esft_token", top_p=0.2)
    assert chosen != select_experts(profile, strategy="cumulative", score="esft_token", top_p=0.1)


@pytest.mark.parametrize("task", ["intent", "law"])
def test_gate_scores_are_summed_up_to_a_tenth(task: str) -> None:
    profile = published_profile(task)
    found = select_experts(profile, strategy="cumulative", score="esft_gate").hottest_first(profile, "esft_gate")
    for experts, scores in zip(found.values(), PUBLISHED[task]["gate_scores"], strict=True):
        assert math.fsum(scores[e] for e in experts) >= 0.1 > math.fsum(scores[e] for e in experts[:-1])
        assert min(scores[e] for e in experts) >= max(s for e, s in enumerate(scores) if e not in experts)


def small(share: Any, **options: Any) -> RoutingProfile:
    return RoutingProfile.from_arrays([[1] * len(share[0])] * len(share), sample_share=share, **options)


def test_the_expert_that_reaches_the_sum_is_in_and_ties_go_to_the_lower_id() -> None:
    profile = small([[0.1, 0.2, 0.3, 0.2, 0.2], [0.5, 0.0, 0.5, 0.0, 0.0]])

    def selected(top_p: float) -> dict[str, list[int]]:
        chosen = select_experts(profile, strategy="cumulative", score="esft_token", top_p=top_p)
        return chosen.hottest_first(profile, "esft_token")

    assert selected(0.3) == {"layers.0": [2], "layers.1": [0]}
    assert selected(0.31) == {"layers.0": [2, 1], "layers.1": [0]}
    assert selected(0.5) == {"layers.0": [2, 1], "layers.1": [0]}
    # Experts without a score are left out also where the rest only just reaches the sum.
    assert selected(1.0) == {"layers.0": [2, 1, 3, 4, 0], "layers.1": [0, 2]}


def test_a_sum_out_of_reach_is_said() -> None:
    profile = small([[0.02, 0.0, 0.03], [0.5, 0.25, 0.25]])
    with pytest.warns(UserWarning, match=r"esft_token of all experts together is below top_p=0.2 in 'layers.0'"):
        chosen = select_experts(profile, strategy="cumulative", score="esft_token")
    assert dict(chosen) == {"layers.0": (0, 2), "layers.1": (0,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "count"}, "cumulative.*a score that is an average, got score='count'"),
        ({"score": "mass", "top_p": 0.2}, "score='mass'.*Use score='esft_token' or 'esft_gate'"),
        ({"score": "own"}, "score='own' needs a top_p"),
        ({"score": "esft_token", "top_p": 0}, "top_p must be .*at most 1 or None, got 0"),
        ({"score": "esft_token", "top_p": "0.2"}, "top_p must be .*got '0.2'"),
    ],
)
def test_what_cannot_be_summed_up_is_refused(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores_module, "_SCORES", dict(scores_module._SCORES))
    register_score("own", lambda profile, layer: profile.counts[layer] / profile.counts[layer].sum())
    for call in (lambda **o: select_experts(small([[0.5, 0.5]]), **o), SieveLoraConfig):
        with pytest.raises(SieveError, match=message) as caught:
            call(strategy="cumulative", **options)
        assert "\n" not in str(caught.value)
    assert select_experts(small([[0.9, 0.1]]), strategy="cumulative", score="own", top_p=0.5)["layers.0"] == (0,)


@pytest.mark.parametrize("score", ["esft_gate", "esft_token"])
def test_a_profile_without_averages_refuses_these_scores(score: str) -> None:
    profile = RoutingProfile.from_arrays([[3, 1]], [[0.5, 0.5]])
    for strategy in ("uniform", "cumulative"):
        with pytest.raises(SieveError, match=f"score='{score}' needs a profile with sample_") as caught:
            select_experts(profile, strategy=strategy, score=score)
        assert "\n" not in str(caught.value)


# --- profiling ------------------------------------------------------------------------------------------------------

LENGTHS = (3, 11, 6, 8)


def samples() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]


def naive_scores(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A sample, a token and a selection at a time, with the routers called by hand on what reaches their block."""
    scores = {}
    for layer in find_moe_layers(model):
        token, gate = torch.zeros(layer.num_experts, dtype=torch.float64), torch.zeros(layer.num_experts).double()
        for ids in samples():
            seen: list[tuple[torch.Tensor, torch.Tensor]] = []
            handle = layer.experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1:3]))
            with torch.no_grad():
                model(input_ids=torch.tensor([ids]))
            handle.remove()
            ((chosen, weights),) = seen
            for position in range(len(ids)):
                for expert, weight in zip(chosen[position].tolist(), weights[position].tolist(), strict=True):
                    token[expert] += 1 / chosen.shape[1] / len(ids) / len(LENGTHS)
                    gate[expert] += weight / len(ids) / len(LENGTHS)
        scores[layer.path] = token, gate
    return scores


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
def test_profiling_averages_over_samples_not_tokens(name: str) -> None:
    model = tiny_model(name)
    expected = naive_scores(model)
    rows = [{"input_ids": ids} for ids in samples()]
    for batch_size in (1, 3):
        profile = profile_routing(model, rows, batch_size=batch_size, progress=False)
        assert profile.num_samples == len(LENGTHS)
        for path, (token, gate) in expected.items():
            assert torch.allclose(profile.sample_share[path], token, rtol=1e-6), path
            assert torch.allclose(profile.sample_mass[path], gate, rtol=1e-4), path
            assert profile.sample_share[path].sum() == pytest.approx(1)
            # Long samples would weigh more in the plain counts.
            by_tokens = profile.counts[path].double() / profile.counts[path].sum()
            assert not torch.allclose(profile.sample_share[path], by_tokens, atol=1e-3)


def test_profiles_add_up_to_that_of_all_samples(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    rows = [{"input_ids": ids} for ids in samples()]
    whole = profile_routing(model, rows, progress=False)
    parts = [profile_routing(model, part, progress=False) for part in (rows[:1], rows[1:])]
    for path in whole.counts:
        assert torch.allclose((parts[0] + parts[1]).sample_share[path], whole.sample_share[path], rtol=1e-12)
        assert torch.allclose((parts[0] + parts[1]).sample_mass[path], whole.sample_mass[path], rtol=1e-4)
    assert (parts[0] + parts[1]).num_samples == 4
    unknown = RoutingProfile(counts=whole.counts)
    assert (whole + unknown).sample_share is None and (whole + unknown).num_samples is None

    whole.save(tmp_path / "profile")
    loaded = RoutingProfile.load(tmp_path / "profile")
    assert loaded == whole and loaded.num_samples == 4
    for path in whole.counts:
        assert torch.equal(loaded.sample_share[path], whole.sample_share[path])
        assert torch.equal(loaded.sample_mass[path], whole.sample_mass[path])
    changed = {path: share * 1.5 for path, share in whole.sample_share.items()}
    assert loaded != RoutingProfile(**{**vars(whole), "sample_share": changed})


def test_tokens_that_belong_to_no_row_leave_the_averages_unknown() -> None:
    averages = SampleAverages(2)
    averages.num_rows = 2
    counter = DispatchCounter(2, averages=averages)
    counter.add(torch.tensor([[0], [1], [1]]), torch.ones(3, 1))  # three tokens of two samples
    averages.end_batch()
    assert averages.means(2) is None
    assert counter.totals()[0].tolist() == [1, 2]


def test_a_layer_used_twice_is_averaged_over_both_uses() -> None:
    averages = SampleAverages(2)
    averages.num_rows = 2
    counter = DispatchCounter(2, averages=averages)
    for expert_ids in ([[0], [0], [1], [0]], [[1], [0], [1], [1]]):  # two tokens of two samples, twice
        counter.add(torch.tensor(expert_ids), torch.full((4, 1), 0.5))
    averages.end_batch()
    share, mass = averages.means(2)
    assert share.tolist() == [(3 / 4 + 1 / 4) / 2, (1 / 4 + 3 / 4) / 2]
    assert mass.tolist() == [0.25, 0.25]


def test_the_configuration_and_the_command_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import get_peft_model

    model = tiny_model("olmoe")
    rows = [{"input_ids": ids} for ids in samples()]
    profile = profile_routing(model, rows, progress=False)
    profile.save(tmp_path / "profile.safetensors")
    options = {"strategy": "cumulative", "score": "esft_gate", "top_p": 0.3}
    expected = select_experts(profile, **options).to_dict()

    config = SieveLoraConfig(calib_dataset=rows, r=4, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(model, config)
    assert config.selected_experts == expected
    assert config.calibration["top_p"] == 0.3
    config.save_pretrained(tmp_path)
    assert SieveLoraConfig.from_pretrained(tmp_path).top_p == 0.3

    words = ["select", str(tmp_path / "profile.safetensors"), "--json", "--strategy", "cumulative"]
    assert main([*words, "--score", "esft_gate", "--top-p", "0.3"]) == 0
    assert json.loads(capsys.readouterr().out)["selected_experts"] == expected
    assert main([*words, "--score", "count"]) == 1
    assert re.search(r"needs a score that is an average", capsys.readouterr().err)
