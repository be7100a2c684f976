"""`hotswap_adapter`, and what transformers has of it: another adapter in the place of one, and what is saved then."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from peft_sieve import EpngConfig, SieveError, SieveLoraConfig
from tests.models import randomize_adapter, tiny_model, token_batch
from tests.tuners.errors import assert_plain

MASK = {f"model.layers.{i}.mlp.experts": [1, 4, 6] for i in range(2)}
WEIGHTS = "adapter_model.safetensors"


def base(bias: bool = False) -> Any:
    return tiny_model("olmoe", attention_bias=bias)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**token_batch(model)).logits


def saved(folder: Path, seed: int, kind: type[SieveLoraConfig] = SieveLoraConfig, **settings: Any) -> torch.Tensor:
    """An adapter in a folder, whole modules and biases changed, too; returns the outputs of the model that has it."""
    settings = {"r": 4, "lora_alpha": 8, "selected_experts": MASK, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(base("bias" in settings), kind(**settings))
    randomize_adapter(model, seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return logits(model)


BESIDE: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["gate"]},
    {"trainable_token_indices": [5, 7]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"bias": "all"},
    {"kind": EpngConfig},
    {"cold_experts": "shared", "share_outer": True},
]


@pytest.mark.parametrize("alpha", [8, 6])
@pytest.mark.parametrize("settings", BESIDE)
def test_a_swap_and_what_is_saved_after_it(settings: dict[str, Any], alpha: int, tmp_path: Path) -> None:
    first = saved(tmp_path / "a", 1, **settings)
    second = saved(tmp_path / "b", 2, **{**settings, "lora_alpha": alpha})
    model = PeftModel.from_pretrained(base("bias" in settings), tmp_path / "a")
    parameters = dict(model.named_parameters())
    for name, expected in (("b", second), ("a", first), ("b", second)):
        hotswap_adapter(model, str(tmp_path / name), "default", torch_device="cpu")
        assert torch.equal(logits(model), expected)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())  # compiled code has them
    assert model.peft_config["default"].lora_alpha == alpha and model.peft_config["default"].inference_mode
    model.save_pretrained(tmp_path / "c")
    assert torch.equal(logits(PeftModel.from_pretrained(base("bias" in settings), tmp_path / "c")), second)


def test_scales_are_those_of_the_new_adapter(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 2, lora_alpha=6)
    swapped, loaded = (PeftModel.from_pretrained(base(), tmp_path / name) for name in "ab")
    hotswap_adapter(swapped, str(tmp_path / "b"), "default", torch_device="cpu")
    for model in (swapped, loaded):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 0.5)
    assert torch.equal(logits(swapped), logits(loaded))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 7]}])
@pytest.mark.parametrize("way", ["asked", "enabled", "from memory"])
def test_in_transformers(settings: dict[str, Any], way: str, tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a", 1, **settings), saved(tmp_path / "b", 2, lora_alpha=6, **settings)
    model = base()
    if way == "enabled":
        model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(str(tmp_path / "a"), adapter_name="default")
    assert torch.equal(logits(model), first)
    if way == "from memory":
        given: dict[str, Any] = {
            "peft_config": PeftConfig.from_pretrained(tmp_path / "b"),
            "adapter_state_dict": load_file(tmp_path / "b" / WEIGHTS),
        }
    else:
        given = {"peft_model_id": str(tmp_path / "b")}
    info = model.load_adapter(adapter_name="default", **given, **({} if way == "enabled" else {"hotswap": True}))
    assert not info.missing_keys and not info.unexpected_keys
    assert torch.equal(logits(model), second)
    model.save_pretrained(tmp_path / "c")
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "c")), second)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"bias": "all"}, "bias"),
        ({"r": 2}, "other experts, ranks or modules"),
        ({"cold_experts": "shared"}, "has cold_experts='shared', and adapter 'default' has 'frozen'"),
        ({"share_outer": True}, "has share_outer=True, and adapter 'default' has False"),
        ({"selected_experts": {path: [1, 4, 7] for path in MASK}}, "other experts, ranks or modules"),
    ],
)
@pytest.mark.parametrize("way", ["PEFT", "transformers"])
def test_another_form_is_refused(way: str, settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    first = saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 2, **settings)
    model = PeftModel.from_pretrained(base(), tmp_path / "a") if way == "PEFT" else base()
    if way == "transformers":
        model.load_adapter(str(tmp_path / "a"), adapter_name="default")
    before = copy.copy(model.peft_config["default"])
    with pytest.raises(SieveError, match=text) as refusal:
        if way == "PEFT":
            hotswap_adapter(model, str(tmp_path / "b"), "default", torch_device="cpu")
        else:
            model.load_adapter(str(tmp_path / "b"), adapter_name="default", hotswap=True)
    assert_plain(str(refusal.value))
    assert torch.equal(logits(model), first) and model.peft_config["default"] == before


def test_a_merged_adapter_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", 1, modules_to_save=["lm_head"])
    model = PeftModel.from_pretrained(base(), tmp_path / "a")
    model.merge_adapter()
    with pytest.raises(SieveError, match="merged"):
        hotswap_adapter(model, str(tmp_path / "a"), "default", torch_device="cpu")
    model.unmerge_adapter()
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    kept = {key: value + int(value.is_floating_point()) for key, value in tensors.items() if "lm_head" not in key}
    save_file(kept, tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(SieveError, match="lm_head"):
        hotswap_adapter(model, str(tmp_path / "a"), "default", torch_device="cpu")
    assert torch.equal(logits(model), first)
