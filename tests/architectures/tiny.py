"""A tiny configuration of any model: the defaults of its configuration class, with every size shrunk by its name."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

HIDDEN, HEADS, HEAD_DIM, LAYERS, VOCABULARY, EXPERTS, TOP_K = 32, 4, 8, 4, 128, 8, 2

# Of image, audio and the like: never among the inputs.
SPECIAL_TOKEN = 3

# Without a value by default, and without experts if it stays so.
_NEEDED = ("num_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "top_k_experts")
_NEEDED += ("moe_intermediate_size",)

# The first that matches a field's name gives its size.
_SIZES: list[tuple[str, int]] = [
    (r"head_dim|linear_(head|key_head|value_head)_dim|d_kv|kv_channels|qk_nope_head_dim|v_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim|index_head_dim|swa_head_dim|mamba_head_dim|mamba_d_head", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"hidden_size|d_model|text_hidden_size|merged_hidden_size|projector_hidden_size|out_hidden_size", HIDDEN),
    (
        r"(?!router).*_hidden_size|adapter_(in_dim|out_dim|input_size)|projector_(in|out)put_dim|vision_output_dim|output_dim|ple_embed_dim",
        HIDDEN,
    ),
    (r"vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCABULARY),
    (r"(q|kv|o)_lora_rank|hc_lowrank|hidden_size_per_layer_input|router_hidden_size|gated_norm_rank", 16),
    (r"part_features", 8),
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


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The tiny configuration, nested ones included."""
    default = config_class()
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        # Not by getattr, which some configurations refuse where layers differ.
        value = vars(default).get(field.name, field.default)
        if isinstance(value, PreTrainedConfig):
            settings[field.name] = tiny_config(type(value))
        elif (size := _size(field.name, value, default)) is not None:
            settings[field.name] = size
    return config_class(**{**settings, **CHANGES.get(_name(config_class), {})})


def _name(config_class: type[PreTrainedConfig]) -> str:
    return config_class.model_type or config_class.__name__


def _size(name: str, value: Any, default: PreTrainedConfig) -> int | None:
    if name == "pad_token_id":
        return 0
    if isinstance(value, bool) or not isinstance(value, int | None):
        return None
    if re.fullmatch(r"(bos|eos)_token_id", name):
        return None if value is None else 1
    if re.search(r"token_(id|index)$", name):
        return None if value is None else SPECIAL_TOKEN
    if (value is None and name not in _NEEDED) or value == 0:
        return None
    if name == "num_key_value_heads" and value == vars(default).get("num_attention_heads"):
        return HEADS
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)


def tiny_model(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A random model of a class, in evaluation mode, whose experts differ visibly."""
    config = tiny_config(model_class.config_class)
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in dict.fromkeys(model.parameters()):
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
        else:
            # Some scales start at zero, and hide what is behind them.
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def inputs_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Random tokens, (2, 16), with a mask of ones; for a decoder, too, if it has one of its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (2, 16), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(4, VOCABULARY, (2, 8), generator=generator)
    if (more := MORE_INPUTS.get(_name(type(model.config)))) is not None:
        more(batch, model.config)
    return batch


def _with_token_types(batch: dict[str, torch.Tensor], config: Any) -> None:
    """Tokens of images have experts of their own."""
    batch["moe_mm_token_type_ids"] = torch.arange(16).remainder(2).expand(2, -1)


def _with_image(batch: dict[str, torch.Tensor], config: Any) -> None:
    """The vision tower has experts: one image of 4 x 4 patches, merged to 4 tokens, for each sample."""
    vision = config.vision_config
    batch["input_ids"][:, 2:6] = SPECIAL_TOKEN
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
    width = vision.num_channels * vision.patch_size**2
    batch["pixel_values"] = torch.randn(32, width, generator=torch.Generator().manual_seed(1))


def _with_embeddings(batch: dict[str, torch.Tensor], config: Any) -> None:
    """It speaks what another model thought, and reads no tokens of its own."""
    generator = torch.Generator().manual_seed(1)
    batch["inputs_embeds"] = torch.randn(2, 16, config.text_config.hidden_size, generator=generator)
    batch["talker_input_ids"] = batch["input_ids"]


# What models need beside text for all of their experts to get something.
MORE_INPUTS = {
    "dots3_note": _with_image,
    "ernie4_5_vl_moe": _with_token_types,
    "Qwen3OmniMoeTalkerConfig": _with_embeddings,
}

# What sizes alone do not settle: model type -> settings.
CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "DbrxAttentionConfig": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {"sliding_window": 16},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, -1, 4, 8]},
    "inkling_vision": {"patch_size": 4},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 3, "audio_start_token_id": 3},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 24},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "radio": {"video_temporal_patch_size": 2},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_text": {"enable_moe_block": True, "global_head_dim": 16},
    "diffusion_gemma_text": {"global_head_dim": 16},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
}
