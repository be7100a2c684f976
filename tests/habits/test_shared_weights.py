"""Modules that share a weight: merging changes the adapted one only, and unmerging gives back every bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_sieve import EpngConfig, SieveError, SieveLoraConfig
from tests.models import randomize_adapters, tiny_model, token_batch

MASK = {f"model.layers.{layer}.mlp.experts": [1, 5] for layer in range(2)}
EMBEDDINGS = ["embed_tokens", "lm_head", "q_proj"]


def tied(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_model("olmoe", dtype, tie_word_embeddings=True)


def adapted(
    base: nn.Module, kind: Any = SieveLoraConfig, names: tuple[str, ...] = ("default",), **settings: Any
) -> Any:
    settings = {"target_modules": EMBEDDINGS, "selected_experts": MASK, **settings}
    model = get_peft_model(base, kind(r=4, lora_dropout=0.0, **settings), names[0])
    for name in names[1:]:
        model.add_adapter(name, kind(r=2, lora_dropout=0.0, **settings))
    randomize_adapters(model)
    return model.eval()


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: v.clone() for n, v in model.get_base_model().state_dict().items() if "lora_" not in n}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def is_tied(model: Any) -> bool:
    base = model.get_base_model()
    return base.get_input_embeddings().weight is base.get_output_embeddings().weight


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**token_batch(model)).logits


@pytest.mark.parametrize("kind", [SieveLoraConfig, EpngConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [EMBEDDINGS, ["lm_head"], ["embed_tokens"]])
def test_cycles_leave_every_bit(kind: Any, dtype: torch.dtype, targets: list[str]) -> None:
    model = adapted(tied(dtype), kind, target_modules=targets)
    before, unmerged = base_weights(model), logits(model)
    for safe_merge in (False, True, False, True):
        model.merge_adapter(safe_merge=safe_merge)
        if dtype == torch.float32:
            assert torch.allclose(logits(model), unmerged, atol=1e-4)
        model.unmerge_adapter()
        assert same(base_weights(model), before) and is_tied(model)
        assert torch.equal(logits(model), unmerged)


def test_offloaded() -> None:
    unmerged = logits(adapted(tied()))
    model = adapted(cpu_offload(tied(), execution_device=torch.device("cpu")))
    assert torch.equal(logits(model), unmerged)
    for _ in range(2):
        model.merge_adapter()
        assert torch.allclose(logits(model), unmerged, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(logits(model), unmerged)
    assert torch.allclose(logits(model.merge_and_unload()), unmerged, atol=1e-4)


def test_any_order_of_layers() -> None:
    model = adapted(tied())
    before = base_weights(model)
    base = model.get_base_model()
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    for merging, unmerging in itertools.product(itertools.permutations(layers), repeat=2):
        for layer in merging:
            layer.merge()
        unmerging[0].unmerge()
        assert torch.equal(unmerging[0].get_base_layer().weight, before["lm_head.base_layer.weight"])
        unmerging[1].unmerge()
        assert same(base_weights(model), before) and is_tied(model)


def test_several_adapters_one_after_the_other() -> None:
    model = adapted(tied(), names=("a", "b"))
    before = base_weights(model)
    model.base_model.set_adapter(["a", "b"])
    both = logits(model)
    model.base_model.set_adapter("a")
    of_a = logits(model)
    model.merge_adapter(["a"])
    assert torch.allclose(logits(model), of_a, atol=1e-4)
    model.merge_adapter(["b"], safe_merge=True)
    assert torch.allclose(logits(model), both, atol=1e-4)
    model.unmerge_adapter()
    assert same(base_weights(model), before) and is_tied(model)


def test_disabling_unmerges_both() -> None:
    model = adapted(tied())
    with model.disable_adapter():
        base = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert is_tied(model)


@pytest.mark.parametrize("merged_before", [False, True])
def test_merged_for_good_they_have_weights_of_their_own(merged_before: bool) -> None:
    model = adapted(tied())
    unmerged = logits(model)
    if merged_before:
        model.merge_adapter()
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), unmerged, atol=1e-4)
    assert not merged.config.tie_word_embeddings
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())


def test_unloaded_they_are_as_before() -> None:
    model = adapted(tied())
    model.merge_adapter()
    unloaded = model.unload()
    assert same(dict(unloaded.state_dict()), dict(tied().state_dict()))
    assert unloaded.get_input_embeddings().weight is unloaded.get_output_embeddings().weight


def test_a_merge_that_fails_leaves_them_tied() -> None:
    model = adapted(tied())
    before = base_weights(model)
    model.get_base_model().get_output_embeddings().lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert same(base_weights(model), before) and is_tied(model)


def test_parameters_of_two_layers() -> None:
    """As one object, and as two in the same memory."""

    def make() -> nn.Module:
        base = tiny_model("olmoe")
        first, second = (layer.self_attn for layer in base.model.layers)
        second.q_proj.weight = first.q_proj.weight
        second.k_proj.weight = nn.Parameter(first.k_proj.weight.data)
        base.model.layers[1].mlp.gate.weight = base.model.layers[0].mlp.gate.weight
        return base

    model = adapted(make(), target_modules=["q_proj", "k_proj"])
    before, unmerged = base_weights(model), logits(model)
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        assert torch.allclose(logits(model), unmerged, atol=1e-4)
        model.unmerge_adapter()
        assert same(base_weights(model), before)
    first, second = (layer.self_attn for layer in model.get_base_model().model.layers)
    assert first.q_proj.weight is second.q_proj.weight
    assert first.k_proj.weight.data_ptr() == second.k_proj.weight.data_ptr()
    assert torch.allclose(logits(model.merge_and_unload()), unmerged, atol=1e-4)


def test_a_module_in_two_places() -> None:
    """Its places have adapters of their own, or one has none, so the sum would be wrong in the other."""
    for name in ("self_attn.q_proj", "mlp.gate", "mlp.experts"):
        base = tiny_model("olmoe")
        first, second = base.model.layers
        parent, _, child = name.rpartition(".")
        setattr(second.get_submodule(parent), child, first.get_submodule(name))
        model = adapted(base, target_modules=["q_proj"])
        before = base_weights(model)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(SieveError, match=rf"layers.0.{name} .*(same module as|share).*layers.1.{name}[,.]"):
                merge()
        assert same(base_weights(model), before)


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
def test_a_block_in_two_places(name: str) -> None:
    """Its adapters are in both, so it merges as one."""
    base = tiny_model("olmoe")
    setattr(base.model.layers[1], name, getattr(base.model.layers[0], name))
    if name == "mlp":
        with pytest.raises(SieveError, match=r"selected_experts names 'model.layers.1.mlp.experts'"):
            adapted(base)
    model = adapted(base, target_modules=["q_proj"], selected_experts={"model.layers.0.mlp.experts": [1, 5]})
    before, unmerged = base_weights(model), logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), unmerged, atol=1e-4)
    model.unmerge_adapter()
    assert same(base_weights(model), before)


@pytest.mark.parametrize("setting", [{"trainable_token_indices": [5, 7]}, {"modules_to_save": ["embed_tokens"]}])
def test_trained_tokens_and_modules(setting: dict[str, Any]) -> None:
    model = adapted(tied(), target_modules=["q_proj"], ensure_weight_tying=True, **setting)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data += 0.5
    before, unmerged = base_weights(model), logits(model)
    for _ in range(2):
        model.merge_adapter()
        assert torch.allclose(logits(model), unmerged, atol=1e-4)
        model.unmerge_adapter()
        assert same(base_weights(model), before)
