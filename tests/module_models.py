"""Tiny random models whose experts are modules of their own, or pairs of stacks in the block that routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.deepseek_like import deepseek_like
from tests.transformers4_like import transformers4_like


def _from_config(auto: Any, name: str, settings: dict[str, Any], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = auto.from_config(CONFIG_MAPPING[name](vocab_size=128, **settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def switch_transformers(seed: int = 0, **changes: Any) -> nn.Module:
    """Eight experts that take three tokens of a sequence each; no dropout, no noise."""
    settings: dict[str, Any] = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "num_experts": 8,
        "expert_capacity": 3,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.0,
    }
    return _from_config(AutoModelForSeq2SeqLM, "switch_transformers", settings | changes, seed)


def nllb_moe(seed: int = 0) -> nn.Module:
    settings: dict[str, Any] = {"d_model": 32, "num_experts": 8, "moe_token_dropout": 0.0, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        settings |= {f"{side}_layers": 2, f"{side}_ffn_dim": 24, f"{side}_attention_heads": 4}
        settings |= {f"{side}_sparse_step": 2, f"{side}_layerdrop": 0.0}
    return _from_config(AutoModelForSeq2SeqLM, "nllb-moe", settings | {"attention_dropout": 0.0}, seed)


def jetmoe(seed: int = 0) -> nn.Module:
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    return _from_config(AutoModelForCausalLM, "jetmoe", settings, seed)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "deepseek_like": deepseek_like,
    "mixtral_v4": lambda: transformers4_like("mixtral_v4"),
    "qwen2_moe_v4": lambda: transformers4_like("qwen2_moe_v4"),
    "switch_transformers": switch_transformers,
    "nllb_moe": nllb_moe,
    "jetmoe": jetmoe,
}
