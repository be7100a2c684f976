"""A trained EPnG adapter's life: saved, loaded, merged, exported, switched, beside others, inspected, tampered with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import peft_sieve
from peft_sieve import EpngConfig, SieveError, export_lora, inspect_adapter, merge_checkpoint
from peft_sieve.tuners.epng.update import epng_layers
from tests.models import TINY_OLMOE, randomize_adapters, small_olmoe, tiny_model, token_batch
from tests.reference import assert_same
from tests.tuners.epng.test_training import MODELS, adapted, config, optimizer_of, train

PATH = "model.layers.0.mlp.experts"


def trained(name: str = "olmoe", **settings: Any) -> PeftModel:
    """After two updates."""
    model = adapted(name, **settings)
    train(model, optimizer_of(model), 1, 5)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch(model)).logits


each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_a_saved_adapter_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = trained(name)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(MODELS[name](), tmp_path)), expected)
    lean = PeftModel.from_pretrained(MODELS[name](), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), expected)
    if name != "module list":
        base = MODELS[name]()
        base.load_adapter(str(tmp_path))
        assert torch.equal(logits(base), expected)


def test_the_file_holds_what_is_there_and_no_more(tmp_path: Path) -> None:
    model = trained(train_attention=False, train_router=False, train_shared_experts=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    numbers = sum(t.numel() for key, t in tensors.items() if ".lora_experts." not in key)
    # Two layers, eight experts of rank 4 at the start, three projections between 32 and 24.
    assert numbers == 2 * 8 * 4 * 3 * (32 + 24)
    assert numbers == sum(p.numel() for p in model.parameters() if p.requires_grad)
    again = tmp_path / "again"
    PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path).save_pretrained(again)
    saved_again = load_file(again / "adapter_model.safetensors")
    assert all(torch.equal(tensors[key], value) for key, value in saved_again.items()) and len(tensors) == len(
        saved_again
    )
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, again)]
    assert all(c["peft_type"] == "SIEVE_EPNG" and c["ledger"][PATH] for c in configs)
    assert all(configs[0][key] == configs[1][key] for key in ("selected_experts", "expert_blocks", "ledger"))


@each_model
def test_merging_and_back(name: str) -> None:
    model = trained(name)
    plain, expected = logits(MODELS[name]()), logits(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    assert_same(logits(model), expected, "merged", rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert_same(logits(merged), expected, "merged for good", rtol=1e-4, atol=1e-4)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), plain)
    assert not any(module._forward_pre_hooks for module in unloaded.modules())


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_exported_it_is_plain_lora(layout: str, tmp_path: Path) -> None:
    """All of one rank, the highest, zeros beyond an expert's own."""
    model = trained(lora_dropout=0.0)
    expected = logits(model)
    model.get_base_model().name_or_path = ""
    exported = export_lora(model, tmp_path, layout=layout)
    highest = max(max(layer.plans["default"].blocks) for layer in epng_layers(model).values())
    assert exported.r == highest > 4
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)
    assert loaded.peft_config["default"].peft_type.value == "LORA"
    assert_same(logits(loaded), expected, "exported", rtol=1e-4, atol=1e-4)


def test_merged_into_a_checkpoint(tmp_path: Path) -> None:
    base = small_olmoe()
    model = get_peft_model(base, config(warmup_steps=1))
    randomize_adapters(model, std=0.02)
    train(model.train(), optimizer_of(model), 1, 1)
    assert model.ledger()
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", TINY_OLMOE, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    # The checkpoint keeps its type, which is lower than that of the model trained here.
    expected, plain = model.merge_and_unload().state_dict(), small_olmoe().state_dict()
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        assert_same(weight, expected[name].to(weight.dtype), name, rtol=1e-2, atol=1e-3)
    assert any(not torch.allclose(weight.float(), plain[name], rtol=2e-2) for name, weight in merged.items())
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert len(epng_layers(loaded)) == 6


def test_several_adapters_in_one_model(tmp_path: Path) -> None:
    """Ranks of their own, each loaded, switched to, together, and in one batch."""
    first, second = trained(), trained(selected_experts={PATH: [0, 3, 5, 6]})
    alone = {"one": logits(first), "two": logits(second)}
    first.save_pretrained(tmp_path / "one")
    second.save_pretrained(tmp_path / "two")
    model = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "one", adapter_name="one")
    model.load_adapter(str(tmp_path / "two"), "two")
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name])
    batch = token_batch(model, batch=3)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["two", "__base__", "one"]).logits
    assert_same(mixed[0], alone["two"][0], "two", rtol=1e-4, atol=1e-4)
    assert_same(mixed[1], logits(tiny_model("olmoe"))[1], "base", rtol=1e-4, atol=1e-4)
    assert_same(mixed[2], alone["one"][2], "one", rtol=1e-4, atol=1e-4)
    model.delete_adapter("two")
    assert torch.equal(logits(model), alone["one"])
    assert not any("two" in name for name, _ in model.named_parameters())


def test_the_adapter_in_training_moves_and_the_others_stay() -> None:
    model = adapted()
    model.add_adapter("other", config(r=2, lora_alpha=2))
    randomize_adapters(model)
    train(model, optimizer_of(model), 1, 3)
    for layer in epng_layers(model).values():
        assert layer.plans["other"].blocks == (2,) * 8
        assert max(layer.plans["default"].blocks) > 4
    assert model.ledger("other") == []
    model.set_adapter("other")
    train(model, optimizer_of(model), 1, 2)
    assert [len(model.ledger(name)) for name in ("default", "other")] == [1, 1]


def test_weighted_sums_are_refused() -> None:
    with pytest.raises(SieveError, match="Activate several|activate several"):
        trained().add_weighted_adapter(["default"], [0.5], "sum")


def test_inspect_says_ranks_and_updates(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    summary = inspect_adapter(tmp_path)
    assert summary.update_steps == (2, 4)
    layer = next(layer for layer in summary.layers if layer.path == PATH)
    blocks = epng_layers(model)[PATH].plans["default"].blocks
    assert layer.ranks == {"gate_up": 2 * max(blocks), "down": max(blocks)}
    assert layer.lowest_ranks == {"gate_up": 8, "down": 4}
    assert layer.all_experts_parameters == layer.num_parameters == 8 * 4 * 3 * (32 + 24)
    text = "\n".join(table.to_text() for table in summary.to_tables())
    assert "at steps 2, 4" in text and f"gate_up 8 to {2 * max(blocks)}" in text
    card = (tmp_path / "README.md").read_text()
    assert "EPnG" in card and f"rank 4 to {max(blocks)}" in card and "4 at the start" in card


def test_a_copy_counts_for_itself() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    optimizer = optimizer_of(twin)
    train(twin, optimizer, 1, 2)
    assert len(twin.ledger()) == 1 and not model.ledger()
    assert all(layer.take_mass() is None for layer in epng_layers(model).values())
    train(model, optimizer_of(model), 1, 2)
    assert model.ledger() == twin.ledger()


# --- changed by hand, or mixed up -----------------------------------------------------------------------------------


def swap_blocks(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    blocks = settings["expert_blocks"][PATH]
    blocks.append(blocks.pop(0))  # some differ, so this is not what was there


def swap_blocks_tensor(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    key = next(key for key in tensors if PATH in key and key.endswith("lora_experts.blocks"))
    used = tensors[key] > 0
    tensors[key][used] = tensors[key][used].roll(1)


def drop_importance(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    del tensors[next(key for key in tensors if key.endswith("lora_experts.importance"))]


def too_few_blocks(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    settings["expert_blocks"][PATH].pop()


EDITS: list[tuple[Callable[..., None], str, str]] = [
    (swap_blocks, f"expert_blocks.*{PATH}.*ledger", ""),
    (swap_blocks_tensor, "other ranks by expert", ""),
    (drop_importance, "no .*lora_experts.importance", ""),
    (too_few_blocks, f"expert_blocks.*{PATH}.*positive whole number", ""),
]


@pytest.mark.parametrize(("edit", "text", "_"), EDITS, ids=[edit.__name__ for edit, _, _ in EDITS])
def test_files_that_do_not_belong_together_are_refused(
    edit: Callable[..., None], text: str, _: str, tmp_path: Path
) -> None:
    trained().save_pretrained(tmp_path)
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, content = load_file(weights), json.loads(settings.read_text())
    assert len(set(content["expert_blocks"][PATH])) > 1
    edit(tensors, content)
    save_file(tensors, weights)
    settings.write_text(json.dumps(content))
    base = tiny_model("olmoe")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(SieveError, match=text):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names
    assert not any(module._forward_pre_hooks for module in base.modules())
    if edit is not drop_importance:
        with pytest.raises(SieveError):
            tiny_model("olmoe").load_adapter(str(tmp_path))


def test_names_and_type() -> None:
    assert peft_sieve.EpngConfig is EpngConfig
    assert EpngConfig().peft_type.value == "SIEVE_EPNG"
    model = adapted()
    assert type(model.base_model) is peft_sieve.EpngModel


def test_the_given_configuration_can_begin_again() -> None:
    given = config()
    model = get_peft_model(tiny_model("olmoe"), given).train()
    train(model, optimizer_of(model), 1, 3)
    assert model.peft_config["default"].ledger and given.ledger is None and given.expert_blocks is None
    other = get_peft_model(tiny_model("olmoe"), given)
    assert not other.ledger()
    assert all(len(layer.plans["default"].experts) == 8 for layer in epng_layers(other).values())


def test_a_second_adapter_of_the_same_configuration_is_not_told_of_updates(tmp_path: Path) -> None:
    """As TRL makes its reference adapter."""
    model = adapted()
    model.add_adapter("ref", model.peft_config["default"])
    train(model, optimizer_of(model), 1, 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path, is_trainable=True)
    loaded.load_adapter(str(tmp_path / "ref"), "ref")
    # Into adapters that share their configuration, too: what a resumed Trainer does.
    fresh = adapted()
    fresh.add_adapter("ref", fresh.peft_config["default"])
    fresh.load_adapter(str(tmp_path), "default")
    fresh.load_adapter(str(tmp_path / "ref"), "ref")
    for found in (loaded, fresh):
        for name, moved in (("default", True), ("ref", False)):
            assert found.peft_config[name].to_dict()["ledger"] == model.peft_config[name].to_dict()["ledger"]
            assert bool(found.peft_config[name].ledger) is moved
        again = tmp_path / "again"
        found.save_pretrained(again)
        PeftModel.from_pretrained(tiny_model("olmoe"), again / "ref")
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("olmoe"), again)), logits(model))


def test_the_ledger_of_two_runs_keeps_their_order(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path, is_trainable=True).train()
    train(model, optimizer_of(model), 1, 3)
    ledger = model.ledger()
    assert [entry.step for entry in ledger] == [2, 4, 2]
    assert all(entry.parameters == entry.budget for entry in ledger)
