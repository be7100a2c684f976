"""A tiny configuration of any model: the defaults of its configuration class, with every size shrunk by its name."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import nn

from transformers import PreTrainedConfig, PreTrainedModel

HIDDEN, HEADS, HEAD_DIM, LAYERS, VOCABULARY, EXPERTS, TOP_K = 32, 4, 8, 4, 128, 8, 2

# The first that matches a field's name gives its size.
_SIZES: list[tuple[str, int]] = [
    (r"head_dim|linear_(head|key_head|value_head)_dim|d_kv|kv_channels|qk_nope_head_dim|v_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim|index_head_dim|swa_head_dim|mamba_head_dim|mamba_d_head", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"hidden_size|d_model|text_hidden_size|merged_hidden_size|projector_hidden_size|out_hidden_size", HIDDEN),
    (r"moe_hidden_size|projector_(in|out)put_dim|vision_output_dim|output_dim|ple_embed_dim", HIDDEN),
    (r"vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCABULARY),
    (r"(q|kv|o)_lora_rank|hc_lowrank|hidden_size_per_layer_input|router_hidden_size|gated_norm_rank", 16),
    (r"(num|n)_(routed_|local_)?experts|moe_num_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|moe_top_k", TOP_K),
    (r"(n|num|moe_num)_shared_experts", 1),
    (r"zero_expert_num", 4),
    (r"n_groups?|num_expert_group|topk_group", 1),
    (r".*num_key_value_heads|linear_num_key_heads", 2),
    (r".*(num|n)_(attention_)?heads|.*attention_heads|linear_num_(value_)?heads|mamba_n_heads|index_n_heads", HEADS),
    (r".*intermediate_size(_mlp)?|.*ffn_dim|.*ffn_hidden_size|d_ff|share_expert_dim|.*mlp_dim", 24),
    (r"num_hidden_layers|num_layers|n_layers|depth|(num_)?(en|de)coder_layers", LAYERS),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"moe_layer_end_index", LAYERS - 1),
    (r"(en|de)coder_sparse_step|num_sparse_(en|de)coder_layers", 2),
    (r"mamba_d_state|ssm_state_size|mamba_dt_rank", 4),
    (r"max_position_embeddings|max_seq_len|model_max_length|max_source_positions", 128),
    (r".*chunk_size|block_size|sliding_window(_size)?|index_topk", 16),
]


def tiny_config(config_class: type[PreTrainedConfig], changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The tiny configuration, with `changes` (those of a nested configuration as a dict under its name)."""
    changes = dict(changes or {})
    default = config_class()
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        value = getattr(default, field.name, None)
        if isinstance(value, PreTrainedConfig):
            settings[field.name] = tiny_config(type(value), changes.pop(field.name, None)).to_dict()
        elif size := _size(field.name, value, default):
            settings[field.name] = size
        elif isinstance(value, int) and re.search(r"token_(id|index)$", field.name):
            settings[field.name] = value % 3 if field.name in ("pad_token_id", "bos_token_id", "eos_token_id") else 3
        elif re.fullmatch(r"(pad|bos|eos)_token_id", field.name):
            settings[field.name] = None if value is None else 0
    return config_class(**{**settings, **changes})


def _size(name: str, value: Any, default: PreTrainedConfig) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return None
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
    if size is None:
        return None
    if name == "num_key_value_heads" and value == getattr(default, "num_attention_heads", None):
        return HEADS
    return size


def tiny_model(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A random model of a class, in evaluation mode, whose experts differ visibly."""
    config = tiny_config(model_class.config_class, CHANGES.get(model_class.config_class.model_type))
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in dict.fromkeys(model.parameters()):
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Random tokens, (2, 16), with a mask of ones; for a decoder, too, if it has one of its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (2, 16), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(4, VOCABULARY, (2, 8), generator=generator)
    return batch


# What sizes alone do not settle: model type -> changes.
CHANGES: dict[str, dict[str, Any]] = {}
