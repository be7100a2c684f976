"""EPnG in a plain loop: what is counted, when ranks move, what it costs, and that a resumed run goes on as it would."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import EpngConfig, SieveError, SieveLoraConfig
from peft_sieve.tuners.epng.update import epng_layers
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, tiny_model, token_batch

MODELS: dict[str, Callable[[], nn.Module]] = {
    "olmoe": lambda: tiny_model("olmoe"),
    "gpt_oss": lambda: tiny_model("gpt_oss"),
    "deepseek_v3": lambda: tiny_model("deepseek_v3"),
    "module list": deepseek_like,
}


def config(**settings: Any) -> EpngConfig:
    given = {"r": 4, "lora_alpha": 8, "warmup_steps": 2, "update_interval": 2, "prune_ratio": 0.25, "grow_ratio": 0.25}
    return EpngConfig(**{**given, "task_type": "CAUSAL_LM", **settings})


def adapted(name: str = "olmoe", **settings: Any) -> PeftModel:
    model = get_peft_model(MODELS[name](), config(**settings))
    randomize_adapters(model)
    return model.train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)


def train(model: PeftModel, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last + 1):
        torch.manual_seed(step)
        batch = token_batch(model, seed=step)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapter_numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_ranks_move_at_a_fixed_budget(name: str) -> None:
    model = adapted(name)
    budget = adapter_numbers(model)
    optimizer = optimizer_of(model)
    losses = train(model, optimizer, 1, 7)
    assert all(torch.isfinite(torch.tensor(losses)))
    ledger = model.ledger()
    assert [entry.step for entry in ledger] == [2, 4, 6]
    in_experts = sum(p.numel() for layer in epng_layers(model).values() for p in layer.parameters() if p.requires_grad)
    assert [(entry.parameters, entry.budget) for entry in ledger] == [(in_experts, in_experts)] * 3
    assert adapter_numbers(model) == budget
    for path, layer in epng_layers(model).items():
        blocks = layer.slots_module("default").blocks
        assert blocks.sum() == 8 * 4
        # 8 experts, less a quarter each time: 6, 4 (the half of 4.5 goes to the even), 3.
        assert [len(entry.pruned[path]) for entry in ledger] == [2, 2, 1]
        assert (blocks > 0).sum() == 3
        assert model.peft_config["default"].selected_experts[path] == blocks.nonzero().squeeze(1).tolist()
        assert model.peft_config["default"].expert_blocks[path] == blocks[blocks > 0].tolist()
        assert ledger[-1].grown[path].items() <= dict(enumerate(blocks.tolist())).items()


def test_the_least_important_go() -> None:
    """By a count of its own: what the router sent, each pair by its weight, decayed by step."""
    model = adapted(decay=0.5, warmup_steps=3, train_router=False)
    importance = {path: torch.zeros(8, dtype=torch.float64) for path in epng_layers(model)}
    handles = []
    for path, layer in epng_layers(model).items():

        def add(module: nn.Module, args: Any, path: str = path) -> None:
            for ids, weights in zip(args[1].tolist(), args[2].tolist(), strict=True):
                for expert, weight in zip(ids, weights, strict=True):
                    importance[path][expert] += weight

        handles.append(layer.register_forward_pre_hook(add))
    optimizer = optimizer_of(model)
    for step in (1, 2, 3):
        for value in importance.values():
            value.mul_(0.5)
        train(model, optimizer, step, step)
    for path, layer in epng_layers(model).items():
        order = importance[path].argsort().tolist()
        entry = model.ledger()[0]
        assert sorted(entry.pruned[path]) == sorted(order[:2])
        assert sorted(entry.grown[path]) == sorted(order[-2:])
        assert torch.allclose(layer.slots_module("default").importance, importance[path])
        assert importance[path].min() < importance[path].max()


def test_padding_does_not_count() -> None:
    importance = []
    for padded in (False, True):
        model = adapted(lora_dropout=0.0)
        batch = token_batch(model, batch=2, length=6)
        if padded:
            batch = {
                "input_ids": torch.cat((batch["input_ids"], torch.full((2, 5), 7)), dim=1),
                "attention_mask": torch.cat((batch["attention_mask"], torch.zeros(2, 5, dtype=torch.int64)), dim=1),
            }
        model(**batch)
        model.update_and_allocate(1)
        importance.append([layer.slots_module("default").importance for layer in epng_layers(model).values()])
    assert all(torch.allclose(a, b) and a.any() for a, b in zip(*importance, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_computes_again_does_not_count_again(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = train(model, optimizer_of(model), 1, 3)
        found.append((losses, [layer.saved_state("default") for layer in epng_layers(model).values()]))
    (plain, states), (checkpointed, states_again) = found
    assert plain == checkpointed
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(states, states_again, strict=True))


def test_only_forwards_of_training_count() -> None:
    model = adapted()
    batch = token_batch(model)
    with torch.no_grad():
        model(**batch)
        with model.disable_adapter():
            model(**batch)
    with model.disable_adapter():  # with gradients, as a careless reference model
        model(**batch)
    model.eval()(**batch)
    model.train()
    assert [layer.take_mass() for layer in epng_layers(model).values()] == [None, None]
    model(**batch)
    assert all(layer.take_mass().sum() > 0 for layer in epng_layers(model).values())


def test_a_loss_that_calls_the_backbone_alone_counts() -> None:
    model = adapted()
    model.get_base_model().model(**token_batch(model))
    assert all(layer.take_mass().sum() > 0 for layer in epng_layers(model).values())


def test_counting_goes_on_after_a_forward_that_failed() -> None:
    model = adapted()
    with pytest.raises(Exception, match="."):
        model(input_ids=torch.full((1, 3), 10**6))
    for layer in epng_layers(model).values():
        layer.take_mass()
    train(model, optimizer_of(model), 1, 2)
    assert len(model.ledger()) == 1


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 4], ids=["before an update", "after one", "right after two"])
def test_a_resumed_run_goes_on_to_the_bit(stop: int, tmp_path: Path) -> None:
    """Into the adapter that a new run begins with, as the Trainer does, and into one that is made from the files."""
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1, stop)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, stop + 1, 8)
    begun = adapted()
    begun.load_adapter(str(tmp_path), "default", is_trainable=True)
    made = PeftModel.from_pretrained(MODELS["olmoe"](), tmp_path, is_trainable=True).train()
    for resumed in (begun, made):
        again = optimizer_of(resumed)
        again.load_state_dict(copy.deepcopy(state))
        assert train(resumed, again, stop + 1, 8) == expected
        assert resumed.ledger() == model.ledger()
        assert all(
            torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), model.state_dict().values(), strict=True)
        )
        saved = resumed.peft_config["default"]
        for name in ("selected_experts", "expert_blocks", "ledger"):
            assert getattr(saved, name) == getattr(model.peft_config["default"], name)


def test_the_optimizer_may_be_there_before_the_checkpoint_is_loaded(tmp_path: Path) -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1, 3)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, 4, 6)
    resumed = adapted()
    again = optimizer_of(resumed)
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    again.load_state_dict(state)
    assert train(resumed, again, 4, 6) == expected


def test_an_earlier_checkpoint_can_be_loaded_back(tmp_path: Path) -> None:
    """As a trainer does with the best one at the end."""
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1, 3)
    batch = token_batch(model)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    train(model.train(), optimizer, 4, 7)
    model.load_adapter(str(tmp_path), "default")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, expected)
    assert [entry.step for entry in model.ledger()] == [2]


def test_a_checkpoint_of_other_first_experts_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = "model.layers.0.mlp.experts"
    model = adapted(selected_experts={path: [0, 1, 2, 3]})
    train(model, optimizer_of(model), 1, 2)
    model.save_pretrained(tmp_path)
    other = adapted(selected_experts={path: [0, 1, 2, 7]})
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(SieveError, match=rf"{path}.*adapter 'default' .*\[0, 1, 2, 7\]"):
        other.load_adapter(str(tmp_path), "default")
    after = other.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert other.peft_config["default"].selected_experts == {path: [0, 1, 2, 7]}


# --- what is refused ------------------------------------------------------------------------------------------------


def test_an_update_without_counted_routing_is_refused() -> None:
    with pytest.raises(SieveError, match="step 2.*no routing was counted"):
        adapted().update_and_allocate(2)


def test_a_model_without_an_adapter_in_training_is_refused() -> None:
    model = adapted()
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(SieveError, match="no EPnG adapter in training"):
        model.update_and_allocate(1)


def test_a_merged_adapter_is_refused() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(SieveError, match="[Cc]all unmerge_adapter first"):
        model.update_and_allocate(1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"rank_block": 3},
            r"(?=.*\brank_block\b)(?=.*\b3\b)(?=.*\b4\b)",
        ),
        ({"rank_block": 0}, r"rank_block\b.*whole number.*\b0\b|rank_block is 0\b"),
        ({"warmup_steps": -1}, r"warmup_steps\b.* -1\b"),
        ({"update_interval": 1.5}, r"update_interval\b.* 1\.5\b"),
        ({"update_until": True}, r"update_until\b.*True"),
        ({"prune_ratio": 1.0}, r"prune_ratio\b.*\b1\.0\b"),
        ({"grow_ratio": 0}, r"grow_ratio\b.*\b0\b"),
        ({"keep_ratio": "all"}, r"keep_ratio\b.*'all'"),
        ({"decay": 1.1}, r"decay\b.*\b1\.1\b"),
        ({"max_rank": 2}, r"max_rank\b.*\b[24]\b.*\b[24]\b"),
        ({"selected_experts": {"a": [1, 2]}, "expert_blocks": {"a": [4]}}, r"expert_blocks\['a'\].*\b2 experts"),
        ({"selected_experts": {"a": [1]}, "expert_blocks": {"a": [0]}}, r"expert_blocks\['a'\].*positive whole number"),
        ({"selected_experts": {"a": [1]}, "ledger": {"a": [[1, 2]]}}, r"ledger\['a'\].*list"),
        ({"expert_blocks": [1]}, "expert_blocks.*mapping"),
        ({"expert_tuning": "full"}, "expert_tuning\\b.*'full'"),
        ({"hellori_density": 0.1}, r"hellori_density\b.*\b0\.1\b"),
        ({"cold_experts": "shared"}, r"cold_experts\b.*'frozen' for EPnG.*'shared'"),
        ({"share_outer": True}, r"share_outer\b.*False for EPnG.*True"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(SieveError, match=text):
        config(**settings)


def test_ranks_that_are_not_in_whole_blocks_are_refused_before_anything_changes() -> None:
    base = tiny_model("olmoe")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(SieveError, match=r"rank_pattern .*up_proj of .*\b6\b.*multiple of 4"):
        get_peft_model(base, config(rank_pattern={"up_proj": 6}))
    assert [name for name, _ in base.named_modules()] == names


def test_the_two_methods_do_not_mix_in_a_model() -> None:
    path = "model.layers.0.mlp.experts"
    base = tiny_model("olmoe")
    base.add_adapter(SieveLoraConfig(selected_experts={path: [1]}, r=2), "sieve")
    other = tiny_model("olmoe")
    other.add_adapter(config(), "epng")
    for model, second in ((base, config()), (other, SieveLoraConfig(selected_experts={path: [1]}, r=2))):
        names = [name for name, _ in model.named_parameters()]
        with pytest.raises(SieveError, match="adapters? of another method"):
            model.add_adapter(second, "second")
        assert [name for name, _ in model.named_parameters()] == names


def test_the_schedule() -> None:
    def steps(**settings: Any) -> list[int]:
        return [step for step in range(21) if config(**settings).is_update(step)]

    assert steps(warmup_steps=5, update_interval=6) == [5, 11, 17]
    assert steps(warmup_steps=5, update_interval=6, update_until=11) == [5, 11]
    assert steps(warmup_steps=0, update_interval=10) == [0, 10, 20]


def test_states_follow_before_the_first_step_of_an_optimizer_that_is_passed() -> None:
    """Its states were loaded, and a gradient scaler has skipped the step."""
    first, second = adapted(), adapted()
    optimizer = optimizer_of(first)
    train(first, optimizer, 1, 1)
    second.load_state_dict(first.state_dict())
    other = optimizer_of(second)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, own in ((first, optimizer), (second, other)):
        batch = token_batch(model, seed=2)
        model(**batch)
        model.update_and_allocate(2, own)
    factors = [p for name, p in first.named_parameters() if ".experts.lora_" in name]
    others = [p for name, p in second.named_parameters() if ".experts.lora_" in name]
    assert first.ledger() and len(factors) == len(others) > 0
    for one, two in zip(factors, others, strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"])


@pytest.mark.parametrize("step", [None, "1", -1, 1.5, True])
def test_a_step_that_is_none_is_refused(step: Any) -> None:
    model = adapted()
    with pytest.raises(SieveError, match=r"^step\b.*" + re.escape(repr(step))):
        model.update_and_allocate(step)
