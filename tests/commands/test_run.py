"""`peft-sieve run` starts real programs.

Loading this package takes seconds, so the command runs in a fork of this process, which has it, and becomes the program
there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from peft_sieve.cli import main
from peft_sieve.commands.run import environment_with_plugin, find_program

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def package_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the programs; they start in other folders."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def started(*words: str, **settings: Any) -> subprocess.Popen[str]:
    """`peft-sieve run WORDS`, in a fork that becomes the program."""
    return subprocess.Popen(
        ["never started: the fork becomes the program before"],
        preexec_fn=lambda: main(["run", *words]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def finished(*words: str, input: str = "", **settings: Any) -> subprocess.CompletedProcess[str]:
    process = started(*words, **settings)
    output, errors = process.communicate(input)
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def test_a_program_and_its_children_get_the_plugin_with_peft_only(tmp_path: Path) -> None:
    # The package is imported in the middle of an import of transformers here, which must not make a circle. Nobody asks
    # for another configuration from TRL.
    child = (
        "from transformers import Trainer; from peft import PeftType; from trl import ModelConfig, get_peft_config; "
        "print(PeftType('SIEVE_LORA').name, type(get_peft_config(ModelConfig(use_peft=True))).__name__)"
    )
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import subprocess, sys

            print(sys.argv[1:], sys.stdin.read())
            print(sorted({{"peft", "peft_sieve", "torch"}} & set(sys.modules)), flush=True)
            subprocess.run([sys.executable, "-c", {child!r}], check=True)
            print("to the other stream", file=sys.stderr)
            raise SystemExit(7)
            """
        )
    )
    done = finished("--", "python", str(program), "--option", "a b", "--", "-x", input="read", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == ["['--option', 'a b', '--', '-x'] read", "[]", "SIEVE_LORA LoraConfig"]
    assert done.stderr.splitlines()[-1] == "to the other stream"


def test_signals_reach_the_program() -> None:
    """It is the process that was started, not a child of it."""
    program = "import os, signal, sys; print(os.getpid(), flush=True); sys.stdin.read(); os._exit(3)"
    process = started("--", "python", "-c", program)
    assert int(process.stdout.readline()) == process.pid
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM


def test_a_sitecustomize_of_the_environment_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.own = __file__")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    program = (
        "import json, sys, sitecustomize; "
        "print(json.dumps([sys.own, sitecustomize.__file__, sys.path, [type(f).__name__ for f in sys.meta_path]]))"
    )
    done = finished("python", "-c", program)
    own, imported, path, finders = json.loads(done.stdout)
    assert own == imported == str(tmp_path / "sitecustomize.py")
    assert "FollowingFinder" in finders
    # What the program can import is what it could without.
    assert path[1:3] == [str(tmp_path), str(ROOT)]
    assert not any(entry.endswith("startup") for entry in path)


def test_an_environment_without_the_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peft.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # -S: without the packages that are installed here, but then sitecustomize has to be asked for.
    done = finished("python", "-S", "-c", "import sitecustomize, peft", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: {find_program('python')} has no peft_sieve, expected it beside peft in a process under "
        "`peft-sieve run`: install peft-sieve in that environment"
    )


def test_programs_of_this_environment_come_before_those_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("python", "other"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(find_program("python")).parent == Path(sys.executable).parent
    assert find_program("other") == str(tmp_path / "other")
    assert find_program(str(tmp_path / "python")) == str(tmp_path / "python")


def test_what_cannot_be_started_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text("print()")
    nothing = tmp_path / "nothing"
    nothing.write_text("")
    nothing.chmod(0o755)
    for word, code, text in [
        ("no-such-program", 127, "no-such-program was not found"),
        (str(script), 126, f"{script} cannot be executed"),
        (str(nothing), 126, f"{nothing} cannot be started (Exec format error)"),
    ]:
        assert main(["run", "--", word, "--help"]) == code
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit) as wrong_usage:
        main(["run"])
    assert wrong_usage.value.code == 2
    assert "no program was given after `--`" in capsys.readouterr().err


def test_without_sieve_options_nothing_else_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    environment = environment_with_plugin([])
    startup = environment.pop("PYTHONPATH")
    assert environment == dict(os.environ)
    assert os.listdir(startup) in (["sitecustomize.py"], ["sitecustomize.py", "__pycache__"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["top_k_frac"], "was given 'top_k_frac', expected FIELD=VALUE with a field of SieveLoraConfig"),
        (["topk=3"], "was given 'topk=3', expected FIELD=VALUE"),
        (["calib_dataset=a", "train_router=False"], "expected true or false: pass train_router=true"),
        (["calib_dataset=a", "share_outer=yes"], "expected true or false: pass share_outer=true"),
        (["calib_dataset=a", "cold_experts=true"], "cold_experts must be one of 'frozen', 'shared', got True"),
        (["calib_dataset=a", "top_k_frac=7"], "top_k_frac"),
        (["selected_experts=@nowhere.json"], "names a file that cannot be read as JSON"),
        (["top_k_frac=0.5"], "expected calib_dataset or selected_experts with it"),
    ],
)
def test_wrong_sieve_options_are_refused_before_anything_starts(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for option in options for word in ("--sieve", option)]
    assert main(["run", *words, "--", "no-such-program"]) == 1
    assert text in capsys.readouterr().err


def test_sieve_options_travel_as_values(tmp_path: Path) -> None:
    mask = {"model.layers.0.mlp.experts": [1, 5], "model.layers.1.mlp.experts": []}
    (tmp_path / "mask.json").write_text(json.dumps(mask))
    options = [f"selected_experts=@{tmp_path / 'mask.json'}", "train_router=false", "r=8", "strategy=greedy"]
    options += ["share_outer=true", "cold_experts=shared"]
    environment = environment_with_plugin([*options, 'expert_projections=["up_proj"]', "calib_split=train[:10%]"])
    assert json.loads(environment["PEFT_SIEVE_TRL_CONFIG"]) == {
        "selected_experts": mask,
        "train_router": False,
        "r": 8,
        "strategy": "greedy",
        "share_outer": True,
        "cold_experts": "shared",
        "expert_projections": ["up_proj"],
        "calib_split": "train[:10%]",
    }
