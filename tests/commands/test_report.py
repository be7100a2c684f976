"""`peft-sieve report` on real routing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_sieve import RoutingProfile
from peft_sieve.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small profiles: two of one model, one of another."""
    for name, counts in (("a", [[8, 1, 1, 2], [1, 2, 9, 0]]), ("b", [[1, 9, 0, 2], [1, 2, 9, 0]]), ("other", [[1, 2]])):
        (tmp_path / name).mkdir()
        RoutingProfile.from_arrays(counts, num_experts_per_tok=1).save(tmp_path / name / "profile.safetensors")
    return tmp_path


def test_page_and_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    named = [f"first={folder}/a/profile.safetensors", f"second={folder}/b/profile.safetensors"]
    assert main(["report", *named, "-o", str(out), "--top-k", "1"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[2].split() == ["first", "12", "1.08", "0.59", "50.0%", "2", "of", "8", "70.8%"]
    assert lines[-1] == f"report in {out}/index.html, 14 pictures beside it"
    assert printed.err == ""
    assert len(list(out.glob("*.png"))) == 14
    assert (out / "overlap.png").read_bytes().startswith(b"\x89PNG")


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    assert main(["report", f"{folder}/a/profile.safetensors", "-o", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["page"] == str(out / "index.html")
    assert {str(path) for path in out.iterdir()} == {answer["page"], *answer["pictures"]}
    (measured,) = answer["profiles"].values()
    assert list(answer["profiles"]) == ["profile"]
    assert measured["mean_coverage"] == pytest.approx((8 + 9) / 24)
    assert measured["num_tokens"] == 12


def test_files_of_one_name_go_by_their_paths(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [f"{folder}/{name}/profile.safetensors" for name in "ab"]
    assert main(["report", *paths, "-o", str(folder / "out"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["profiles"]) == paths


def test_errors_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = f"{folder}/a/profile.safetensors"
    (folder / "taken").write_text("x")
    for words, text in (
        ([first, f"x={folder}/other/profile.safetensors", "-o", f"{folder}/out"], "and 'x'"),
        ([f"{folder}/none.safetensors", "-o", f"{folder}/out"], "could not read a routing profile"),
        ([first, "-o", f"{folder}/taken"], "report cannot be written to"),
        ([first, "-o", f"{folder}/out", "--score", "mass"], "score='mass' needs a profile with mass"),
    ):
        assert main(["report", *words]) == 1
        printed = capsys.readouterr()
        assert text in printed.err
        assert printed.err.startswith("peft-sieve report: ")
        assert printed.err.count("\n") == 1
        assert not (folder / "out").exists()
