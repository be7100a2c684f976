"""The layout for servers that have one outer factor for all experts: names, shapes and values, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForConditionalGeneration

from peft_sieve import SieveError, SieveLoraConfig, export_lora, narrow_lora
from peft_sieve.cli import main
from peft_sieve.moe.topology import find_moe_layers
from tests.adapters.saved import SHARED, Adapter, saved_adapter
from tests.architectures.tiny import tiny_model as tiny_model_of
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, tiny_model

WORDS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
SHARING = [key for key in SHARED if "share_outer" in SHARED[key]]


def exported(adapter: Adapter, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    export_lora(adapter.path, folder, layout="shared_outer", **options)
    return load_file(folder / "adapter_model.safetensors")


def assert_adds_the_same(tensors: dict[str, torch.Tensor], prefix: str, layer: Any, name: str = "default") -> None:
    """In each expert and projection, by the products of what is in the file."""
    plan = layer.plans[name]
    for projection, word in WORDS.items():
        a, b = (tensors[f"base_model.model.{prefix}.{word}.lora_{side}.weight"] for side in "AB")
        size_in, size_out = layer.shape.projections[projection]
        outer = 0 if projection == "down_proj" else 1
        assert a.shape == (1 if outer else 8, 4, size_in)
        assert b.shape == (8 if outer else 1, size_out, 4)
        for expert in range(8):
            delta = b[expert if outer else 0] @ a[0 if outer else expert]
            if expert in plan.adapted and projection in plan.ranks:
                assert torch.allclose(delta, layer.get_delta_weight(name, projection, expert), atol=1e-6)
            else:
                assert not delta.any()


@pytest.mark.parametrize(
    ("name", "shared"), [*(("olmoe", key) for key in SHARING), ("mixtral", "both"), ("gpt_oss", "both")]
)
def test_one_outer_factor_and_all_inner_ones(name: str, shared: str, tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, name, **SHARED[shared])
    tensors = exported(adapter, tmp_path / "lora")
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    layers = [module for module in adapter.model.modules() if hasattr(module, "plans")]
    for index, layer in enumerate(layers):
        assert_adds_the_same(tensors, f"model.layers.{index}.{block}.experts", layer)
    assert sum(".experts." in key for key in tensors) == len(layers) * 3 * 2
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"] == 4
    assert {"q_proj", "gate_proj", "up_proj", "down_proj"} <= {x.split(".")[-1] for x in config["target_modules"]}
    assert not any(key in config for key in ("share_outer", "cold_experts", "selected_experts"))


def test_parts_of_an_adapter(tmp_path: Path) -> None:
    """One projection, one layer, no router: what servers want all the same, and nothing else."""
    mask = {"model.layers.1.mlp.experts": [2, 5]}
    options = {"layers_to_transform": [1], "selected_experts": mask, "expert_projections": ["up_proj"]}
    adapter = saved_adapter(tmp_path, "olmoe", share_outer=True, **options)
    tensors = exported(adapter, tmp_path / "lora", include_router=False)
    (layer,) = (module for module in adapter.model.modules() if hasattr(module, "plans"))
    assert_adds_the_same(tensors, "model.layers.1.mlp.experts", layer)
    assert not any(".gate." in key or ".layers.0.mlp." in key for key in tensors)
    assert any(".gate." in key for key in exported(adapter, tmp_path / "with_router"))


def test_experts_in_a_module_list(tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "deepseek_like", base=deepseek_like(), **SHARED["both"])
    export_lora(adapter.model, tmp_path / "lora", layout="shared_outer")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for layer in (module for module in adapter.model.modules() if hasattr(module, "plans")):
        assert_adds_the_same(tensors, layer.path, layer)


def test_one_of_several_adapters_in_a_layer(tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe")
    mask = {path: [2] for path in adapter.model.peft_config["default"].selected_experts}
    adapter.model.add_adapter("second", SieveLoraConfig(r=4, selected_experts=mask, **SHARED["both"]))
    randomize_adapters(adapter.model)
    export_lora(adapter.model, tmp_path / "second", layout="shared_outer", adapter_name="second")
    tensors = load_file(tmp_path / "second" / "adapter_model.safetensors")
    layer = next(module for module in adapter.model.modules() if hasattr(module, "plans"))
    assert_adds_the_same(tensors, layer.path, layer, "second")
    with pytest.raises(SieveError, match="own outer factors"):
        export_lora(adapter.model, tmp_path / "first", layout="shared_outer", adapter_name="default")


def test_a_text_model_of_a_larger_one_has_both_names(tmp_path: Path) -> None:
    tiny_model_of(Qwen3_5MoeForConditionalGeneration).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    mask = {layer.path: [0, 3] for layer in find_moe_layers(base)}
    model = get_peft_model(base, SieveLoraConfig(r=4, share_outer=True, selected_experts=mask, task_type="CAUSAL_LM"))
    randomize_adapters(model)
    export_lora(model, tmp_path / "lora", layout="shared_outer")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for path in mask:
        end = path.removeprefix("model.")
        for side in "AB":
            ours, theirs = (
                tensors[f"base_model.model.{prefix}.{end}.w2.lora_{side}.weight"]
                for prefix in ("model", "model.language_model")
            )
            assert torch.equal(ours, theirs)


def test_it_is_smaller_by_what_is_shared(tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", rank_pattern={}, **SHARED["both"])
    options = {"include_router": False}
    small = export_lora(adapter.path, tmp_path / "small", layout="shared_outer", **options).num_parameters
    large = export_lora(adapter.path, tmp_path / "large", layout="per_expert", **options).num_parameters
    # Of 8 copies of A of gate and up, and of B of down, 7 less, in two layers.
    assert large - small == 2 * 7 * 4 * (32 + 32 + 32)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SHARED["cold"]], ids=["nothing shared", "only cold experts"])
def test_own_outer_factors_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", **options)
    with pytest.raises(SieveError, match=r"'shared_outer' does not fit .* own outer factors \(share_outer=False\)"):
        export_lora(adapter.path, tmp_path / "lora", layout="shared_outer")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("granitemoe", r"block_sparse_moe.input_linear in checkpoints of GraniteMoe"),
        ("nemotron_h", "have up_proj, down_proj only"),
    ],
)
def test_models_that_the_servers_do_not_read_so_are_refused(name: str, text: str, tmp_path: Path) -> None:
    base = tiny_model(name)
    mask = {layer.path: [1, 2] for layer in find_moe_layers(base)}
    targets = {"target_modules": ["q_proj"]} if name == "nemotron_h" else {}
    model = get_peft_model(base, SieveLoraConfig(r=2, share_outer=True, selected_experts=mask, **targets))
    with pytest.raises(SieveError, match=f"layout='shared_outer' is not supported here: .*{text}"):
        export_lora(model, tmp_path / "lora", layout="shared_outer")
    assert not (tmp_path / "lora").exists()


def test_it_is_not_narrowed(tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", share_outer=True)
    exported(adapter, tmp_path / "lora")
    mask = adapter.model.peft_config["default"].selected_experts
    with pytest.raises(SieveError, match=r"has factors that experts share .*experts\.w1.* pair per expert"):
        narrow_lora(tmp_path / "lora", tmp_path / "narrow", mask)
    assert not (tmp_path / "narrow").exists()


# --- command line ---------------------------------------------------------------------------------------------------


def test_command_and_card(tmp_path: Path, capsys: Any) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", **SHARED["one layer whole"])
    assert main(["export", str(adapter.path), str(tmp_path / "lora"), "--layout", "shared_outer"]) == 0
    assert "layout shared_outer, rank 4" in capsys.readouterr().out
    card = " ".join((tmp_path / "lora" / "README.md").read_text().split())
    assert "(2 of 16 routed experts; 14 others use one adapter per layer together)" in card
    assert "library_name" not in card
    assert "--experts-shared-outer-loras" in card and "--enable-moe-shared-loras" in card and "not in PEFT" in card
