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
    wheel = Wheel(
        unpacked("vllm"), "vllm", [f"vllm.lora.{name}" for name in names], {"vllm.utils.torch_utils.PIN_MEMORY": False}
    )
    return SimpleNamespace(**{name: wheel.load(f"vllm.lora.{name}") for name in names})


def loaded(vllm: SimpleNamespace, name: str, path: Path, linears: tuple[str, ...] | None = None) -> Any:
    """As `WorkerLoRAManager._load_adapter` does it."""
    helper = vllm.peft_helper.PEFTHelper.from_local_dir(str(path), None)
    helper.validate_legal(SimpleNamespace(max_lora_rank=8))
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


def test_which_models_it_reads_stacked() -> None:
    models = unpacked("vllm") / "vllm" / "model_executor" / "models"
    pattern = re.compile(r"is_3d_moe_weight: (typing\.)?ClassVar\[bool\] = True")
    files = {path.stem for path in models.glob("*.py") if pattern.search(path.read_text())}
    assert files
    for stem in files:
        assert any(model_type.startswith(stem) for model_type in STACKED_IN_VLLM), stem
    for model_type in STACKED_IN_VLLM:
        assert any(model_type.startswith(stem.removesuffix("_thinker")) for stem in files), model_type
