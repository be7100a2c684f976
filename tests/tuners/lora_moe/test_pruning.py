"""Which experts stay, and that parameters, router rows and optimizer states of the others are gone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import LoraMoeConfig, SieveError
from peft_sieve.tuners.lora_moe import pruning
from peft_sieve.tuners.lora_moe.cutting import replace_data
from peft_sieve.tuners.lora_moe.pruning import experts_to_keep
from tests.tuners.lora_moe.models import SMALL, adapted, dense_model, layers_of, optimizer_of, padded_batch

FACTORS = ("lora_A", "lora_B", "lora_router")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "two groups": lambda p: torch.optim.AdamW([{"params": p[::2], "lr": 1e-2}, {"params": p[1::2], "lr": 2e-2}]),
}


@pytest.mark.parametrize(
    ("tokens", "threshold", "kept"),
    [
        ([40, 10, 30, 20], 1.0, [0, 2]),
        ([40, 10, 30, 20], 0.8, [0, 2, 3]),
        ([40, 10, 30, 20], 0.4, [0, 1, 2, 3]),
        ([25, 25, 25, 25], 1.0, [0, 1, 2, 3]),
        ([97, 1, 1, 1], 1.0, [0, 1]),  # two stay, of equals the lower id
        ([97, 1, 0, 2], 1.0, [0, 3]),
        ([97, 1, 0, 2], 1e-9, [0, 1, 3]),  # one that got nothing is below any threshold
        ([0, 0, 0, 0], 1.0, [0, 1]),
    ],
)
def test_experts_to_keep(tokens: list[int], threshold: float, kept: list[int]) -> None:
    assert experts_to_keep(tokens, threshold) == kept


def step(model: nn.Module, optimizer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_parameters_and_states_are_the_rows_of_those_before(kind: str) -> None:
    model = adapted(prune_step=3, prune_threshold=1.1).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[kind](trained)
    batch = padded_batch(model)
    for s in (1, 2):
        step(model, optimizer, batch)
        assert not model.update_and_prune(s, optimizer)
    held = step(model, optimizer, batch)  # whose graph knows the old shapes
    before = copy.deepcopy(layers_of(model))
    states = {
        (path, name): copy.deepcopy(optimizer.state[getattr(layer, name)["default"].weight])
        for path, layer in layers_of(model).items()
        for name in FACTORS
    }
    counted = {path: layer.usage("default").tokens.tolist() for path, layer in before.items()}
    assert model.update_and_prune(3, optimizer)
    kept = model.peft_config["default"].kept_experts
    assert kept == {path: experts_to_keep(tokens, 1.1) for path, tokens in counted.items()}
    assert len({len(ids) for ids in kept.values()}) > 1, "a test of one size alone"
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in trained]
    for path, layer in layers_of(model).items():
        ids = kept[path]
        rows = [e * 2 + i for e in ids for i in range(2)]

        def left(name: str, tensor: torch.Tensor, ids: list[int] = ids, rows: list[int] = rows) -> torch.Tensor:
            if name == "lora_B":
                return tensor[:, rows]
            return tensor[rows if name == "lora_A" else ids]

        for name in FACTORS:
            weight = getattr(layer, name)["default"].weight
            assert weight.equal(left(name, getattr(before[path], name)["default"].weight)), (path, name)
            assert weight.untyped_storage().nbytes() == weight.nbytes, "memory of the removed ones"
            for key, value in optimizer.state[weight].items():
                old = states[path, name][key]
                if isinstance(old, torch.Tensor) and old.dim() == 2:
                    assert value.equal(left(name, old)) and value.any(), (path, name, key)
                else:
                    assert value == old
    assert held.isfinite()
    losses = [step(model, optimizer, batch).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    assert model.auxiliary_loss() == 0
    assert counted == {path: layer.usage("default").tokens.tolist() for path, layer in layers_of(model).items()}
    assert not model.update_and_prune(7, optimizer)


def test_goes_on_as_an_adapter_that_never_had_the_others(tmp_path: Path) -> None:
    """The same steps after pruning, whether the others were there once or not."""
    model = adapted(prune_step=2, prune_threshold=1.1).train()
    optimizer = optimizer_of(model)
    batch = padded_batch(model)
    for s in (1, 2):
        step(model, optimizer, batch)
        model.update_and_prune(s, optimizer)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(dense_model(), tmp_path, is_trainable=True).train()
    other = optimizer_of(fresh)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for s in (3, 4, 5):
        assert step(model, optimizer, batch).equal(step(fresh, other, batch))
        model.update_and_prune(s, optimizer)
    names = dict(fresh.named_parameters())
    assert all(p.equal(names[n]) for n, p in model.named_parameters())


def test_through_the_wrapper_of_accelerate() -> None:
    accelerator = Accelerator(cpu=True)
    model = adapted(prune_step=1, prune_threshold=1.1).train()
    wrapped, optimizer = accelerator.prepare(model, optimizer_of(model))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LinearLR(optimizer.optimizer))
    batch = padded_batch(model)
    for s in (1, 2):
        accelerator.backward(wrapped(**batch).loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        assert accelerator.unwrap_model(wrapped).update_and_prune(s, optimizer) is (s == 1)
        optimizer.zero_grad()
    for layer in layers_of(model).values():
        weight = layer.lora_B["default"].weight
        assert optimizer.optimizer.state[weight]["exp_avg"].shape == weight.shape
    assert {len(layer.plans["default"].experts) for layer in layers_of(model).values()} < {2, 3, 4}


def test_gradients_that_are_still_to_be_used_are_cut_too() -> None:
    model = adapted(prune_step=1, prune_threshold=1.1).train()
    optimizer = optimizer_of(model)
    model(**padded_batch(model)).loss.backward()
    before = {path: layer.lora_A["default"].weight.grad.clone() for path, layer in layers_of(model).items()}
    model.update_and_prune(1, optimizer)
    for path, layer in layers_of(model).items():
        rows = [e * 2 + i for e in layer.plans["default"].experts for i in range(2)]
        assert layer.lora_A["default"].weight.grad.equal(before[path][rows])
    optimizer.step()


def test_only_the_adapter_in_training_is_pruned() -> None:
    model = adapted(prune_step=1, prune_threshold=1.1).train()
    model.add_adapter("other", LoraMoeConfig(**SMALL, prune_step=1))
    optimizer = optimizer_of(model)
    step(model, optimizer, padded_batch(model))
    assert model.update_and_prune(1, optimizer)
    for layer in layers_of(model).values():
        assert layer.plans["other"].experts == (0, 1, 2, 3)
        assert not layer.usage("other").tokens.any()
    assert model.peft_config["other"].kept_experts is None


def test_the_configuration_that_was_passed_stays_as_it_was() -> None:
    """So that it can be used for another run."""
    config = LoraMoeConfig(**SMALL, prune_step=1)
    for _ in range(2):
        model = get_peft_model(dense_model(), config).train()
        assert all(len(layer.plans["default"].experts) == 4 for layer in layers_of(model).values())
        optimizer = optimizer_of(model)
        step(model, optimizer, padded_batch(model))
        assert model.update_and_prune(1, optimizer)
        assert model.peft_config["default"].kept_experts is not None
    assert config.kept_experts is None and config.target_modules is None


def test_share_of_all_steps() -> None:
    assert LoraMoeConfig(prune_ratio=0.1).pruning_step(200) == 20
    assert LoraMoeConfig(prune_ratio=0.1).pruning_step(3) == 1
    assert LoraMoeConfig(prune_step=7).pruning_step() == 7
    assert LoraMoeConfig(prune_ratio=None).pruning_step() is None
    model = adapted(prune_ratio=0.5, prune_threshold=1.1).train()
    optimizer = optimizer_of(model)
    step(model, optimizer, padded_batch(model))
    assert not model.update_and_prune(1, optimizer, total_steps=4)
    assert model.update_and_prune(2, optimizer, total_steps=4)


def _ready(**settings: Any) -> tuple[PeftModel, torch.optim.Optimizer]:
    model = adapted(**{"prune_step": 1, "prune_threshold": 1.1, **settings}).train()
    optimizer = optimizer_of(model)
    step(model, optimizer, padded_batch(model))
    return model, optimizer


def _several(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "rank_and_world", lambda: (0, 2))


def _uncounted(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in layers_of(model).values():
        layer.usage("default").tokens.zero_()


@pytest.mark.parametrize(
    ("prepare", "call", "text"),
    [
        (None, {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, "no model.layers.0"),
        (None, {"step": 1.5}, r"step .*1\.5"),
        (_several, {}, "2 processes"),
        (_uncounted, {}, "no token has been counted"),
    ],
)
def test_refused_before_anything_is_changed(
    prepare: Any, call: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = _ready()
    if prepare is not None:
        prepare(model, monkeypatch)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(SieveError, match=text):
        model.update_and_prune(**{"step": 1, "optimizer": optimizer, **call})
    assert all(p.equal(before[n]) for n, p in model.named_parameters())
    assert model.peft_config["default"].kept_experts is None


def test_an_optimizer_with_states_of_another_shape_is_refused() -> None:
    model = adapted(prune_step=1).train()
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step(model, optimizer, padded_batch(model))
    with pytest.raises(SieveError, match="Adafactor.*'row_var' for model.layers.0.* another shape"):
        model.update_and_prune(1, optimizer)


def test_a_share_of_unknown_many_steps_is_refused() -> None:
    model, optimizer = _ready(prune_step=None)
    with pytest.raises(SieveError, match="prune_ratio is 0.1.*training steps is not known.*prune_step"):
        model.update_and_prune(1, optimizer)


def test_new_data_of_another_shape_takes_gradients_though_an_old_graph_lives() -> None:
    parameter = nn.Parameter(torch.randn(6, 3))
    held = (parameter * 2).sum()
    held.backward()
    replace_data(parameter, torch.randn(4, 3))
    (parameter * 3).sum().backward()
    assert parameter.grad.equal(torch.full((4, 3), 3.0)) and held.isfinite()


@pytest.mark.parametrize("fused", [False, True])
def test_weights_from_before_pruning_come_back_while_the_optimizer_goes_on(fused: bool, tmp_path: Path) -> None:
    """Its states of the pruned shapes do not fit any more; a fused optimizer would read beyond them."""
    model = adapted(prune_step=2).train()
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
    for number in (1, 2, 3):
        step(model, optimizer, padded_batch(model))
        model.update_and_prune(number, optimizer)
    with pytest.warns(UserWarning, match="optimizer begins anew"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert all(len(layer.plans["default"].experts) == 4 for layer in layers_of(model).values())
    step(model.train(), optimizer, padded_batch(model))
    for parameter, kept in optimizer.state.items():
        assert kept["exp_avg"].shape == parameter.shape and bool(torch.isfinite(parameter).all())


def test_states_of_other_experts_are_not_taken_for_those_of_loaded_ones(tmp_path: Path) -> None:
    """Also where there are as many, so that every shape fits."""
    model = adapted(kept_experts={path: [0, 1] for path in layers_of(adapted())}).train()
    model.save_pretrained(tmp_path)
    other = adapted(kept_experts={path: [2, 3] for path in layers_of(adapted())}).train()
    optimizer = optimizer_of(other)
    step(other, optimizer, padded_batch(other))
    trained = [p for p in other.parameters() if p.requires_grad]
    assert all(optimizer.state[p] for p in trained)
    with pytest.warns(UserWarning, match="optimizer begins anew"):
        other.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert all(layer.plans["default"].experts == (0, 1) for layer in layers_of(other).values())
    assert not any(optimizer.state.get(p) for p in trained)
    # Of the same experts they are kept, as in PEFT.
    step(other.train(), optimizer, padded_batch(other))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert all(optimizer.state[p] for p in trained)
