"""Adapters to serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_sieve import export_lora
from tests.adapters.saved import Adapter, saved_adapter

NAMES = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Adapter, Path]]:
    """Architecture -> (adapter, its plain LoRA in the layout of its servers)."""
    found = {}
    for name in NAMES:
        adapter = saved_adapter(tmp_path_factory.mktemp(name), name)
        export_lora(adapter.path, adapter.path.parent / "lora")
        found[name] = adapter, adapter.path.parent / "lora"
    return found
