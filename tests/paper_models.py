"""The real sizes of the paper's models (MoE-Sieve, Table 4), for counts that need no weights."""

from transformers import OlmoeConfig, Qwen2MoeConfig

OLMOE = OlmoeConfig(
    hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16, num_experts=64
)
QWEN = Qwen2MoeConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
    num_experts=60,
)
