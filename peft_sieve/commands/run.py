"""Start a Python program with the plugin registered: in it, and in the Python processes that it starts.

What the program reads, writes and returns is its own. A process that never imports PEFT does not load the plugin.
With --sieve, programs that take their adapter from TRL's command-line options (`trl sft --use_peft`) train a
SieveLoraConfig with those fields; the LoRA options of the program keep their meaning.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

NAME = "run"
HELP = "start a Python program with the plugin registered"
EXAMPLES = """\
  peft-sieve run -- lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks gsm8k
  peft-sieve run --sieve top_k_frac=0.25 --sieve calib_dataset=me/data -- trl sft --use_peft --model_name_or_path ...
  peft-sieve run -- python train.py"""

STARTUP = Path(__file__).parents[1] / "startup"
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as in shells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `peft-sieve run`."""
    parser.usage = "peft-sieve run [--sieve FIELD=VALUE ...] -- PROGRAM [ARGUMENT ...]"
    parser.add_argument(
        "--sieve",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of SieveLoraConfig for TRL's --use_peft; VALUE is JSON, a plain word, or @FILE with JSON",
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="PROGRAM ...", help="what to start")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Become the program; returns only if it cannot be started."""
    words = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not words:
        args.usage_error("no program was given after `--`")
    environment = environment_with_plugin(args.sieve)
    program = find_program(words[0])
    if program is None:
        exists = os.path.exists(words[0])
        problem = "cannot be executed" if exists else "was not found"
        advice = "Pass a program of this environment or on PATH, such as lm_eval, trl or python."
        print(f"peft-sieve run: {words[0]} {problem}. {advice}", file=sys.stderr)
        return NOT_EXECUTABLE if exists else NOT_FOUND
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, [program, *words[1:]], environment)
    except OSError as error:
        print(f"peft-sieve run: {program} cannot be started ({error.strerror}).", file=sys.stderr)
        return NOT_EXECUTABLE


def find_program(name: str) -> str | None:
    """The program's path, in the environment of this Python before PATH: the plugin is installed there."""
    here = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    return shutil.which(name, path=os.pathsep.join([*here, os.environ.get("PATH", os.defpath)]))


def environment_with_plugin(sieve_options: list[str]) -> dict[str, str]:
    """The environment variables of a process that registers the plugin when it imports PEFT.

    Args:
        sieve_options: FIELD=VALUE for the configuration of TRL programs; none leaves TRL as it is.

    Raises:
        SieveError: an option that `SieveLoraConfig` cannot have.
    """
    paths = [str(STARTUP), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if sieve_options:
        from ..training.trl_options import OPTIONS_VARIABLE, parsed_options

        environment[OPTIONS_VARIABLE] = json.dumps(parsed_options(sieve_options))
    return environment
