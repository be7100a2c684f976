"""SGLang's own reading of an exported adapter."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_sieve import export_lora
from tests.adapters.saved import Adapter
from tests.servers.conftest import SHARED_OUTER
from tests.servers.expected import adapted_layers, deltas
from tests.servers.wheel import Wheel, unpacked

PER_EXPERT = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3")


@pytest.fixture(scope="module")
def sglang() -> SimpleNamespace:
    names = {"lora": "lora", "config": "lora_config", "utils": "utils", "pool": "mem_pool", "manager": "lora_manager"}
    real = {key: f"sglang.srt.lora.{name}" for key, name in names.items()}
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


# --- shared outer factors -------------------------------------------------------------------------------------------

BUFFERS = ("gate_up_proj_moe", "down_proj_moe")
MAX_RANK = 8


def in_memory_pool(sglang: SimpleNamespace, adapter: Adapter, lora: Any, shared: bool) -> Any:
    """Its memory pool with the experts of an adapter in it, and room for rank 8."""
    layers = importlib.import_module("sglang.srt.lora.layers")
    whole = {"slice_moe_lora_a_weights": lambda self, w, *_: w, "slice_moe_lora_b_weights": lambda self, w, *_: w}
    base_layer = SimpleNamespace(is_shared_fused_moe=False, moe_tp_rank=0)
    experts = type("Experts", (layers.FusedMoEWithLoRA,), {**whole, "base_layer": base_layer})()
    pool, config = object.__new__(sglang.pool.LoRAMemoryPool), adapter.base.config
    vars(pool).update(
        base_model=adapter.base,
        base_hf_config=config,
        num_layer=config.num_hidden_layers,
        max_loras_per_batch=1,
        max_lora_rank=MAX_RANK,
        target_modules=sglang.utils.get_normalized_target_modules(lora.config.target_modules),
        experts_shared_outer_loras=shared,
        strict_loading=True,
        moe_use_local_expert_ids=False,
        pin_memory_available=False,
        moe_tp_size=1,
        lora_added_tokens_size=0,
        **{f"{place}_{side}_buffer": {} for place in ("embedding", "lm_head") for side in "AB"},
    )
    for side, shape in (("A", pool.get_lora_A_shape), ("B", pool.get_lora_B_shape)):
        rows = {name: [shape(name, adapter.base, MAX_RANK, i) for i in range(pool.num_layer)] for name in BUFFERS}
        made = {name: [torch.full(size, torch.nan) for size in sizes] for name, sizes in rows.items()}
        setattr(pool, f"{side}_buffer", made)
    modules = [{"experts": experts} for _ in range(pool.num_layer)]
    pool.load_lora_weight_to_buffer("one", 0, lora, modules, None, None)
    return pool


@pytest.mark.parametrize(("shared", "name"), SHARED_OUTER)
def test_it_takes_shared_outer_factors(
    shared: str, name: str, sglang: SimpleNamespace, shared_outer: dict[tuple[str, str], tuple[Adapter, Path]]
) -> None:
    adapter, path = shared_outer[shared, name]
    lora = loaded(sglang, path, adapter.base.config.num_hidden_layers)
    # As at the start of the server, without the flag.
    manager = SimpleNamespace(loras={"one": lora})
    assert sglang.manager.LoRAManager._detect_shared_outer_loras(manager) is True
    pool = in_memory_pool(sglang, adapter, lora, shared=True)
    ours = adapted_layers(adapter)
    for index in range(pool.num_layer):
        a = {key: buffer[index][0] for key, buffer in pool.A_buffer.items()}
        b = {key: buffer[index][0] for key, buffer in pool.B_buffer.items()}
        assert a["gate_up_proj_moe"].shape == (1, 2 * MAX_RANK, 32)
        assert b["down_proj_moe"].shape == (1, 32, MAX_RANK)
        gate_b, up_b = b["gate_up_proj_moe"].chunk(2, dim=1)
        gate_a, up_a = a["gate_up_proj_moe"].chunk(2, dim=1)
        computed = {"gate_proj": gate_b @ gate_a, "up_proj": up_b @ up_a}
        computed["down_proj"] = b["down_proj_moe"] @ a["down_proj_moe"]
        for projection, delta in computed.items():
            expected = deltas(ours[index])[projection] if index in ours else torch.zeros_like(delta)
            assert torch.allclose(delta, expected, rtol=1e-4, atol=1e-6), (index, projection)


def test_it_refuses_own_outer_factors_where_shared_ones_are_wanted(
    sglang: SimpleNamespace, served: dict[str, tuple[Adapter, Path]], tmp_path: Path
) -> None:
    """Why the layout exists, and that the check above can fail."""
    adapter, _ = served["olmoe"]
    export_lora(adapter.path, tmp_path / "lora", include_router=False)
    lora = loaded(sglang, tmp_path / "lora", 2)
    assert sglang.manager.LoRAManager._detect_shared_outer_loras(SimpleNamespace(loras={"one": lora})) is False
    with pytest.raises(ValueError, match=r"lora_A dict has 8 entries \(expected 1\)"):
        in_memory_pool(sglang, adapter, lora, shared=True)
