"""Shares of the parameters on the paper's models, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_sieve import EpngConfig
from tests.paper_models import OLMOE, QWEN


@pytest.mark.parametrize(
    ("model_config", "rank", "experts", "share"), [(OLMOE, 4, 64, 0.563), (OLMOE, 5, 64, 0.703), (QWEN, 6, 60, 0.668)]
)
def test_shares_within_those_of_the_paper(model_config: Any, rank: int, experts: int, share: float) -> None:
    """EPnG's abstract: 0.55% to 0.72% of the parameters of OLMoE and Qwen1.5-MoE."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    total = model.num_parameters()
    hidden, heads, layers = 2048, 4 * (2048 + 2048), model_config.num_hidden_layers
    inner = model_config.intermediate_size if experts == 64 else model_config.moe_intermediate_size
    by_hand = 3 * experts * (hidden + inner) + heads + hidden + experts
    if experts == 60:
        by_hand += 3 * (hidden + model_config.shared_expert_intermediate_size)
    model = get_peft_model(model, EpngConfig(r=rank, task_type="CAUSAL_LM"))
    trained = model.get_nb_trainable_parameters()[0]
    assert trained == rank * layers * by_hand
    assert 100 * trained / total == pytest.approx(share, abs=5.1e-4)
    assert 0.55 <= 100 * trained / total <= 0.72
