"""Do the benchmarks compare what they say? Small models, a few seconds.

python benchmarks/check.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from looped_experts import with_looped_experts
from memory import StorageMeter
from methods import METHODS, Bench, always_active, trainable_counts
from settings import SETTINGS, build_base, tiny
from training import training_step


def check_methods(name: str) -> None:
    """All methods train the same outside the routed experts, and those on the same experts as many parameters there."""
    setting = replace(tiny(SETTINGS[name]), device="cpu", dtype=torch.float32)
    bench = Bench.of(setting, dropout=0.05)
    models = {method: bench.build(method) for method in METHODS}
    reference = always_active(models["floor"])
    linears = 4 + (3 if setting.shared else 0)  # of attention, and of a shared expert
    assert len(reference) == setting.layers * (linears * 3 + 2)  # each A, B and a dropout; router: A and B
    assert all(always_active(model) == reference for model in models.values())
    for ours, theirs in (("sieve_25", "module_list_25"), ("sieve_all", "module_list_all")):
        assert trainable_counts(models[ours]) == trainable_counts(models[theirs])
    own, shared = (trainable_counts(models[method])["trainable_experts"] for method in ("sieve_25", "shared_25"))
    assert 0.9 * own < shared <= own, f"shared factors have {shared} parameters, and the budget is {own}"
    floats = {id(p) for p in bench.base.parameters()}
    for method, model in models.items():
        shared = [p for n, p in model.named_parameters() if "lora_" not in n and id(p) in floats]
        experts = 0 if method.startswith("module_list") else 2 * setting.layers
        assert len(shared) == len(floats) - 2 * setting.layers + experts, "frozen weights are not shared"
    print(f"{name}: {len(models)} methods train the same {len(reference)} adapters outside the experts")


def check_same_model(name: str) -> None:
    """The list of modules computes what the stack does, and its gradients, and so does every method before training."""
    setting = replace(tiny(SETTINGS[name]), device="cpu", dtype=torch.float32)
    base, batch = build_base(setting)
    bench = Bench.of(setting, dropout=0.0)
    want = base(**batch).logits
    for method in METHODS:
        difference = (bench.build(method)(**batch).logits - want).abs().max().item()
        assert difference < 1e-5 * want.abs().max(), f"{method} differs from the base model by {difference}"
    block = base.base_model.layers[0].mlp
    x = torch.randn(33, setting.hidden)
    expected = _output_and_gradient(block, x)
    found = _output_and_gradient(with_looped_experts(base).base_model.layers[0].mlp, x)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.detach().abs().max()))
    print(f"{name}: every method starts as the base model, and the list of experts agrees with the stack")


def _output_and_gradient(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = block(x[None])
    return out, torch.autograd.grad(out.square().sum(), x)[0]


def check_meter() -> None:
    """Two exponentials: at its peak the backward holds the input, one output, and two gradients."""
    x = torch.randn(1000, 1000, requires_grad=True)
    size = x.nbytes
    meter = StorageMeter()
    meter.track([x])

    def step() -> None:
        x.exp().exp().sum().backward()

    with meter:
        step()
    assert 4 * size <= meter.peak <= 4 * size + 16, meter.peak / size
    assert 2 * size <= meter.live <= 2 * size + 16, meter.live / size
    assert "mul.Tensor" in meter.operations, "the backward was not seen"
    x.grad = None
    assert meter.live <= size + 16
    print(f"meter: peak {meter.peak / size:.2f} of 4 expected, then {meter.live / size:.2f} of 1")


def check_steps() -> None:
    """A step changes the adapters and nothing else, and frees what it took."""
    setting = replace(tiny(SETTINGS["cpu"]), device="cpu")
    bench = Bench.of(setting, dropout=0.05)
    for method in METHODS:
        model = bench.build(method)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        step, _ = training_step(model, bench.batch)
        step()
        step()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        # An expert that receives no token learns nothing.
        assert changed <= trained and len(changed) > len(trained) / 3, (method, len(changed), len(trained))
    print("steps: each method changes its adapters only")


if __name__ == "__main__":
    check_meter()
    for family in ("cpu", "cpu-shared-expert", "qwen3"):
        check_methods(family)
        check_same_model(family)
    check_steps()
