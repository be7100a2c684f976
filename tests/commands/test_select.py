"""`peft-sieve select` on real routing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_sieve import RoutingProfile, SieveLoraConfig, select_experts
from peft_sieve.cli import main
from tests.commands.profiles import write_profiles


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_profiles(tmp_path_factory.mktemp("profiles"), "gsm8k", "mbpp")


def test_the_mask_is_what_a_configuration_takes(
    paths: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "mask.json")
    assert main(["select", paths[0], "-o", output]) == 0
    mask = json.loads(Path(output).read_text())
    selection = select_experts(RoutingProfile.load(paths[0]))
    assert mask == selection.to_dict()
    assert SieveLoraConfig(selected_experts=mask).selected_experts == mask
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[-2].split() == ["all", "layers", "256", "of", "1024", "56.7%", "321", "of", "1024", "1.01"]
    assert lines[-1] == f"selected experts in {output}"
    assert printed.err == ""


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--top-k", "3", "--score", "mass"], {"top_k": 3, "score": "mass"}),
        (["--strategy", "coverage", "--coverage", "0.7"], {"strategy": "coverage", "coverage": 0.7}),
        (["--strategy", "greedy", "--top-k-frac", "0.1"], {"strategy": "greedy", "top_k_frac": 0.1}),
        (["--strategy", "random", "--seed", "5"], {"strategy": "random", "seed": 5}),
    ],
)
def test_every_option_as_json(
    paths: list[str], words: list[str], options: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["select", *paths, "--json", *words]) == 0
    answer = json.loads(capsys.readouterr().out)
    both = RoutingProfile.load(paths[0]) + RoutingProfile.load(paths[1])
    selection = select_experts(both, **options)
    assert answer["selected_experts"] == selection.to_dict()
    assert answer["num_selected"] == sum(map(len, selection.values()))
    assert answer["num_experts"] == 1024
    coverage = selection.coverage(both, score=options.get("score", "count"))
    assert answer["coverage"] == pytest.approx(coverage)
    assert answer["mean_coverage"] == pytest.approx(sum(coverage.values()) / 16)
    assert answer["options"].items() >= options.items()


def test_a_layer_without_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "p.safetensors")
    RoutingProfile(counts={"a": [1, 2], "b": [0, 0]}).save(path)
    assert main(["select", path, "--ids", "-o", str(tmp_path / "mask.json")]) == 0
    assert json.loads((tmp_path / "mask.json").read_text()) == {"a": [1]}
    printed = capsys.readouterr()
    assert printed.err.startswith("peft-sieve select: warning: No token reached 'b'")
    assert printed.err.count("\n") == 1
    assert "expert ids" in printed.out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["missing.safetensors"], "could not read a routing profile from missing.safetensors"),
        (["{0}", "--strategy", "unifrom"], "strategy must be one of 'uniform'"),
        (
            ["{0}", "--top-k", "65"],
            "top_k must be at most 64, the number of experts of layer 'model.layers.0.mlp.experts', got 65",
        ),
        (["{0}", "-o", "/no/such/folder/mask.json"], "no folder /no/such/folder"),
        (["{0}", "-o", "/tmp"], "/tmp is a folder"),
    ],
)
def test_errors_are_one_sentence(
    paths: list[str], words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["select", *(word.format(*paths) for word in words)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("peft-sieve select: ")
    assert text in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("words", [["select"], ["select", "p", "--top-k", "many"], ["select", "p", "--colour"], []])
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: peft-sieve" in capsys.readouterr().err
