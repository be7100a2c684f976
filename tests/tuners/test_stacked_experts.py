"""Stacked experts outside the common interface: the model's own forward on W + scaling * B A is what they are compared
with, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.models.dbrx.modeling_dbrx import DbrxForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashForCausalLM
from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration

from peft_sieve import SieveLoraConfig
from peft_sieve.moe.topology import MoELayer, find_moe_layers
from peft_sieve.tuners.common.experts.fused import FusedSieveExperts
from tests.architectures.tiny import tiny_model
from tests.reference import assert_same

TOKENS, TOP_K, ADAPTED = 11, 3, (1, 4, 6)
Deltas = dict[str, torch.Tensor]
BOTH = {"cold_experts": "shared", "share_outer": True}


def set_gate_up(weights: Deltas, delta: Deltas) -> None:
    """(num_experts, out, in), gate above up."""
    both = torch.cat((delta["gate_proj"], delta["up_proj"]), dim=1)
    weights["gate_up_proj"] = torch.cat(
        (weights["gate_up_proj"][: len(both)] + both, weights["gate_up_proj"][len(both) :])
    )
    weights["down_proj"] = weights["down_proj"] + delta["down_proj"]


def set_transposed(weights: Deltas, delta: Deltas) -> None:
    """(num_experts, in, out), gate before up."""
    both = torch.cat((delta["gate_proj"].mT, delta["up_proj"].mT), dim=2)
    weights["gate_up_proj"] = weights["gate_up_proj"] + both
    weights["down_proj"] = weights["down_proj"] + delta["down_proj"].mT


def set_flat(weights: Deltas, delta: Deltas) -> None:
    """Experts one below the other, (num_experts * ffn, hidden) each."""
    for name, value in (("w1", delta["gate_proj"]), ("v1", delta["up_proj"]), ("w2", delta["down_proj"].mT)):
        weights[f"mlp.{name}"] = weights[f"mlp.{name}"] + value.flatten(0, 1)


CASES: dict[str, tuple[type[PreTrainedModel], Callable[[Deltas, Deltas], None]]] = {
    "step3p7": (Step3p7ForConditionalGeneration, set_gate_up),
    "longcat_flash": (LongcatFlashForCausalLM, set_gate_up),
    "llama4": (Llama4ForCausalLM, set_transposed),
    "dbrx": (DbrxForCausalLM, set_flat),
}


def first_layer(name: str) -> MoELayer:
    layer = find_moe_layers(tiny_model(CASES[name][0]))[0]
    assert layer.family.name == name
    layer.experts.double().requires_grad_(False)
    if name == "step3p7":
        layer.experts.limit = 0.5  # its gate clamps
    return layer


def call_of(name: str, experts: Any) -> tuple[torch.Tensor, ...]:
    """What the block would call its experts with; of longcat_flash's 12, the last four return their input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, 32, generator=generator, dtype=torch.float64)
    num_ids = getattr(experts, "total_experts", 8)
    ids = torch.rand(TOKENS, num_ids, generator=generator).topk(TOP_K).indices
    weights = torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float64)
    if name == "llama4":
        scores = torch.zeros(TOKENS, 8, dtype=torch.float64).scatter(1, ids, weights)
        return ((x.repeat(8, 1) * scores.T.reshape(-1, 1)).requires_grad_(),)
    x = x.view(1, TOKENS, 32) if name == "dbrx" else x
    return x.requires_grad_(), ids, weights.requires_grad_()


def adapter_around(layer: MoELayer, active: tuple[str, ...], **settings: Any) -> FusedSieveExperts:
    adapter = FusedSieveExperts(layer.experts, layer)
    for index, name in enumerate(active):
        config = SieveLoraConfig(r=3 + index, lora_alpha=5, lora_dropout=0.0, init_lora_weights=False, **settings)
        adapter.update_layer(name, ADAPTED[index:], config)
    adapter.set_adapter(list(active))
    return adapter.double()


def deltas(adapter: FusedSieveExperts, active: tuple[str, ...]) -> Deltas:
    """Of all experts: (num_experts, out, in), differentiable."""
    found = {}
    for projection, (width_in, width_out) in adapter.shape.projections.items():
        rows = [torch.zeros(width_out, width_in, dtype=torch.float64) for _ in range(adapter.shape.num_experts)]
        for name in active:
            a, b, scaling = adapter.factors(name, projection)
            plan = adapter.plans[name]
            for place, expert in enumerate((*plan.experts, *plan.cold)):
                slot = min(place, len(plan.experts))
                a_slot, b_slot = (factor[slot if len(factor) > 1 else 0] for factor in (a, b))
                rows[expert] = rows[expert] + scaling * b_slot.T @ a_slot
        found[projection] = torch.stack(rows)
    return found


@pytest.mark.parametrize("settings", [{}, {"cold_experts": "shared"}, {"share_outer": True}, BOTH])
@pytest.mark.parametrize("active", [("default",), ("default", "second")])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_models_own_forward(
    name: str, active: tuple[str, ...], settings: dict[str, Any]
) -> None:
    layer = first_layer(name)
    adapter = adapter_around(layer, active, **settings)
    call = call_of(name, layer.experts)
    leaves = [value for value in call if value.is_floating_point()]
    factors = {key: p for key, p in adapter.named_parameters() if "lora_" in key}

    weights = dict(layer.experts.named_parameters())
    CASES[name][1](weights, deltas(adapter, active))
    expected = functional_call(layer.experts, weights, call)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, [*leaves, *factors.values()], grad)

    result = adapter(*call)
    assert_same(result, expected, "output")
    assert not torch.allclose(result, layer.experts(*call)), "the adapter is without effect"
    found = torch.autograd.grad(result, [*leaves, *factors.values()], grad)
    for what, actual, other in zip([*("input", "weights")[: len(leaves)], *factors], found, wanted, strict=True):
        if name == "llama4" and what == "input":
            # Rows of zeros are left out. What they would get, the score of zero in front of them takes away.
            used = call[0].detach().any(-1)
            actual, other = actual[used], other[used]
        assert_same(actual, other, f"gradient of {what}", rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, BOTH])
@pytest.mark.parametrize("name", CASES)
def test_merging_is_exact_and_hits_the_adapted_experts(name: str, settings: dict[str, Any]) -> None:
    layer = first_layer(name)
    before = {key: value.clone() for key, value in layer.experts.named_parameters()}
    adapter = adapter_around(layer, ("default",), **settings)
    call = call_of(name, layer.experts)
    adapted = adapter(*call)
    weights = dict(before)
    CASES[name][1](weights, deltas(adapter, ("default",)))
    adapter.merge()
    for key, value in layer.experts.named_parameters():
        assert_same(value, weights[key], key)
    assert_same(adapter(*call), adapted, "merged output")
    adapter.unmerge()
    for key, value in layer.experts.named_parameters():
        assert torch.equal(value, before[key]), key


def test_longcats_experts_without_weights_count_for_none_and_pass_on_their_input() -> None:
    layer = first_layer("longcat_flash")
    assert layer.num_experts == 8 and layer.experts.gate_up_proj.shape[0] == 12
    adapter = adapter_around(layer, ("default",), **BOTH)
    x, _, weights = call_of("longcat_flash", layer.experts)
    ids = torch.full((TOKENS, TOP_K), 9)
    assert_same(adapter(x, ids, weights), x * weights.sum(1, keepdim=True), "output")


def test_a_class_of_the_same_shape_is_not_taken_for_one_of_them() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(4, 6, 5)), nn.Parameter(torch.ones(4, 5, 3))

    model = nn.ModuleDict({"experts": Experts()})
    with pytest.raises(ValueError, match="register_moe_family"):
        find_moe_layers(model)
