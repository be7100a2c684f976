"""`adapter_names`: a batch whose rows have adapters of their own, on different experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import SieveError, SieveLoraConfig
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.tuners.common.each_adapter import each_adapter
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, tiny_model, token_batch
from tests.reference import assert_same

NAMES = ["second", "__base__", "default", "second"]

# Router as a parameter; biases and a block with two outputs; shared experts, grouped routing; a shared expert with a
# gate; other attention.
MODELS = ["olmoe", "gpt_oss", "deepseek_v3", "qwen2_moe", "jamba"]


def masks(base: nn.Module, ids: list[int]) -> dict[str, list[int]]:
    return dict.fromkeys((layer.path for layer in find_moe_layers(base)), ids)


def config(base: nn.Module, ids: list[int], **settings: Any) -> SieveLoraConfig:
    return SieveLoraConfig(
        **{"r": 4, "lora_alpha": 8, "selected_experts": masks(base, ids), "task_type": "CAUSAL_LM", **settings}
    )


def pair(base: nn.Module, **settings: Any) -> PeftModel:
    """Two adapters: other experts, ranks and projections."""
    model = get_peft_model(copy.deepcopy(base), config(base, [1, 4, 6], **settings))
    model.add_adapter("second", config(base, [0, 2, 4], r=2, expert_projections=["down_proj"], **settings))
    randomize_adapters(model, seed=3)
    return model.eval()


def row(batch: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    return {name: value[index : index + 1] for name, value in batch.items()}


def alone(model: PeftModel, batch: dict[str, torch.Tensor], names: list[str]) -> list[torch.Tensor]:
    """The logits of each row by itself, (length, vocabulary), with its adapter as the only one."""
    results = []
    for index, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                results.append(model(**row(batch, index)).logits[0])
        else:
            model.set_adapter(name)
            results.append(model(**row(batch, index)).logits[0])
    model.set_adapter("default")
    return results


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_row_is_what_it_is_alone(name: str) -> None:
    base = tiny_model(name)
    model = pair(base)
    batch = token_batch(base, batch=4)
    expected = alone(model, batch, NAMES)
    mixed = model(**batch, adapter_names=NAMES).logits
    for index, adapter in enumerate(NAMES):
        assert_same(mixed[index], expected[index], f"row {index} with {adapter}", rtol=1e-3, atol=1e-5)
    # Every row differs from what any other name would have given.
    for index, other in ((0, "default"), (2, "second"), (3, "__base__")):
        different = alone(model, row(batch, index), [other])[0]
        assert (mixed[index] - different).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe"])
@torch.no_grad()
def test_router_logits_are_one_a_layer(name: str) -> None:
    """The router runs once for each adapter, and whoever asks for its logits sees one run over the batch."""
    base = tiny_model(name)
    model = pair(base)
    batch = token_batch(base, batch=4)
    length = batch["input_ids"].shape[1]
    mixed = model(**batch, adapter_names=NAMES, output_router_logits=True).router_logits
    expected = [model(**batch, adapter_names=[each] * 4, output_router_logits=True).router_logits for each in NAMES]
    assert len(mixed) == len(expected[0]) == len(find_moe_layers(base))
    for layer, logits in enumerate(mixed):
        for index in range(4):
            tokens = slice(index * length, (index + 1) * length)
            assert_same(logits[tokens], expected[index][layer][tokens], f"row {index}", rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_active_adapter_does_not_matter() -> None:
    base = tiny_model("olmoe")
    model = pair(base)
    batch = token_batch(base, batch=4)
    first = model(**batch, adapter_names=NAMES).logits
    model.set_adapter("second")
    assert torch.equal(model(**batch, adapter_names=NAMES).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(**batch, adapter_names=NAMES).logits, base(**batch).logits)
    one = model(**batch, adapter_names=["default"] * 4).logits
    model.set_adapter("default")
    assert_same(one, model(**batch).logits, "one name for all", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_experts_only(implementation: str) -> None:
    """Every layer that the adapters are on gets flattened tokens. A batch of one token a row is that of decoding."""
    base = tiny_model("olmoe")
    base.config._experts_implementation = implementation
    model = pair(base, target_modules=[], train_router=False)
    for length in (7, 1):
        batch = token_batch(base, batch=4, length=length)
        expected = alone(model, batch, NAMES)
        mixed = model(**batch, adapter_names=NAMES).logits
        for index in range(4):
            assert_same(mixed[index], expected[index], f"row {index}", rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_adapters_on_different_layers_and_saved_modules() -> None:
    base = tiny_model("olmoe")
    path = "model.layers.{}.mlp.experts"
    model = get_peft_model(
        copy.deepcopy(base), config(base, [], selected_experts={path.format(0): [1, 2]}, modules_to_save=["lm_head"])
    )
    model.add_adapter("second", config(base, [], selected_experts={path.format(1): [3]}, modules_to_save=["lm_head"]))
    randomize_adapters(model)
    head = model.base_model.model.lm_head.modules_to_save
    head["second"].weight.data.mul_(1.5)
    batch = token_batch(base, batch=4)
    model.eval()
    expected = alone(model, batch, NAMES)
    mixed = model(**batch, adapter_names=NAMES).logits
    for index in range(4):
        assert_same(mixed[index], expected[index], f"row {index}", rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 2])
@torch.no_grad()
def test_generate(num_beams: int) -> None:
    base = tiny_model("olmoe")
    model = pair(base)
    batch = token_batch(base, batch=4, length=5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams, "eos_token_id": 127}
    mixed = model.generate(**batch, adapter_names=NAMES, **options)
    continued = set()
    for index, name in enumerate(NAMES):
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            if name != "__base__":
                model.set_adapter(name)
            one = model.generate(**row(batch, index), **options)[0]
        assert mixed[index, : len(one)].tolist() == one.tolist()
        continued.add(tuple(one.tolist()))
    assert len(continued) == 4
    model.set_adapter("default")
    assert mixed.tolist() != model.generate(**batch, **options).tolist()


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["default", "third", "__base__", "other"], "adapter_names .*other.*third"),
        ("default", "adapter_names .*list.*default|adapter_names .*default.*list"),
        (["default", "second"], r"adapter_names .*\b2\b.*rows.*\b4\b"),
        (["default"] * 8, r"adapter_names .*\b8\b.*rows.*\b4\b"),
    ],
)
def test_wrong_names_are_refused(names: Any, match: str) -> None:
    """Two names for four rows would fit the flattened tokens of the experts, two rows a name."""
    base = tiny_model("olmoe")
    model = pair(base, target_modules=[], train_router=False)
    batch = token_batch(base, batch=4)
    hooks = [list(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises(SieveError, match=match):
            model(**batch, adapter_names=names)
        assert torch.equal(model(**batch).logits, before)
    assert [list(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_training_merged_adapters_and_lists_of_modules_are_refused() -> None:
    base = tiny_model("olmoe")
    model, batch = pair(base), token_batch(base, batch=4)
    with pytest.raises(SieveError, match="adapter_names .*training mode"):
        model.train()(**batch, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(SieveError, match="default.* merged.*unmerge_adapter"):
        model(**batch, adapter_names=NAMES)
    listed = pair(deepseek_like())
    with pytest.raises(SieveError, match="mlp.experts .*separate modules.*set_adapter"):
        listed(**token_batch(listed, batch=4), adapter_names=NAMES)


def test_splitting_by_adapter() -> None:
    """Tokens find their way back; what has no entry for each token is passed on, or refused as a result."""
    seen: dict[str, Any] = {}

    def run(name: str, x: torch.Tensor, ids: torch.Tensor, flag: Any, *, scale: torch.Tensor) -> Any:
        seen[name] = (x.tolist(), flag)
        return x * len(name), (ids, None, x.repeat_interleave(2))

    x = torch.arange(5.0)
    names = ["a", "bb", "a", "ccc", "bb"]
    product, (ids, nothing, twice) = each_adapter(run, names, (x, x.long(), "flag"), {"scale": torch.ones(2)})
    assert seen == {"a": ([0, 2], "flag"), "bb": ([1, 4], "flag"), "ccc": ([3], "flag")}
    assert product.tolist() == [0, 2, 2, 9, 8]
    assert ids.tolist() == [0, 1, 2, 3, 4] and nothing is None
    assert twice.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    with pytest.raises(SieveError, match="entry for each of its 2 tokens"):
        each_adapter(lambda name, x: x.sum(), names, (x,), {})
