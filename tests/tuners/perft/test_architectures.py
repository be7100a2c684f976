"""Beside the MoE blocks of models of every layout: R trains and is loaded again, E goes by the real dispatch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import PerftConfig, SieveError
from peft_sieve.tuners.perft.layer import perft_layers
from tests.architectures.recount import recounted
from tests.architectures.test_walk import MODELS, model_class
from tests.architectures.tiny import inputs_for, tiny_model
from tests.architectures.walk import REMOTE_CODE
from tests.models import tiny_model as text_model
from tests.models import token_batch
from tests.tuners.perft.adapted import adapted, logits, randomize

# The slowest two say nothing about blocks that others do not.
CLASSES = [*(MODELS.keys() - {"MuseSparkForConditionalGeneration", "Qwen3OmniMoeTalkerForConditionalGeneration"})]
CLASSES = [*sorted(CLASSES), *REMOTE_CODE]
# What is refused, and by what sentence.
REFUSED = {
    "Gemma4ForConditionalGeneration": "together with its attention",
}


def made(name: Any) -> nn.Module:
    return tiny_model(model_class(name) if isinstance(name, str) else name)


def first_output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    output = model(**inputs)
    return output.logits if "logits" in output else next(iter(output.values()))


@pytest.mark.parametrize("name", CLASSES, ids=lambda name: name if isinstance(name, str) else name.__name__)
def test_routed_adapters_train_and_are_loaded_again(name: Any, tmp_path: Path) -> None:
    base = made(name)
    inputs = inputs_for(base)
    config = PerftConfig(variant="R", num_adapters=3, r=2, lora_dropout=0.0)
    if name in REFUSED:
        with pytest.raises(SieveError, match=REFUSED[name]):
            get_peft_model(base, config)
        return
    fresh = copy.deepcopy(base)
    with torch.no_grad():
        before = first_output(base.eval(), inputs)
    model = get_peft_model(base, config)
    randomize(model)
    first_output(model.train(), inputs).float().square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    assert all(layer.perft_A["default"].weight.grad.any() for layer in perft_layers(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    with torch.no_grad():
        expected = first_output(model.eval(), inputs)
        assert torch.equal(first_output(loaded, inputs), expected)
        assert not torch.allclose(expected, before, rtol=1e-3)
        assert torch.equal(first_output(model.unload().eval(), inputs), before)


@pytest.mark.parametrize("name", CLASSES, ids=lambda name: name if isinstance(name, str) else name.__name__)
def test_embedded_adapters_get_the_tokens_of_their_experts(name: Any) -> None:
    base = made(name).eval()
    inputs = inputs_for(base)
    config = PerftConfig(variant="E", r=1, lora_alpha=1, lora_dropout=0.0)
    if name in REFUSED:
        with pytest.raises(SieveError, match=REFUSED[name]):
            get_peft_model(base, config)
        return
    model = get_peft_model(base, config).eval()
    layers = perft_layers(model)
    assert layers
    added: dict[str, list[torch.Tensor]] = {layer.experts_path: [] for layer in layers}
    for layer in layers:
        # The adapter of expert e writes to feature e only, little enough to leave the routing behind it alone.
        second = layer.perft_B["default"].weight
        second.data.zero_()
        second.data[range(layer.num_experts), 0, range(layer.num_experts)] = 1e-6
        layer.register_forward_hook(lambda module, args, out: added[module.experts_path].append(out.detach()))
    sizes = {layer.experts_path: layer.num_experts for layer in layers}
    with torch.no_grad(), recounted(model.get_base_model(), sizes) as counts:
        first_output(model, inputs)
    assert any(added.values())
    for path, number in sizes.items():
        rows = torch.cat(added[path] or [torch.zeros(0, number)])[:, :number]
        # A model may send a token to an expert more than once (nllb_moe, a table of deepseek_v4).
        expected = counts[path].clamp(max=rows.shape[0])
        assert bool(expected.any()) == bool(added[path]), path
        assert torch.equal((rows != 0).sum(0), expected), path


def test_a_block_with_two_sets_of_experts_has_no_embedded_adapters() -> None:
    base = text_model("olmoe")
    block = base.model.layers[1].mlp
    block.more_experts = copy.deepcopy(block.experts)
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(SieveError, match=r"model.layers.1.mlp .*2 sets of experts.*variant E"):
        get_peft_model(base, PerftConfig(variant="E"))
    assert [name for name, _ in base.named_modules()] == before
    model = adapted("D", base)
    assert [layer.path for layer in perft_layers(model)] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert not torch.equal(logits(model, token_batch(model)), logits(text_model("olmoe"), token_batch(model)))
