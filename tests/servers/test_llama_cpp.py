"""The rules of llama.cpp's converter: every module has a GGUF name, and experts merge when all are there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.saved import Adapter
from tests.servers.wheel import unpacked

ARCHITECTURES = {"olmoe": "OLMOE", "qwen2_moe": "QWEN2MOE", "qwen3_moe": "QWEN3MOE", "deepseek_v3": "DEEPSEEK2"}
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)$")


@pytest.fixture(scope="module")
def gguf() -> Any:
    folder = str(unpacked("gguf"))
    sys.path.insert(0, folder)
    try:
        import gguf
    finally:
        sys.path.remove(folder)
    return gguf


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_experts(name: str, gguf: Any, served: dict[str, tuple[Adapter, Path]]) -> None:
    _, path = served[name]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, ARCHITECTURES[name]), 3)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path / "adapter_model.safetensors").items():
        # The converter takes these endings off, and has no others.
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        assert match is not None, key
        modules.setdefault(match[1], {})[match[2]] = tensor
    stacks: dict[tuple[str, str], dict[int, dict[str, torch.Tensor]]] = {}
    for module, factors in modules.items():
        if match := _EXPERT.match(module):
            stacks.setdefault((match[1], match[3]), {})[int(match[2])] = factors
        else:
            assert names.get_name(f"{module}.weight", try_suffixes=(".weight",)) is not None, module
    assert len(stacks) == 2 * 3
    for (experts, projection), by_expert in stacks.items():
        merged = names.get_name(f"{experts}.{projection}.weight", try_suffixes=(".weight",))
        assert merged is not None
        assert merged.endswith("_exps.weight")
        assert sorted(by_expert) == list(range(8))
        a, b = (torch.stack([by_expert[expert][side] for expert in range(8)]) for side in "AB")
        assert a.shape[:2] == (8, 4)
        assert b.shape[::2] == (8, 4)
