"""`peft-sieve profile` on the small trained model, and the files it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peft_sieve import RoutingProfile, profile_routing
from peft_sieve.cli import main
from tests.models import TINY_OLMOE, small_olmoe, small_tokenizer

ROOT = Path(__file__).parents[2]
ROWS = [{"question": f"How many singers are older than {i}?", "sql": f"SELECT {i}"} for i in range(6)]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return str(path)


def test_the_file_is_what_profile_routing_counts(rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "p.safetensors")
    words = ["--template", r"Q: {question}\nA: {sql}", "--max-samples", "4", "--max-length", "9", "--seed", "1"]
    how = ["--batch-size", "2", "--dtype", "float32", "--device", "cpu"]
    assert main(["profile", str(TINY_OLMOE), "--data", rows, "-o", output, *words, *how]) == 0
    printed = capsys.readouterr()
    expected = profile_routing(
        small_olmoe(),
        rows,
        tokenizer=small_tokenizer(),
        formatting_func=lambda row: f"Q: {row['question']}\nA: {row['sql']}",
        max_samples=4,
        max_length=9,
        batch_size=2,
        seed=1,
    )
    written = RoutingProfile.load(output)
    assert written == expected
    assert written.num_tokens == 36
    assert printed.out.splitlines()[-2:] == [f"36 tokens of 4 samples of {rows}", f"profile in {output}"]
    assert printed.out.splitlines()[-3].startswith("mean of the layers")
    assert printed.err == ""  # no bar where nobody watches


def test_text_of_a_file_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "text.txt", tmp_path / "p.safetensors"
    data.write_text("one line\nand another\n")
    assert main(["profile", str(TINY_OLMOE), "--data", str(data), "-o", str(output), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    profile = RoutingProfile.load(output)
    assert answer["profile"] == str(output)
    assert (answer["samples"], answer["tokens"]) == (2, profile.num_tokens)
    assert answer["num_experts_per_tok"] == 4
    for name, layer in answer["layers"].items():
        assert (layer["num_experts"], layer["routed"]) == (32, int(profile.counts[name].sum()))
        assert 0 < layer["cold_fraction"] < 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["{model}", "--data", "{rows}"], "fit none of the forms"),
        (["{model}", "--data", "{rows}", "--template", "{{quest}}"], "KeyError: 'quest'"),
        (["{model}", "--data", "{rows}", "--template", "question"], "names no column"),
        (["{model}", "--data", "{rows}", "--template", "{{question"], "Write {COLUMN} for a column"),
        (["{model}", "--data", "missing.jsonl"], "'missing.jsonl' does not exist"),
        (["no/such-model", "--data", "{rows}"], "The model 'no/such-model' cannot be loaded"),
        (["{model}", "--data", "{rows}", "--tokenizer", "no/such"], "The tokenizer 'no/such' cannot be loaded"),
        (["{model}", "--data", "{rows}", "--device", "abacus"], "The device 'abacus' cannot be used"),
        (
            ["{model}", "--data", "{rows}", "--max-samples", "0"],
            "max_samples (calib_samples) must be a positive whole number",
        ),
    ],
)
def test_errors_are_one_sentence_and_write_nothing(
    rows: str, words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "p.safetensors"
    filled = [word.format(model=TINY_OLMOE, rows=rows) for word in words]
    assert main(["profile", *filled, "-o", str(output)]) == 1
    printed = capsys.readouterr()
    assert text in printed.err
    assert printed.err.startswith("peft-sieve profile: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not output.exists()


def test_the_folder_is_missed_before_the_model_is_loaded(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "no/such-model", "--data", rows, "-o", "/no/such/folder/p.safetensors"]) == 1
    assert "no folder /no/such/folder" in capsys.readouterr().err


def test_a_process_of_its_own(rows: str, tmp_path: Path) -> None:
    """As a shell starts it: exit code, and nothing but the result on standard output."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "peft_sieve.cli", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    output = str(tmp_path / "p.safetensors")
    template = ["--template", "{question}"]
    done = run("profile", str(TINY_OLMOE), "--data", rows, "-o", output, "--json", *template)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 6
    assert RoutingProfile.load(output).num_tokens == json.loads(done.stdout)["tokens"]
