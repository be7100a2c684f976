"""The parameter counts of MoE-Sieve's Table 4, on the meta device."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_sieve import SieveLoraConfig
from peft_sieve.moe.topology import find_moe_layers
from tests.paper_models import OLMOE, QWEN


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
