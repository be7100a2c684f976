"""Which implementation of the products is chosen."""

from __future__ import annotations

import pytest
import torch

from peft_sieve import SieveError
from peft_sieve.kernels.backend import BACKEND_VARIABLE, device_groups_usable


@pytest.mark.parametrize(
    ("dtype", "width", "usable"),
    [
        (torch.float32, 4, True),
        (torch.float32, 6, False),  # rows of 24 bytes
        (torch.bfloat16, 8, True),
        (torch.bfloat16, 4, False),
        (torch.float64, 8, False),
    ],
)
def test_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, usable: bool) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "device")
    stack = torch.rand(2, width, 16, dtype=dtype)
    assert device_groups_usable([stack]) == usable
    assert device_groups_usable([stack.transpose(1, 2)]) == usable
    assert not device_groups_usable([torch.rand(2, 8, 16), torch.rand(2, 6, 16)])
    shifted = torch.empty(2 * width * 16 + 1, dtype=dtype)[1:].view(2, width, 16)
    assert not device_groups_usable([shifted])
    monkeypatch.setenv(BACKEND_VARIABLE, "loop")
    assert not device_groups_usable([stack])


def test_the_cpu_loops_unless_told_otherwise() -> None:
    assert not device_groups_usable([torch.rand(2, 8, 16)])


def test_kernels_without_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "device")
    monkeypatch.setattr("peft_sieve.kernels.backend.find_spec", lambda name: None)
    with pytest.raises(SieveError, match="'device'.*pip install triton"):
        device_groups_usable([torch.rand(2, 8, 16)])


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    with pytest.raises(SieveError, match="PEFT_SIEVE_BACKEND must be one of 'auto', 'loop', 'device', got 'cuda'"):
        device_groups_usable([torch.rand(2, 8, 16)])
