"""SGLang's own reading of an exported adapter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_sieve import export_lora
from tests.adapters.saved import Adapter
from tests.servers.wheel import Wheel, unpacked

PER_EXPERT = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3")


@pytest.fixture(scope="module")
def sglang() -> SimpleNamespace:
    real = {"lora": "sglang.srt.lora.lora", "config": "sglang.srt.lora.lora_config", "utils": "sglang.srt.lora.utils"}
    ids = "sglang.srt.layers.utils.common"
    wheel = Wheel(unpacked("sglang"), "sglang", [*real.values(), ids])
    get_layer_id = wheel.load(ids).get_layer_id
    wheel.values = {"sglang.srt.layers.utils.get_layer_id": get_layer_id}
    # It is imported from the package that holds it.
    wheel.exec_module(__import__("sys").modules["sglang.srt.layers.utils"])
    return SimpleNamespace(**{key: wheel.load(name) for key, name in real.items()})


def loaded(sglang: SimpleNamespace, path: Path, num_layers: int) -> Any:
    config = sglang.config.LoRAConfig(str(path))
    adapter = sglang.lora.LoRAAdapter(
        "one", config, SimpleNamespace(num_hidden_layers=num_layers), SimpleNamespace(), SimpleNamespace()
    )
    adapter.initialize_weights_from_tensors(load_file(path / "adapter_model.safetensors"))
    return adapter


def buffers(sglang: SimpleNamespace, adapter: Any) -> list[dict[str, dict[int, torch.Tensor]]]:
    """What its memory pool sorts the weights into: per layer, module and side -> expert -> tensor."""
    targets = sglang.utils.get_normalized_target_modules(adapter.config.target_modules)
    result = []
    for layer in adapter.layers:
        sorted_in: dict[str, dict[int, torch.Tensor]] = {}
        for name, weights in layer.weights.items():
            module = sglang.utils.get_target_module_name(name, targets)
            if ".experts." in name:
                expert = int(name.split(".experts.")[1].split(".")[0])
                sorted_in.setdefault(f"{module}_moe {'A' if 'lora_A' in name else 'B'}", {})[expert] = weights
        result.append(sorted_in)
    return result


@pytest.mark.parametrize("name", PER_EXPERT)
def test_it_reads_the_adapters_own_deltas(
    name: str, sglang: SimpleNamespace, served: dict[str, tuple[Adapter, Path]], tmp_path: Path
) -> None:
    adapter, _ = served[name]
    export_lora(adapter.path, tmp_path / "lora", include_router=False)
    base = adapter.model.get_base_model()
    lora = loaded(sglang, tmp_path / "lora", base.config.num_hidden_layers)
    assert lora.scaling == 1
    layers = {int(m.path.split(".")[2]): m for m in adapter.model.modules() if hasattr(m, "plans")}
    for index, sorted_in in enumerate(buffers(sglang, lora)):
        if index not in layers:
            assert not sorted_in
            continue
        assert all(set(experts) == set(range(8)) for experts in sorted_in.values())
        ours = layers[index]
        for expert in range(8):
            gate_up_a, gate_up_b = sorted_in["gate_up_proj_moe A"][expert], sorted_in["gate_up_proj_moe B"][expert]
            assert gate_up_a.shape == (8, 32)
            width = gate_up_b.shape[0] // 2
            deltas = {
                "gate_proj": gate_up_b[:width] @ gate_up_a[:4],
                "up_proj": gate_up_b[width:] @ gate_up_a[4:],
                "down_proj": sorted_in["down_proj_moe B"][expert] @ sorted_in["down_proj_moe A"][expert],
            }
            for projection, delta in deltas.items():
                if expert in ours.plans["default"].experts:
                    expected = ours.get_delta_weight("default", projection, expert)
                    assert torch.allclose(delta, expected, rtol=1e-4, atol=1e-6), projection
                else:
                    assert not delta.any()


def test_it_has_no_place_for_a_routers_adapter(
    sglang: SimpleNamespace, served: dict[str, tuple[Adapter, Path]]
) -> None:
    """Why `include_router=False` exists."""
    with pytest.raises(ValueError, match=r"Cannot find target module name for .*mlp\.gate"):
        buffers(sglang, loaded(sglang, served["olmoe"][1], 2))
