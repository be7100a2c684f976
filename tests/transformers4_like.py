"""Models in the shapes that Mixtral and Qwen2-MoE had in transformers 4, as remote code still has them: experts in a
`ModuleList`, and a router that is a plain linear layer, so that the choice of experts happens inside the block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.deepseek_like import (
    DeepseekLikeConfig,
    DeepseekLikeForCausalLM,
    DeepseekLikeLayer,
    DeepseekLikeMLP,
)


class MixtralExpert(nn.Module):
    def __init__(self, hidden_size: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, ffn_dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(hidden_states)) * self.w3(hidden_states))


class MixtralBlock(nn.Module):
    def __init__(self, config: DeepseekLikeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(
            MixtralExpert(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts)
        )

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        router_logits = self.gate(flat)
        routing_weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        routing_weights, selected = torch.topk(routing_weights, self.top_k, dim=-1)
        routing_weights = self.finish(routing_weights).to(flat.dtype)
        out = torch.zeros_like(flat)
        mask = F.one_hot(selected, num_classes=len(self.experts)).permute(2, 1, 0)
        for expert_id in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slots, tokens = torch.where(mask[expert_id].squeeze(0))
            rows = flat[None, tokens].reshape(-1, flat.shape[-1])
            out.index_add_(0, tokens, self.experts[expert_id](rows) * routing_weights[tokens, slots, None])
        return out.view_as(hidden_states), router_logits

    def finish(self, routing_weights: torch.Tensor) -> torch.Tensor:
        return routing_weights / routing_weights.sum(dim=-1, keepdim=True)


class Qwen2MoeBlock(MixtralBlock):
    norm_topk_prob = False

    def __init__(self, config: DeepseekLikeConfig) -> None:
        super().__init__(config)
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.experts = nn.ModuleList(DeepseekLikeMLP(hidden, width) for _ in range(config.n_routed_experts))
        self.shared_expert = DeepseekLikeMLP(hidden, 40)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routed, router_logits = super().forward(hidden_states)
        shared = F.sigmoid(self.shared_expert_gate(hidden_states)) * self.shared_expert(hidden_states)
        return routed + shared, router_logits

    def finish(self, routing_weights: torch.Tensor) -> torch.Tensor:
        return super().finish(routing_weights) if self.norm_topk_prob else routing_weights


class MixtralLayer(DeepseekLikeLayer):
    def __init__(self, config: DeepseekLikeConfig, index: int) -> None:
        super().__init__(config, index)
        del self.mlp
        self.block_sparse_moe = MixtralBlock(config)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))[0]


class Qwen2MoeLayer(DeepseekLikeLayer):
    def __init__(self, config: DeepseekLikeConfig, index: int) -> None:
        super().__init__(config, index)
        self.mlp = Qwen2MoeBlock(config)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))[0]


LAYERS = {"mixtral_v4": MixtralLayer, "qwen2_moe_v4": Qwen2MoeLayer}


def transformers4_like(name: str, seed: int = 0) -> DeepseekLikeForCausalLM:
    """A random model of that shape, in evaluation mode."""
    torch.manual_seed(seed)
    model = DeepseekLikeForCausalLM(DeepseekLikeConfig(num_hidden_layers=2))
    model.model.layers = nn.ModuleList(LAYERS[name](model.config, index) for index in range(2))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()
