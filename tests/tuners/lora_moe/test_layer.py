"""The packed layer against one expert and token at a time: outputs, gradients, counts and the balance loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sieve import LoraMoeConfig
from tests.models import randomize_adapters, tiny_model
from tests.reference import assert_same
from tests.tuners.lora_moe.models import adapted, dense_model, layers_of, naive_balance, naive_delta, padded_batch


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 1}, {"top_k": 2}, {"top_k": 5}, {"top_k": 4, "kept_experts": {"0": [1, 3, 4]}}],
    ids=["one", "two", "all", "fewer kept than top_k"],
)
def test_as_one_expert_and_token_at_a_time(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10)).double()
    config = LoraMoeConfig(num_experts=5, r=3, lora_alpha=6, lora_dropout=0.0, target_modules=["0"], **settings)
    model = get_peft_model(base, config)
    randomize_adapters(model, std=0.5)
    layer = layers_of(model)["0"]
    kept = 3 if "kept_experts" in settings else 5
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 7, 10, dtype=torch.float64)
    parameters = {n: getattr(layer, n)["default"].weight for n in ("lora_A", "lora_B", "lora_router")}
    assert [tuple(p.shape) for p in parameters.values()] == [(3 * kept, 12), (10, 3 * kept), (kept, 12)]

    actual = model(x)
    gradients = torch.autograd.grad((actual * weights).sum(), [x, *parameters.values()])

    a = parameters["lora_A"].reshape(kept, 3, 12)
    b = torch.stack([parameters["lora_B"][:, 3 * e : 3 * e + 3] for e in range(kept)])
    delta = naive_delta(a, b, parameters["lora_router"], x.reshape(14, 12), min(settings["top_k"], kept), 6 / 3)
    plain = layer.get_base_layer()
    expected = (x.reshape(14, 12) @ plain.weight.T + plain.bias + delta).reshape(2, 7, 10)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *parameters.values()], allow_unused=True)
    assert_same(actual, expected, "output")
    for name, gradient, want in zip(["x", *parameters], gradients, wanted, strict=True):
        if settings["top_k"] == 1 and name == "lora_router":
            assert gradient.abs().max() < 1e-12  # a softmax over one
            continue
        assert_same(gradient, want, name)


@pytest.mark.parametrize("top_k", [1, 3])
def test_balance_loss_and_counts_of_real_tokens(top_k: int) -> None:
    """One layer, so that its router is all that the loss depends on."""
    target = "model.layers.1.self_attn.o_proj"
    model = adapted(
        dense_model(torch.float64), std=0.5, top_k=top_k, target_modules=[target], balance_loss_coef=0.25
    ).train()
    (layer,) = layers_of(model).values()
    inputs: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    batch = padded_batch(model)
    out = model(**batch)
    router = layer.lora_router["default"].weight
    real = batch["attention_mask"].flatten().bool().tolist()
    expected, counts = naive_balance(router, inputs[0].flatten(0, 1), real, top_k)
    assert layer.usage("default").tokens.tolist() == counts
    assert sum(counts) == 33 * top_k
    actual = model.auxiliary_loss()
    assert_same(actual, 0.25 * expected, "balance loss")
    (gradient,) = torch.autograd.grad(actual, router, retain_graph=True)
    assert_same(gradient, torch.autograd.grad(0.25 * expected, router)[0], "router")
    with torch.no_grad():
        plain = model.eval()(**batch).loss
    assert_same(out.loss, plain + actual, "loss of the model")
    assert layer.usage("default").tokens.tolist() == counts  # not in evaluation


def test_the_loss_is_the_mean_over_layers_and_reaches_every_router() -> None:
    model = adapted("qwen2_moe", balance_loss_coef=0.5).train()
    model(**padded_batch(model))
    layers = layers_of(model)
    assert len(layers) == 2 * (4 + 3)
    alone = []
    for path, layer in layers.items():
        single = adapted(tiny_model("qwen2_moe"), balance_loss_coef=0.5, target_modules=list(layers)).train()
        for other, o in layers_of(single).items():
            o.plans["default"] = o.plans["default"].__class__(**{**vars(o.plans["default"]), "pruned": other != path})
        single(**padded_batch(single))
        alone.append(single.auxiliary_loss())
        assert layer.usage("default").tokens.sum() == 33 * 2
    assert_same(model.auxiliary_loss(), sum(alone) / len(alone), "mean", rtol=1e-5)
    model.auxiliary_loss().backward()
    assert all(layer.lora_router["default"].weight.grad.abs().max() > 0 for layer in layers.values())


def test_a_tuple_has_the_loss_in_front() -> None:
    model = adapted().train()
    batch = padded_batch(model)
    want = model(**batch).loss
    loss, logits = model(**batch, return_dict=False)[:2]
    assert loss.equal(want) and logits.shape[:2] == (3, 12)
    assert model(input_ids=batch["input_ids"], return_dict=False)[0].shape == logits.shape


@pytest.mark.parametrize("float32_adapter", [True, False])
def test_bfloat16(float32_adapter: bool) -> None:
    config = LoraMoeConfig(num_experts=4, r=2, lora_dropout=0.0, task_type="CAUSAL_LM")
    exact = adapted(dense_model(), std=0.05, r=2, lora_alpha=16)
    model = get_peft_model(dense_model(torch.bfloat16), config, autocast_adapter_dtype=float32_adapter).train()
    randomize_adapters(model, std=0.05)
    layer = next(iter(layers_of(model).values()))
    assert layer.lora_A["default"].weight.dtype == (torch.float32 if float32_adapter else torch.bfloat16)
    batch = padded_batch(model)
    out = model(**batch)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    want = exact(**batch).logits
    assert (out.logits.float() - want).abs().max() < 0.1 * want.abs().max()


def test_autocast_leaves_the_balance_loss_in_float32() -> None:
    model = adapted().train()
    batch = padded_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    assert model.auxiliary_loss().dtype == torch.float32
    out.loss.backward()
    assert torch.isfinite(next(iter(layers_of(model).values())).lora_router["default"].weight.grad).all()


def test_dropout_spares_the_router() -> None:
    model = adapted(lora_dropout=0.9, target_modules=["model.layers.0.self_attn.q_proj"]).train()
    (layer,) = layers_of(model).values()
    batch = padded_batch(model)
    outputs = [model(**batch).logits for _ in range(2)]
    assert not outputs[0].equal(outputs[1])
    counts = layer.usage("default").tokens.clone()
    model(**batch)
    assert (2 * layer.usage("default").tokens).equal(3 * counts)
