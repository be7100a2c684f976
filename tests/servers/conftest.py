"""Adapters to serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_sieve import export_lora
from tests.adapters.saved import SHARED, Adapter, saved_adapter

NAMES = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
# What experts share -> of which models.
SHARED_OUTER = [("both", name) for name in NAMES] + [(key, "olmoe") for key in ("outer", "one layer whole")]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Adapter, Path]]:
    """Architecture -> (adapter, its plain LoRA in the layout of its servers)."""
    found = {}
    for name in NAMES:
        adapter = saved_adapter(tmp_path_factory.mktemp(name), name)
        export_lora(adapter.path, adapter.path.parent / "lora")
        found[name] = adapter, adapter.path.parent / "lora"
    return found


@pytest.fixture(scope="session")
def shared_outer(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Adapter, Path]]:
    """(what is shared, architecture) -> (adapter, its plain LoRA of that layout, for both servers)."""
    found = {}
    for shared, name in SHARED_OUTER:
        adapter = saved_adapter(tmp_path_factory.mktemp(name), name, **SHARED[shared])
        export_lora(adapter.path, adapter.path.parent / "lora", layout="shared_outer", include_router=False)
        found[shared, name] = adapter, adapter.path.parent / "lora"
    return found
