"""What EPnG counts while it trains: real tokens, whatever the mask says them with."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaForBlockDiffusion

from peft_sieve import EpngConfig
from peft_sieve.tuners.epng.layer import EpngExpertLayer
from tests.architectures.tiny import tiny_model as tiny_of_class
from tests.models import tiny_model, token_batch


def traffic(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Layer -> pairs of token and expert in one training forward."""
    adapted = get_peft_model(model, EpngConfig(r=4, top_k=2, calib_dataset=[token_batch(model)])).train()
    adapted(**batch)
    layers = (module for module in adapted.modules() if isinstance(module, EpngExpertLayer))
    return {layer.path: int(layer.traffic.totals()[0].sum()) for layer in layers}


def test_a_mask_for_each_query() -> None:
    model = tiny_model("olmoe")
    batch = token_batch(model, batch=2, length=10)
    mask = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3), torch.zeros(3, 3)).bool().tril()
    assert set(traffic(model, {**batch, "attention_mask": mask.expand(2, 1, 10, 10)}).values()) == {2 * 7 * 3}


def test_a_decoder_of_tokens_that_are_not_the_batch_s() -> None:
    model = tiny_of_class(DiffusionGemmaForBlockDiffusion)
    model.config.canvas_length = 10
    batch = token_batch(model, batch=2, length=10)
    batch["attention_mask"][0, 7:] = 0
    counted = traffic(model, batch)
    assert {path: 20 * 2 if "decoder" in path else 17 * 2 for path in counted} == counted
    assert any("decoder" in path for path in counted)
