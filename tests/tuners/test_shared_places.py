"""A layer that is in two places of a model: files hold its adapter once, and it loads from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from peft_sieve import EpngConfig, LoraMoeConfig, SieveError, SieveLoraConfig
from tests.models import randomize_adapters, tiny_model, token_batch

CONFIGS: dict[str, Callable[[], Any]] = {
    "sieve": lambda: SieveLoraConfig(r=2, selected_experts={"model.layers.0.mlp.experts": [1, 2]}),
    "epng": lambda: EpngConfig(r=2),
    "lora_moe": lambda: LoraMoeConfig(num_experts=4, r=2, target_modules=["q_proj", "o_proj"]),
}


def with_one_attention() -> PreTrainedModel:
    model = tiny_model("olmoe")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch(model)).logits


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_on_it_is_saved_once_and_loads(method: str, tmp_path: Path) -> None:
    model = get_peft_model(with_one_attention(), CONFIGS[method]())
    randomize_adapters(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("layers.1.self_attn" in key for key in saved)
    by_transformers = with_one_attention()
    by_transformers.load_adapter(str(tmp_path))
    for loaded in (PeftModel.from_pretrained(with_one_attention(), tmp_path), by_transformers):
        assert torch.equal(logits(loaded), logits(model))

    save_file(
        {k: v for k, v in saved.items() if "layers.0.self_attn.q_proj" not in k}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(SieveError, match=r"layers\.[01]\.self_attn\.q_proj"):
        PeftModel.from_pretrained(with_one_attention(), tmp_path)
    with pytest.raises(SieveError, match=r"layers\.[01]\.self_attn\.q_proj"):
        with_one_attention().load_adapter(str(tmp_path))
