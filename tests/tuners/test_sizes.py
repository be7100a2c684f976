"""The parameter counts of MoE-Sieve's Table 4, on the meta device."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen2MoeConfig

from peft_sieve import SieveLoraConfig
from peft_sieve.moe.topology import find_moe_layers

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


@pytest.mark.parametrize(
    ("config", "experts", "expected"),
    [(OLMOE, 64, 311_459_840), (OLMOE, 16, 84_967_424), (QWEN, 60, 509_654_016), (QWEN, 15, 151_335_936)],
)
def test_trainable_parameters(config: object, experts: int, expected: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    mask = {layer.path: list(range(experts)) for layer in find_moe_layers(model)}
    model = get_peft_model(model, SieveLoraConfig(selected_experts=mask, task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0] == expected
