"""Replayed activations against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_sieve.kernels.activation import replay, replay_silu_gate
from peft_sieve.moe.families.gates import activation_of
from peft_sieve.moe.families.registry import family_of
from tests.models import tiny_model
from tests.reference import assert_same


def experts_of(architecture: str) -> nn.Module:
    return next(m for m in tiny_model(architecture).modules() if family_of(m) is not None)


@pytest.mark.parametrize("architecture", ["olmoe", "gpt_oss", "nemotron_h"])
def test_replay_is_the_activation_and_its_gradient(architecture: str) -> None:
    function, replayed = activation_of(experts_of(architecture))
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    expected = function(x)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(grad)
    result, backward = replayed(x.detach())
    assert torch.equal(result, expected)
    assert_same(backward(grad), x.grad, "gradient", rtol=1e-12, atol=1e-13)


def test_the_closed_form_is_taken_for_the_default_gate_with_silu_only() -> None:
    assert activation_of(experts_of("olmoe"))[1] is replay_silu_gate
    for architecture in ("gpt_oss", "nemotron_h"):
        assert activation_of(experts_of(architecture))[1] is not replay_silu_gate
    other = experts_of("olmoe")
    other.act_fn = nn.GELU()
    assert activation_of(other)[1] is not replay_silu_gate


def test_replay_leaves_nothing_to_train_behind() -> None:
    x = torch.randn(3, 4)
    result, backward = replay(torch.tanh, x)
    assert not result.requires_grad
    assert not x.requires_grad
    assert_same(backward(torch.ones(3, 4)), 1 - torch.tanh(x) ** 2, "gradient", rtol=1e-5, atol=1e-6)
