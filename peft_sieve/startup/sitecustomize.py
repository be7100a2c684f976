"""Runs at the start of every Python process under `peft-sieve run`: the plugin comes in with PEFT, and not before.

Its folder is the first of PYTHONPATH there. Only what Python has loaded by itself is imported here, so that processes
without PEFT pay nothing.
"""

import importlib
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec

# module -> what is imported as soon as it has been
FOLLOWERS = {"peft": "peft_sieve"}
if "PEFT_SIEVE_TRL_CONFIG" in os.environ:
    FOLLOWERS["trl.trainer.utils"] = "peft_sieve.training.trl_config"


class FollowingFinder:
    """Leaves finding a module to the other finders, and has its follower imported when it has been loaded."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        if name not in FOLLOWERS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)  # type: ignore[arg-type]
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _follow(spec, FOLLOWERS[name])
        return spec


def _follow(spec: ModuleSpec, follower: str) -> None:
    loader = spec.loader
    execute = loader.exec_module  # type: ignore[union-attr]

    def exec_module(module: object) -> None:
        execute(module)  # type: ignore[arg-type]
        try:
            importlib.import_module(follower)
        except ModuleNotFoundError as error:
            if error.name != "peft_sieve":
                raise
            raise ModuleNotFoundError(
                f"{sys.executable} has no peft_sieve, expected it beside {spec.name} in a process under `peft-sieve "
                "run`: install peft-sieve in that environment",
                name="peft_sieve",
            ) from error

    loader.exec_module = exec_module  # type: ignore


def _run_the_next_sitecustomize(here: str) -> None:
    """The environment may have one of its own, which this one stands before."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    spec = PathFinder.find_spec(__name__, sys.path)
    if spec is not None and spec.loader is not None:
        module = sys.modules[__name__] = module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, FollowingFinder())
    _run_the_next_sitecustomize(os.path.dirname(os.path.abspath(__file__)))
