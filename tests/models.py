"""Tiny random models of several architectures, and the small trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY_OLMOE = EXAMPLES / "tiny-olmoe"

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What each stands for: see tests/tuners/test_architectures.py.
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "mixtral": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
    "deepseek_v3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
    },
    "granitemoe": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    "jamba": {
        "intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "nemotron_h": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "layers_block_type": ["attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
    },
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of architecture `name`, in evaluation mode. Router weights are spread out: some start at zero."""
    settings = {**_COMMON, **CONFIGS[name], **changes}
    config = CONFIG_MAPPING[name](**settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # Stronger than the initialisation, so that experts differ visibly.
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def small_olmoe(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The small trained MoE: 6 layers, 32 experts, top-4."""
    return AutoModelForCausalLM.from_pretrained(TINY_OLMOE, dtype=dtype).eval()


def small_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_OLMOE)


def token_batch(model: nn.Module, batch: int = 3, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, (batch, length), and a mask of ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def randomize_adapters(model: nn.Module, std: float = 0.1, seed: int = 1) -> None:
    """Fill both factors of every adapter with random values: a B of zeros proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            parameter.data.copy_(noise.to(parameter.dtype))


def randomize_adapter(model: nn.Module, seed: int = 1) -> None:
    """The same for the adapter "default" of any method, where HELLoRI trains it."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in sorted(model.named_modules()):
        for key, parameter in module.named_parameters(recurse=False):
            if ".default." in f"{name}.{key}.":
                parameter.data.normal_(std=0.1, generator=generator)
        if getattr(module, "kept", None) is not None:
            module.weight.data.mul_(module.kept)
