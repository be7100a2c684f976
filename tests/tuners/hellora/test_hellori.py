"""HELLoRI: A frozen, a fixed random share of B trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from trl import SFTConfig, SFTTrainer

from peft_sieve import RoutingProfile, SieveError, SieveLoraConfig, hellora_config
from peft_sieve.tuners.common.experts.hellori import random_share
from peft_sieve.tuners.common.experts.layer import expert_layers
from tests.models import randomize_adapters, small_olmoe, small_tokenizer, tiny_model, token_batch
from tests.reference import NaiveAdapter, assert_same, naive_experts
from tests.training.runs import settings

EXPERTS = "model.layers.0.mlp.experts"
MASK = {EXPERTS: [1, 4, 6], "model.layers.1.mlp.experts": [0]}


def config(**options: Any) -> SieveLoraConfig:
    fixed = {"selected_experts": MASK, "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    fixed |= {"train_attention": False, "train_router": False, "hellori_density": 0.1}
    return SieveLoraConfig(**{**fixed, **options})


def factors(model: nn.Module, side: str) -> dict[str, Any]:
    return {
        f"{path}.{name}": getattr(layer, f"{name}_{side}")["default"]
        for path, layer in expert_layers(model)
        for name in ("lora_gate_up", "lora_down")
    }


def test_the_share_is_exact_and_depends_on_the_expert_alone() -> None:
    both = random_share([2, 5], (8, 30), 0.1, seed=0, name="layer")
    assert both.shape == (2, 8, 30) and both.sum((1, 2)).tolist() == [24, 24]
    assert not torch.equal(both[0], both[1])
    assert torch.equal(random_share([5], (8, 30), 0.1, seed=0, name="layer")[0], both[1])
    for other in ({"seed": 1, "name": "layer"}, {"seed": 0, "name": "other"}):
        assert not torch.equal(random_share([5], (8, 30), 0.1, **other)[0], both[1])
    # On every machine: the file of an adapter does not hold it.
    assert random_share([5], (2, 5), 0.3, seed=7, name="x").nonzero().tolist() == [[0, 0, 0], [0, 1, 2], [0, 1, 4]]


@pytest.mark.parametrize("cold_experts", ["frozen", "shared"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_forward_and_gradients_are_those_of_the_masked_factors(implementation: str, cold_experts: str) -> None:
    model = tiny_model("olmoe", torch.float64)
    model.set_experts_implementation(implementation)
    base = copy.deepcopy(model.model.layers[0].mlp.experts)
    peft_model = get_peft_model(model, config(cold_experts=cold_experts), autocast_adapter_dtype=False)
    randomize_adapters(peft_model)
    layer = dict(expert_layers(peft_model))[EXPERTS]
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(20, 32, dtype=torch.float64, generator=generator)
    ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(20)])
    weights = torch.rand(20, 3, dtype=torch.float64, generator=generator)

    kept = {name: module.kept for name, module in factors(peft_model, "B").items()}
    up_b = layer.lora_gate_up_B["default"].weight.detach().clone().requires_grad_()
    down_b = layer.lora_down_B["default"].weight.detach().clone().requires_grad_()
    masked = up_b * kept[f"{EXPERTS}.lora_gate_up"], down_b * kept[f"{EXPERTS}.lora_down"]
    up_a, down_a = layer.lora_gate_up_A["default"].weight, layer.lora_down_A["default"].weight
    adapter = {}
    slots = {expert: slot for slot, expert in enumerate(MASK[EXPERTS])}
    if cold_experts == "shared":
        slots |= {expert: 3 for expert in range(8) if expert not in slots}
    for expert, slot in slots.items():
        for projection, rank in (("gate_proj", slice(0, 4)), ("up_proj", slice(4, 8))):
            adapter[projection, expert] = NaiveAdapter(up_a[slot, rank].detach(), masked[0][slot, rank], 2.0)
        adapter["down_proj", expert] = NaiveAdapter(down_a[slot].detach(), masked[1][slot], 2.0)
    expected = naive_experts(base, hidden, ids, weights, [adapter])
    actual = layer(hidden, ids, weights)
    assert_same(actual.detach(), expected.detach(), "output")
    probe = torch.randn(actual.shape, dtype=torch.float64, generator=generator)
    (expected * probe).sum().backward()
    (actual * probe).sum().backward()
    for name, b in (("lora_gate_up", up_b), ("lora_down", down_b)):
        module = getattr(layer, f"{name}_B")["default"]
        assert_same(module.weight.grad, b.grad, f"gradient of {name}_B")
        assert torch.equal(module.weight.grad[~module.kept], torch.zeros_like(module.weight.grad[~module.kept]))
        assert getattr(layer, f"{name}_A")["default"].weight.grad is None
    for expert, slot in slots.items():
        delta = layer.get_delta_weight("default", "down_proj", expert)
        assert_same(delta, 2.0 * masked[1][slot].detach().T @ down_a[slot].detach(), "merged delta")


def test_the_adapter_that_cold_experts_share_has_a_share_of_its_own(tmp_path: Path) -> None:
    """The same whatever else is selected, and of as many entries as that of each expert."""
    model = get_peft_model(tiny_model("olmoe"), config(cold_experts="shared", init_lora_weights=False))
    others = {EXPERTS: [2], "model.layers.1.mlp.experts": []}
    other = get_peft_model(tiny_model("olmoe"), config(cold_experts="shared", selected_experts=others))
    for name, module in factors(model, "B").items():
        kept = module.kept
        assert kept.sum((1, 2)).unique().numel() == 1, name
        assert torch.equal(factors(other, "B")[name].kept[-1], kept[-1]), name
        assert not any(torch.equal(kept[-1], own) for own in kept[:-1]), name
        assert torch.equal(module.weight != 0, kept), name
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)
    for name, module in factors(loaded, "B").items():
        assert torch.equal(module.weight, factors(model, "B")[name].weight), name
        assert torch.equal(module.kept, factors(model, "B")[name].kept), name
    with torch.no_grad():
        logits = [one.eval()(**token_batch(one.get_base_model())).logits for one in (model, loaded)]
    assert torch.equal(*logits)


def test_a_stays_frozen_whatever_peft_does() -> None:
    model = get_peft_model(tiny_model("olmoe"), config())
    model.add_adapter("second", config(hellori_density=None))

    def trainable() -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = {f"base_model.model.{name}_B.default.weight" for name in factors(model, "B")}
    assert trainable() == expected
    other = get_peft_model(tiny_model("olmoe"), config(hellori_density=None))
    assert all(p.requires_grad for n, p in other.named_parameters() if "lora_" in n), "each layer by itself"
    model.set_adapter("second")
    assert any("_A.second" in name for name in trainable())
    model.set_adapter("default")
    assert trainable() == expected
    model.base_model.set_requires_grad("default", False)
    model.base_model.set_requires_grad("default", True)
    assert trainable() == expected


def test_sft_training_saves_loads_and_resumes_with_the_same_share(tmp_path: Path) -> None:
    paths = [f"model.layers.{i}.mlp.experts" for i in range(6)]
    profile = RoutingProfile.from_arrays(
        torch.randint(1, 99, (6, 32), generator=torch.Generator().manual_seed(0)),
        num_experts_per_tok=4,
        layer_names=paths,
    )
    texts = Dataset.from_list([{"text": f"The {n} sheep sleep on hill number {n * n}."} for n in range(16)])

    def trainer(**changes: Any) -> SFTTrainer:
        fixed = settings(tmp_path / "run", max_steps=4, max_length=24, save_strategy="steps", save_steps=2)
        return SFTTrainer(
            model=small_olmoe(),
            args=SFTConfig(**{**fixed, "bf16": False, "gradient_checkpointing": False, "weight_decay": 0.1, **changes}),
            train_dataset=texts,
            processing_class=small_tokenizer(),
            peft_config=hellora_config(profile, hellori=True, r=4, task_type="CAUSAL_LM"),
        )

    whole = trainer()
    frozen = {name: module.weight.clone() for name, module in factors(whole.model, "A").items()}
    assert all("lora_" not in n or ".experts." in n for n, p in whole.model.named_parameters() if p.requires_grad)
    whole.train()
    for name, module in factors(whole.model, "B").items():
        outside = module.weight[~module.kept]
        assert torch.equal(outside, torch.zeros_like(outside)), name
        assert (module.weight[module.kept] != 0).any(), name
        assert torch.equal(factors(whole.model, "A")[name].weight, frozen[name])

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for side in "AB":
        for name, module in factors(resumed.model, side).items():
            assert torch.equal(module.weight, factors(whole.model, side)[name].weight), name

    whole.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(small_olmoe(), tmp_path / "adapter", is_trainable=True)
    batch = token_batch(loaded.get_base_model(), batch=1, length=8)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, whole.model.eval()(**batch).logits)
    for name, module in factors(loaded, "B").items():
        assert torch.equal(module.kept, factors(whole.model, "B")[name].kept)


def test_weights_of_another_share_are_refused(tmp_path: Path) -> None:
    """As when a run resumes with other settings: what lies outside the share would be lost."""
    model = get_peft_model(tiny_model("olmoe"), config(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    other = get_peft_model(tiny_model("olmoe"), config(hellori_seed=1))
    with pytest.raises(SieveError, match=r"lora_gate_up_B.weight .*hellori_density") as caught:
        other.load_adapter(str(tmp_path), "default")
    assert "\n" not in str(caught.value)
    same = get_peft_model(tiny_model("olmoe"), config())
    same.load_adapter(str(tmp_path), "default")
    for name, module in factors(same, "B").items():
        assert torch.equal(module.weight, factors(model, "B")[name].weight), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hellori_density": 0.0}, r"hellori_density .*above 0 and at most 1.*0\.0"),
        ({"hellori_density": 0.1, "expert_tuning": "full"}, "hellori_density.*expert_tuning='full'"),
        ({"hellori_density": 0.1, "share_outer": True}, "hellori_density .*share_outer=True"),
        ({"cold_experts": "shared", "expert_tuning": "full"}, "cold_experts='shared' .*expert_tuning='full'"),
        ({"share_outer": True, "expert_tuning": "full"}, "share_outer=True .*expert_tuning='full'"),
        ({"hellori_seed": 0.5}, r"hellori_seed .*whole number.*0\.5"),
        ({"expert_tuning": "dora"}, "expert_tuning .*'lora', 'full'.*'dora'"),
    ],
)
def test_settings_that_cannot_hold_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SieveError, match=message):
        SieveLoraConfig(**options)
