"""A model in the shape of DeepSeek-MoE-16B's remote code: experts in a `ModuleList`, a router that returns
(ids, weights, auxiliary loss), another code path in training than in inference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class DeepseekLikeConfig(PretrainedConfig):
    model_type = "deepseek_like"

    def __init__(
        self,
        vocab_size: int = 128,
        hidden_size: int = 32,
        moe_intermediate_size: int = 24,
        n_routed_experts: int = 8,
        n_shared_experts: int = 2,
        num_experts_per_tok: int = 3,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        first_k_dense_replace: int = 1,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.first_k_dense_replace = first_k_dense_replace
        super().__init__(**kwargs)


class DeepseekLikeMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    def __init__(self, config: DeepseekLikeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        scores = F.linear(flat, self.weight, None).softmax(dim=-1)
        topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        return topk_idx, topk_weight, None


class DeepseekLikeMoE(nn.Module):
    def __init__(self, config: DeepseekLikeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.experts = nn.ModuleList(
            [DeepseekLikeMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts)]
        )
        self.gate = MoEGate(config)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = DeepseekLikeMLP(config.hidden_size, shared)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        topk_idx, topk_weight, _ = self.gate(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        flat_idx = topk_idx.view(-1)
        if self.training:
            repeated = flat.repeat_interleave(self.top_k, dim=0)
            y = torch.empty_like(repeated)
            for i, expert in enumerate(self.experts):
                y[flat_idx == i] = expert(repeated[flat_idx == i])
            y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)
        else:
            y = torch.zeros_like(flat)
            for i in range(len(self.experts)):
                tokens, slots = (topk_idx == i).nonzero(as_tuple=True)
                if tokens.numel():
                    y.index_add_(0, tokens, self.experts[i](flat[tokens]) * topk_weight[tokens, slots, None])
        return y.view_as(hidden_states) + self.shared_experts(hidden_states)


class DeepseekLikeAttention(nn.Module):
    def __init__(self, config: DeepseekLikeConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        q, k, v = (
            proj(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, hidden))


class DeepseekLikeLayer(nn.Module):
    def __init__(self, config: DeepseekLikeConfig, index: int) -> None:
        super().__init__()
        self.self_attn = DeepseekLikeAttention(config)
        dense = index < config.first_k_dense_replace
        self.mlp = DeepseekLikeMLP(config.hidden_size, 48) if dense else DeepseekLikeMoE(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekLikePreTrainedModel(PreTrainedModel):
    config_class = DeepseekLikeConfig
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)


class DeepseekLikeModel(DeepseekLikePreTrainedModel):
    def __init__(self, config: DeepseekLikeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DeepseekLikeLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            # A padding query may look at itself, or its softmax would have nothing to sum over.
            mask = mask & attention_mask[:, None, None, :].bool() | torch.eye(length, dtype=torch.bool)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class DeepseekLikeForCausalLM(DeepseekLikePreTrainedModel, GenerationMixin):
    def __init__(self, config: DeepseekLikeConfig) -> None:
        super().__init__(config)
        self.model = DeepseekLikeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def deepseek_like(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> DeepseekLikeForCausalLM:
    """A random model of that shape, in evaluation mode."""
    torch.manual_seed(seed)
    return DeepseekLikeForCausalLM(DeepseekLikeConfig(**changes)).to(dtype).eval()
