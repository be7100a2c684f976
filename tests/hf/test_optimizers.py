"""PEFT's own optimizers know which factor is which, or refuse."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import peft.optimizers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveError, SieveLoraConfig
from peft_sieve.hf import optimizers
from peft_sieve.hf.patches import wrap_peft
from tests.hf.saver import MASK, METHODS
from tests.hf.toy_method import ToyConfig
from tests.models import tiny_model, token_batch

CONFIGS: dict[str, Callable[[], Any]] = {
    "sieve": lambda: SieveLoraConfig(r=2, selected_experts=MASK),
    "sieve, embeddings and heads": lambda: SieveLoraConfig(
        r=2, selected_experts=MASK, target_modules=["embed_tokens", "lm_head", "o_proj"], modules_to_save=["norm"]
    ),
    "hellori": lambda: SieveLoraConfig(r=2, selected_experts=MASK, hellori_density=0.5),
    "esft": lambda: SieveLoraConfig(r=2, selected_experts=MASK, expert_tuning="full"),
    "epng": lambda: EpngConfig(r=2, selected_experts=MASK),
    "perft R": lambda: PerftConfig(r=2),
    "perft R bottleneck": lambda: PerftConfig(r=2, form="bottleneck"),
    "perft E": lambda: PerftConfig(r=2, variant="E", selected_experts=MASK),
    "perft S bottleneck": lambda: PerftConfig(r=2, variant="S", form="bottleneck"),
    "lora_moe": lambda: LoraMoeConfig(r=2, num_experts=3),
}
LR, RATIO = 1e-3, 16.0


def test_every_method_is_here() -> None:
    given = {type(make()) for make in CONFIGS.values()} | {ToyConfig}
    assert given == {type(make()) for make, _ in METHODS.values()}


@pytest.mark.parametrize("name", CONFIGS)
def test_loraplus_trains_every_b_faster(name: str) -> None:
    """B is what an adapter begins with at zero, the difference of a fully tuned expert left out."""
    model = get_peft_model(tiny_model("olmoe"), CONFIGS[name]())
    optimizer = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO, loraplus_lr_embedding=1e-5, loraplus_weight_decay=0.1
    )
    found = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(trained.values())
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    faster = 0
    for n, parameter in trained.items():
        if "lora_embedding_" in n:
            expected = (1e-5, 0.1)
        elif parameter.dim() == 1:  # of a norm
            expected = (LR * RATIO, 0.1)
        else:
            is_b = not parameter.any() and "_delta" not in n
            faster += is_b
            expected = (LR * RATIO, 0.1) if is_b else (LR, 0.1)
        assert found[parameter] == expected, n
    assert faster

    model.train()
    before = {n: p.detach().clone() for n, p in trained.items()}
    model(**token_batch(model), labels=token_batch(model)["input_ids"]).loss.backward()
    optimizer.step()
    for n, parameter in trained.items():
        if parameter.grad is not None:
            rate, decay = found[parameter]
            step = rate * (parameter.grad + decay * before[n])
            assert torch.allclose(parameter, before[n] - step, atol=1e-7), n


@pytest.mark.parametrize("name", CONFIGS)
def test_others_are_refused(name: str) -> None:
    """They pair factors that are not matrices, or leave them out."""
    model = get_peft_model(tiny_model("olmoe"), CONFIGS[name]())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(SieveError, match="LoRA-FA .* is not supported"):
        create_lorafa_optimizer(model=model, r=2, lora_alpha=64, lr=LR)
    with pytest.raises(SieveError, match="Riemannian .* is not supported"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=LR)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained


def test_plain_lora_is_as_it_was() -> None:
    model = get_peft_model(tiny_model("olmoe"), LoraConfig(r=2, target_modules=["q_proj"]))
    plus = create_loraplus_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)
    assert [len(group["params"]) for group in plus.param_groups] == [2, 0, 2, 0]
    assert len(create_riemannian_optimizer(model, torch.optim.SGD, lr=LR).param_groups[0]["params"]) == 4
    create_lorafa_optimizer(model=model, r=2, lora_alpha=8, lr=LR)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)


def test_functions_that_were_imported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script may import PEFT's functions before this package: they are the same objects after it."""

    def create(model: Any, lr: float = 1.0, *, ratio: float = 2.0) -> str:
        return f"{model} {lr} {ratio}"

    stand_in = ModuleType("optimizers")
    for name in ("create_loraplus_optimizer", "create_lorafa_optimizer"):
        monkeypatch.setattr(stand_in, name, getattr(peft.optimizers, name), raising=False)
    earlier = stand_in.create_lorafa_optimizer = create
    monkeypatch.setattr(peft, "optimizers", stand_in)
    for _ in range(2):
        optimizers.wrap_optimizers()
        assert earlier("a base", 3.0, ratio=4.0) == "a base 3.0 4.0" and earlier("a base") == "a base 1.0 2.0"
        with pytest.raises(SieveError, match="LoRA-FA"):
            earlier(get_peft_model(tiny_model("olmoe"), CONFIGS["lora_moe"]()))
    monkeypatch.undo()
    wrap_peft()
