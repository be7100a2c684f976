"""Single modules of a server's wheel, run as they are; what they import beside that needs a GPU and is a stand-in."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

UNPACKED = os.environ.get("PEFT_SIEVE_SERVERS", "")


def unpacked(name: str) -> Path:
    """Where a wheel's files are; the test is skipped without them."""
    folder = Path(UNPACKED, name)
    if not UNPACKED or not folder.is_dir():
        pytest.skip("the servers' wheels are not here: run `make test-servers`")
    return folder


class _StandInType(type):
    """A class that answers to every name, so that it can be imported, derived from and asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandInType(name, (), {})

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__()
        # A decorator gives back what it decorates.
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else instance


class _StandInModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _StandInType(name, (), {"__getattr__": lambda self, attribute: lambda *args, **kwargs: None})
        setattr(self, name, value)
        return value


class Wheel(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `real` modules of a package from its files, and stand-ins for all its others.

    Args:
        folder: where the wheel was unpacked.
        package: its top-level name.
        real: modules to run as they are.
        values: "module.name" -> what a stand-in has there.
    """

    def __init__(
        self, folder: Path, package: str, real: Iterable[str], values: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.package, self.real, self.values = folder, package, set(real), values or {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        place = self.folder.joinpath(*name.split("."))
        if name in self.real:
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            search = [str(place)] if place.is_dir() else None
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=search)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        for name, value in self.values.items():
            where, _, attribute = name.rpartition(".")
            if where == module.__name__:
                setattr(module, attribute, value)

    def load(self, name: str) -> Any:
        """One of the real modules."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        module = importlib.import_module(name)
        assert not isinstance(module, _StandInModule)
        return module
