"""A dense model, an adapter with random values on it or on a MoE model, and one expert and token at a time."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from peft_sieve import LoraMoeConfig
from peft_sieve.tuners.lora_moe.layer import LoraMoeLayer
from tests.models import randomize_adapters, tiny_model, token_batch

SMALL: dict[str, Any] = {"num_experts": 4, "r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


def dense_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def adapted(base: nn.Module | str = "dense", std: float = 0.3, **settings: Any) -> PeftModel:
    if isinstance(base, str):
        base = dense_model() if base == "dense" else tiny_model(base)
    model = get_peft_model(base, LoraMoeConfig(**{**SMALL, **settings}))
    randomize_adapters(model, std)
    return model


def layers_of(model: nn.Module) -> dict[str, LoraMoeLayer]:
    return {
        path.removeprefix("base_model.model."): m for path, m in model.named_modules() if isinstance(m, LoraMoeLayer)
    }


def padded_batch(model: nn.Module, **sizes: int) -> dict[str, torch.Tensor]:
    """With labels; the second row ends in three tokens of padding."""
    batch = token_batch(model, **sizes)
    batch["attention_mask"][1, -3:] = 0
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def optimizer_of(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def naive_delta(
    a: torch.Tensor, b: torch.Tensor, router: torch.Tensor, x: torch.Tensor, top_k: int, scaling: float
) -> torch.Tensor:
    """(tokens, in) -> (tokens, out), from A (experts, r, in), B (experts, out, r) and a router (experts, in)."""
    rows = []
    for token in x:
        scores = [row @ token for row in router]
        chosen = sorted(range(len(scores)), key=lambda e: -float(scores[e]))[:top_k]
        total = sum(torch.exp(scores[e]) for e in chosen)
        rows.append(sum(torch.exp(scores[e]) / total * scaling * (b[e] @ (a[e] @ token)) for e in chosen))
    return torch.stack(rows)


def naive_balance(
    router: torch.Tensor, x: torch.Tensor, real: list[bool], top_k: int
) -> tuple[torch.Tensor, list[int]]:
    """The balance loss of one layer without its coefficient, and the tokens of each expert; x is (tokens, in)."""
    experts = len(router)
    counts, means = [0] * experts, [torch.zeros((), dtype=x.dtype)] * experts
    for token, is_real in zip(x, real, strict=True):
        if not is_real:
            continue
        scores = [row @ token for row in router]
        total = sum(torch.exp(s) for s in scores)
        for e in range(experts):
            means[e] = means[e] + torch.exp(scores[e]) / total / sum(real)
        for e in sorted(range(experts), key=lambda e: -float(scores[e]))[:top_k]:
            counts[e] += 1
    shares = [count / sum(counts) for count in counts]
    return experts * sum(s * m for s, m in zip(shares, means, strict=True)), counts
