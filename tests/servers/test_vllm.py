"""vLLM's own reading, checking and packing of an exported adapter."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_sieve.adapters.plain.export import STACKED_IN_VLLM
from tests.adapters.saved import Adapter
from tests.servers.conftest import SHARED_OUTER
from tests.servers.expected import adapted_layers, deltas
from tests.servers.wheel import Wheel, unpacked

# vLLM's models: the linear layers (packed ones by their parts), and what the checkpoint calls an expert's matrices.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LINEARS = {
    "olmoe": (*ATTENTION, "gate"),
    "qwen2_moe": (*ATTENTION, *MLP, "gate", "shared_expert_gate"),
    "qwen3_moe": (*ATTENTION, *MLP, "gate"),
    "mixtral": (*ATTENTION, "gate"),
    "deepseek_v3": (*MLA, *MLP, "gate"),
    "gpt_oss": (*ATTENTION, "router"),
}
MATRICES = {"mixtral": ("w1", "w2", "w3")}
TWO_D = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3")


@pytest.fixture(scope="module")
def vllm() -> SimpleNamespace:
    names = ("peft_helper", "lora_weights", "lora_model", "utils", "model_manager")
    real = [*(f"vllm.lora.{name}" for name in names), "vllm.lora.layers.fused_moe"]
    wheel = Wheel(unpacked("vllm"), "vllm", real, {"vllm.utils.torch_utils.PIN_MEMORY": False})
    return SimpleNamespace(**{name.rpartition(".")[2]: wheel.load(name) for name in real})


def loaded(
    vllm: SimpleNamespace,
    name: str,
    path: Path,
    linears: tuple[str, ...] | None = None,
    experts: list[str] | None = None,
) -> Any:
    """As `WorkerLoRAManager._load_adapter` does it."""
    helper = vllm.peft_helper.PEFTHelper.from_local_dir(str(path), None)
    helper.validate_legal(SimpleNamespace(max_lora_rank=8))
    if experts is None:
        experts = [f"experts.{e}.{m}" for e in range(8) for m in matrices(name)] if name in TWO_D else []
    expected = {*(LINEARS[name] if linears is None else linears), "experts", *experts}
    return vllm.lora_model.LoRAModel.from_local_checkpoint(
        str(path), expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )


def matrices(name: str) -> tuple[str, ...]:
    """An expert's matrices in vLLM's order: gate, down, up."""
    return MATRICES.get(name, ("gate_proj", "down_proj", "up_proj"))


def manager(vllm: SimpleNamespace, name: str, adapter: Adapter) -> Any:
    """A manager that has the model's MoE layers, without a model on a device."""
    three_d = name not in TWO_D
    result = vllm.model_manager.LoRAModelManager.__new__(vllm.model_manager.LoRAModelManager)
    layer_class = getattr(vllm.model_manager, "FusedMoE3DWithLoRA" if three_d else "FusedMoEWithLoRA")
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    result.modules, result.packed_modules = {}, {}
    for path in adapter.model.peft_config["default"].selected_experts:
        path = path.replace(".mlp.", f".{block}.")
        layer = layer_class()
        vars(layer).update(
            use_ep=False, ep_rank=0, global_num_experts=8, w13_lora_a_stacked=(torch.empty(1, 8, 8, 32),)
        )
        result.modules[path] = layer
        if not three_d:
            result.packed_modules[path] = [f"{path}.{e}.{m}" for e in range(8) for m in matrices(name)]
    result.is_pooling_model = result._is_non_gated_moe = False
    result._enable_moe_shared_loras = result._enable_mixed_moe_lora_format = False
    result._is_3d_moe_model = three_d
    return result


@pytest.mark.parametrize("name", LINEARS)
def test_it_packs_the_adapters_own_deltas(
    name: str, vllm: SimpleNamespace, served: dict[str, tuple[Adapter, Path]]
) -> None:
    adapter, path = served[name]
    lora = loaded(vllm, name, path)
    of = manager(vllm, name, adapter)
    of._create_merged_loras_inplace(lora)
    layers = {m.path: m for m in adapter.model.modules() if hasattr(m, "plans")}
    assert len(layers) == len(of.modules) == 2
    for ours, theirs in zip(layers.values(), of.modules, strict=True):
        packed = lora.loras[theirs]
        deltas = [b @ a for a, b in zip(packed.lora_a, packed.lora_b, strict=True)]  # (experts, out, in) each
        if name in TWO_D:
            by_projection = dict(zip(("gate_proj", "down_proj", "up_proj"), deltas, strict=True))
        else:  # interleaved
            by_projection = {"gate_proj": deltas[0][:, 0::2], "up_proj": deltas[0][:, 1::2], "down_proj": deltas[1]}
        for projection, delta in by_projection.items():
            for expert in range(8):
                if expert in ours.plans["default"].experts:
                    expected = ours.get_delta_weight("default", projection, expert)
                    assert torch.allclose(delta[expert], expected, rtol=1e-4, atol=1e-6), (projection, expert)
                else:
                    assert not delta[expert].any()
    for path_of, module in adapter.model.get_base_model().named_modules():
        if path_of.endswith("self_attn.o_proj"):
            expected = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            weights = lora.loras[path_of]
            assert torch.allclose(weights.lora_b @ weights.lora_a, expected, rtol=1e-4, atol=1e-6)


def test_its_check_can_fail(vllm: SimpleNamespace, served: dict[str, tuple[Adapter, Path]]) -> None:
    with pytest.raises(ValueError, match=r"expected target modules in .* but received .*mlp\.gate"):
        loaded(vllm, "olmoe", served["olmoe"][1], linears=ATTENTION)


def shared_names(vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a server with `enable_moe_shared_loras` calls the experts' factors."""
    monkeypatch.setattr(vllm.utils, "get_packed_modules_mapping", lambda model: {})
    monkeypatch.setattr(vllm.utils, "is_moe_model", lambda model: True)
    names: list[str] = vllm.utils.process_packed_modules_mapping(None, enable_moe_shared_loras=True)["experts"]
    return names


def with_shared_outer(vllm: SimpleNamespace, lora: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Block -> projection -> what its buffers for experts, which have room for rank 8, come to in each expert."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for path, packed in lora.loras.items():
        if not path.endswith(".experts"):
            continue
        layer = object.__new__(vllm.fused_moe.FusedMoEWithLoRA)
        sizes = SimpleNamespace(hidden_dim=32, intermediate_size_per_partition=24, num_local_experts=8, num_experts=8)
        options = SimpleNamespace(max_lora_rank=8, lora_dtype=torch.float32)
        layer.moe_config, layer.device, layer.tp_size, layer._w13_slices = sizes, torch.device("cpu"), 1, 2
        layer.fully_sharded, layer.enable_moe_shared_loras, layer.adapter_enabled = False, True, [0]
        layer._create_lora_a_weights(1, options)
        layer._create_lora_b_weights(1, options)
        layer.set_lora(0, packed.lora_a, packed.lora_b)
        # Its kernels take a buffer for one expert as one for all.
        w1, w3 = (b[0] @ a[0] for a, b in zip(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked, strict=True))
        w2 = layer.w2_lora_b_stacked[0][0] @ layer.w2_lora_a_stacked[0][0]
        assert layer.w13_lora_a_stacked[0].shape == (1, 1, 8, 32)
        assert layer.w2_lora_b_stacked[0].shape == (1, 1, 32, 8)
        found[int(path.split(".")[2])] = {"gate_proj": w1, "up_proj": w3, "down_proj": w2}
    return found


@pytest.mark.parametrize(("shared", "name"), SHARED_OUTER)
def test_it_takes_shared_outer_factors(
    shared: str,
    name: str,
    vllm: SimpleNamespace,
    shared_outer: dict[tuple[str, str], tuple[Adapter, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter, path = shared_outer[shared, name]
    names = shared_names(vllm, monkeypatch)
    lora = loaded(vllm, name, path, experts=names)
    # Also models whose other adapters are stacked have no layers of three dimensions then.
    of = manager(vllm, "olmoe" if name == "gpt_oss" else name, adapter)
    of._enable_moe_shared_loras, of.packed_modules_mapping, of.packed_modules = True, {"experts": names}, {}
    for experts in of.modules:
        of._register_packed_modules(experts)
    of._create_merged_loras_inplace(lora)
    computed, ours = with_shared_outer(vllm, lora), adapted_layers(adapter)
    assert computed.keys() == ours.keys()
    for index, layer in ours.items():
        for projection, expected in deltas(layer).items():
            assert torch.allclose(computed[index][projection], expected, rtol=1e-4, atol=1e-6), (index, projection)


def test_its_check_for_shared_outer_factors_can_fail(
    vllm: SimpleNamespace, served: dict[str, tuple[Adapter, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = shared_names(vllm, monkeypatch)
    with pytest.raises(ValueError, match=r"expected target modules in .* but received .*experts\.0\.gate_proj"):
        loaded(vllm, "olmoe", served["olmoe"][1], experts=names)


def test_which_models_it_reads_stacked() -> None:
    models = unpacked("vllm") / "vllm" / "model_executor" / "models"
    pattern = re.compile(r"is_3d_moe_weight: (typing\.)?ClassVar\[bool\] = True")
    files = {path.stem for path in models.glob("*.py") if pattern.search(path.read_text())}
    assert files
    for stem in files:
        assert any(model_type.startswith(stem) for model_type in STACKED_IN_VLLM), stem
    for model_type in STACKED_IN_VLLM:
        assert any(model_type.startswith(stem.removesuffix("_thinker")) for stem in files), model_type
