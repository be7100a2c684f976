"""Gradient checkpointing counts once, and the balance loss reaches whoever makes the loss."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from peft_sieve import SieveError
from tests.tuners.lora_moe.models import adapted, layers_of, optimizer_of, padded_batch


def _step(base: str, checkpointing: bool | None, **settings: Any) -> tuple[nn.Module, int]:
    """Losses of two forwards and one backward, with dropout; how often the layers ran."""
    model = adapted(base, lora_dropout=0.2, balance_loss_coef=0.5, **settings).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    calls: list[int] = []
    for layer in layers_of(model).values():
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    # Of two lengths: what is computed again belongs to the first, when the second was the last to be seen.
    first, second = padded_batch(model, length=12), padded_batch(model, length=9)
    (model(**first).loss + model(**second).loss).backward()
    return model, len(calls)


@pytest.mark.parametrize("base", ["dense", "qwen2_moe"])
def test_checkpointing_changes_neither_counts_nor_gradients(base: str) -> None:
    (plain, once), (checkpointed, twice) = _step(base, None), _step(base, False)
    assert twice == 2 * once, "nothing was computed again"
    for (path, layer), other in zip(layers_of(plain).items(), layers_of(checkpointed).values(), strict=True):
        tokens = layer.usage("default").tokens
        assert tokens.sum() == 2 * (33 + 24) and tokens.equal(other.usage("default").tokens), path
        for name in ("lora_A", "lora_B", "lora_router"):
            gradient = getattr(layer, name)["default"].weight.grad
            assert gradient.any() and gradient.equal(getattr(other, name)["default"].weight.grad), (path, name)


def test_reentrant_checkpointing_would_lose_the_balance_loss() -> None:
    with pytest.raises(SieveError, match="[Rr]outers of .* without gradients.*use_reentrant"):
        _step("dense", True)
    model = adapted(balance_loss_coef=0).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model(**padded_batch(model)).loss.backward()
    layer = next(iter(layers_of(model).values()))
    assert layer.usage("default").tokens.sum() == 66 and layer.lora_router["default"].weight.grad.any()


def test_losses_made_outside_are_told_where_the_balance_loss_is() -> None:
    model = adapted().train()
    ids = padded_batch(model)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            (model(input_ids=ids).logits.square().mean() + model.auxiliary_loss()).backward()
    model(input_ids=ids)
    with pytest.warns(UserWarning, match=r"balance loss .*not used.*auxiliary_loss\(\)"):
        model(input_ids=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids)  # said once


def test_what_does_not_learn_is_not_counted() -> None:
    model = adapted().train()
    batch = padded_batch(model)
    with torch.no_grad():
        model(**batch)
    with model.disable_adapter():
        model(**batch)
    model.eval()(**batch)
    assert not any(layer.usage("default").tokens.any() for layer in layers_of(model).values())
    assert model.auxiliary_loss() == 0


def test_an_exception_in_the_forward_leaves_nothing_behind() -> None:
    model = adapted().train()
    batch = padded_batch(model)
    layer = layers_of(model)["model.layers.1.self_attn.q_proj"]
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    model(**batch)
    assert layers_of(model)["model.layers.0.self_attn.q_proj"].usage("default").tokens.sum() == 66
    assert not layer.balance.running


def test_the_backbone_alone_is_counted_too() -> None:
    model = adapted().train()
    batch = padded_batch(model)
    del batch["labels"]
    hidden = model.get_base_model().model(**batch).last_hidden_state
    (hidden.square().mean() + model.auxiliary_loss()).backward()
    assert all(layer.usage("default").tokens.sum() == 66 for layer in layers_of(model).values())


def test_the_balance_loss_spreads_the_tokens() -> None:
    """Trained on it alone, a skewed router comes to use all experts."""
    target = ["model.layers.0.self_attn.v_proj"]
    model = adapted(std=0.5, top_k=1, target_modules=target, balance_loss_coef=1.0).train()
    (layer,) = layers_of(model).values()
    # One expert is everybody's favourite.
    optimizer = optimizer_of(model, lr=0.1)
    batch = padded_batch(model, batch=8)
    inputs: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    model(**batch)
    with torch.no_grad():
        layer.lora_router["default"].weight[2] += 20 * inputs[0].flatten(0, 1).mean(0)
    losses = []
    for _ in range(60):
        model(**batch)
        loss = model.auxiliary_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1.9 and losses[-1] < 1.2
