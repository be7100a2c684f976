"""`peft-sieve plan`: from a configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, OlmoeConfig

from peft_sieve import RoutingProfile
from peft_sieve.cli import main
from tests.commands.profiles import write_profiles
from tests.models import TINY_OLMOE


@pytest.fixture
def olmoe(tmp_path: Path) -> str:
    """A folder with nothing but the config.json of OLMoE-1B-7B."""
    OlmoeConfig(
        hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16, num_experts=64
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_papers_model(olmoe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (profile,) = write_profiles(tmp_path, "gsm8k")
    assert main(["plan", f"{olmoe}/config.json", "--profile", profile]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{olmoe}/config.json: 6,919,161,856 parameters, 16 layers with experts; rank 32"
    rows = {line.split("  ")[0]: line.split() for line in lines[3:]}
    assert list(rows) == ["4 of 64", "8 of 64", "16 of 64", "32 of 64", "64 of 64"]
    assert rows["16 of 64"][3:] == [
        "84,967,424",
        "1.23%",
        "27.3%",
        "340",
        "MB",
        "340",
        "MB",
        "680",
        "MB",
        "56.7%",
        "48.0%",
    ]
    assert rows["64 of 64"][3:6] == ["311,459,840", "4.50%", "100.0%"]
    assert rows["64 of 64"][-2:] == ["100.0%", "100.0%"]


def test_every_option_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--top-k", "2", "8", "--rank", "4", "--expert-projections", "down_proj"]
    assert (
        main(["plan", str(TINY_OLMOE), "--json", *words, "--no-attention", "--no-router", "--no-shared-experts"]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["r"] == 4
    assert answer["num_experts"] == {f"model.layers.{i}.mlp.experts": 32 for i in range(6)}
    # Nothing but down_proj, from 48 to 128, of rank 4.
    counts = [option["trainable_parameters"] for option in answer["options"]]
    assert counts == [6 * k * 4 * (48 + 128) for k in (2, 8, 32)]
    assert [option["coverage"] for option in answer["options"]] == [None, None, None]


def test_what_experts_share(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(TINY_OLMOE), "--top-k", "8", "--rank", "4", "--cold-experts", "shared", "--share-outer"]
    alone = ["--no-attention", "--no-router", "--no-shared-experts"]
    assert main([*words, *alone, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["cold_experts"], answer["share_outer"]) == ("shared", True)
    # From 128 to 48 twice and back: one outer factor each, inner ones for 8 experts and the others, and for all 32.
    counts = [option["trainable_parameters"] for option in answer["options"]]
    assert counts == [6 * 4 * 3 * (128 + slots * 48) for slots in (9, 32)]
    assert main([*words, *alone]) == 0
    first, *_, hot, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("rank 4, one adapter per layer for all other experts, outer factors one per layer")
    assert hot.startswith("8 of 32 ") and f" {counts[0]:,} " in hot


def test_errors_are_one_sentence(olmoe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(tmp_path / "other.safetensors")
    RoutingProfile.from_arrays([[1, 2]]).save(other)
    dense = tmp_path / "dense"
    LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=32).save_pretrained(dense)
    for words, text in (
        (["no/such-model"], "configuration of the base model 'no/such-model' cannot be read"),
        ([str(dense)], "LlamaForCausalLM has no Mixture-of-Experts layer"),
        ([olmoe, "--top-k", "65"], "top_k must be whole numbers from 1 to 64"),
        ([olmoe, "--rank", "0"], "r must be a positive whole number, got 0"),
        (
            [olmoe, "--expert-projections", "q_proj"],
            "expert_projections must be one or more of 'gate_proj', 'up_proj', 'down_proj'",
        ),
        ([olmoe, "--profile", other], "profile differs from the model"),
        ([olmoe, "--profile", f"{olmoe}/config.json"], "could not read a routing profile"),
    ):
        assert main(["plan", *words]) == 1
        printed = capsys.readouterr()
        assert text in printed.err
        assert printed.err.startswith("peft-sieve plan: ")
        assert printed.err.count("\n") == 1, printed.err
        assert printed.out == ""


@pytest.mark.parametrize("command", ["plan", "profile", "select", "report"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"  peft-sieve {command} " in text.split("examples:")[1]
    assert "--json" in text
