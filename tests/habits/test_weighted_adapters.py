"""`add_weighted_adapter`: sums of adapters on different experts, as new adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_sieve import SieveError, SieveLoraConfig
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.tuners.common.experts.layer import SieveExpertLayer
from peft_sieve.tuners.sieve.combination import Share, combine
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, small_olmoe, tiny_model, token_batch
from tests.reference import assert_same

MODELS: dict[str, Callable[[], nn.Module]] = {
    "olmoe": lambda: tiny_model("olmoe"),
    "gpt_oss": lambda: tiny_model("gpt_oss"),
    "qwen2_moe": lambda: tiny_model("qwen2_moe"),
    "module list": deepseek_like,
}
WEIGHTS = [0.7, -1.3]


def config(base: nn.Module, ids: list[int], **settings: Any) -> SieveLoraConfig:
    mask = dict.fromkeys((layer.path for layer in find_moe_layers(base)), ids)
    return SieveLoraConfig(**{"r": 4, "lora_alpha": 8, "selected_experts": mask, "task_type": "CAUSAL_LM", **settings})


def pair(base: nn.Module, **second: Any) -> PeftModel:
    """Expert 4 is in both masks. Either both train tokens, or none does."""
    tokens = {name: value for name, value in second.items() if name == "trainable_token_indices"}
    model = get_peft_model(copy.deepcopy(base), config(base, [1, 4, 6], **tokens), "first")
    model.add_adapter("second", config(base, [0, 4], **second))
    randomize_adapters(model, seed=3)
    return model.eval()


DIFFERENT: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 6,
    "use_rslora": True,
    "expert_projections": ["down_proj"],
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"experts": 5},
    "train_router": False,
}


def deltas(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """What an adapter adds, by the path of the matrix: (out, in)."""
    found = {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, SieveExpertLayer) and name in layer.plans:
            plan = layer.plans[name]
            for projection in plan.ranks:
                for expert in plan.experts:
                    found[f"{path}.{expert}.{projection}"] = layer.get_delta_weight(name, projection, expert)
        elif isinstance(layer, LoraLayer) and (name in layer.lora_A or name in layer.lora_embedding_A):
            found[path] = layer.get_delta_weight(name).detach()
    return found


def weighted(model: PeftModel, names: list[str], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        for path, delta in deltas(model, name).items():
            total[path] = total.get(path, torch.zeros_like(delta)) + weight * delta
    return total


def assert_same_deltas(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Where only one of them adds something, it must be nothing."""
    for path in {*found, *expected}:
        if path not in expected:
            assert not found[path].any(), path
        else:
            assert_same(found[path], expected[path], path, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("combination_type", ["cat", "svd"])
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_the_weighted_sum_of_the_deltas(name: str, combination_type: str, tmp_path: Path) -> None:
    base = MODELS[name]()
    model = pair(base, **DIFFERENT)
    expected = weighted(model, ["first", "second"], WEIGHTS)
    # Ranks are 4 and at most 3.
    model.add_weighted_adapter(["first", "second"], WEIGHTS, "sum", combination_type, svd_rank=7)
    assert_same_deltas(deltas(model, "sum"), expected)
    made = model.peft_config["sum"]
    assert made.r == made.lora_alpha == 7
    assert all(ids == [0, 1, 4, 6] for ids in made.selected_experts.values())
    assert model.active_adapters == ["first"]

    # Merged into the weights, it is what the others are one after the other, each with its weight.
    batch = token_batch(base)
    model.set_adapter("sum")
    with torch.no_grad():
        logits = model(**batch).logits
        assert (logits - base(**batch).logits).abs().max() > 1e-2
        summed = copy.deepcopy(base)
        parameters = dict(summed.named_parameters())
        for path, delta in expected.items():
            if f"{path}.weight" in parameters:
                parameters[f"{path}.weight"] += delta
            else:
                layer_path, expert, projection = path.rsplit(".", 2)
                layer = next(layer for layer in find_moe_layers(summed) if layer.path == layer_path)
                layer.family.expert_weight(layer.experts, projection, int(expert)).add_(delta)
        assert_same(summed(**batch).logits, logits, "logits", rtol=1e-3, atol=1e-4)

        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path / "sum").eval()
        assert torch.equal(loaded(**batch).logits, logits)


def test_svd_of_a_lower_rank_is_the_closest_there_is() -> None:
    base = tiny_model("olmoe")
    model = pair(base)
    expected = weighted(model, ["first", "second"], WEIGHTS)
    model.add_weighted_adapter(["first", "second"], WEIGHTS, "sum")  # svd, of the highest rank
    assert model.peft_config["sum"].r == 4
    for path, delta in deltas(model, "sum").items():
        u, s, vh = torch.linalg.svd(expected[path], full_matrices=False)
        closest = u[:, :4] * s[:4] @ vh[:4]
        assert_same(delta, closest, path, rtol=1e-3, atol=1e-4)
    rest = max(float(torch.linalg.matrix_norm(expected[p] - d)) for p, d in deltas(model, "sum").items())
    assert rest > 0.1  # of rank 8 on the experts and modules of both


@pytest.mark.parametrize("weights", [[0.7, 0.5], [0.7, -1.3]])
def test_linear_is_exact_where_one_adapter_is_alone(weights: list[float]) -> None:
    base = tiny_model("olmoe")
    model = pair(base, lora_alpha=6)
    expected = weighted(model, ["first", "second"], weights)
    model.add_weighted_adapter(["first", "second"], weights, "sum", "linear")
    assert model.peft_config["sum"].r == 4
    for path, delta in deltas(model, "sum").items():
        if ".experts." in path and ".4." not in path:
            assert_same(delta, expected[path], path, rtol=1e-3, atol=1e-5)
        else:
            assert (delta - expected[path]).abs().max() > 1e-3, path


@pytest.mark.parametrize("combination_type", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weights", [[0.7, 0.5], [0.7, -1.3]])
def test_linear_layers_get_what_peft_gives_them(combination_type: str, weights: list[float]) -> None:
    base = tiny_model("olmoe")
    targets = ["q_proj", "o_proj", "embed_tokens"]
    model = pair(base, target_modules=targets, lora_alpha=6)
    model.delete_adapter("first")
    model.add_adapter("first", config(base, [1, 4, 6], target_modules=targets))
    randomize_adapters(model, seed=3)
    lora = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"), "first"
    )
    lora.add_adapter("second", LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
    values = dict(model.named_parameters())
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(values[name])
    for one in (model, lora):
        one.add_weighted_adapter(["first", "second"], weights, "sum", combination_type)
    found, expected = deltas(model, "sum"), deltas(lora, "sum")
    assert len(expected) == 2 * 2 + 1
    for path, delta in expected.items():
        assert_same(found[path], delta, path, rtol=1e-3, atol=1e-4)


def test_one_adapter_alone_is_scaled() -> None:
    base = tiny_model("olmoe")
    model = pair(base, **DIFFERENT)
    expected = weighted(model, ["second"], [-0.5])
    model.add_weighted_adapter(["second"], [-0.5], "scaled")
    assert_same_deltas(deltas(model, "scaled"), expected)
    assert model.peft_config["scaled"].selected_experts == model.peft_config["second"].selected_experts
    assert model.peft_config["scaled"].expert_projections == ["down_proj"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.add_weighted_adapter(["first"], [1.0], "scaled")  # a name that is taken
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_adapters_on_different_layers_of_the_small_trained_model() -> None:
    base = small_olmoe()
    paths = [layer.path for layer in find_moe_layers(base)]
    first = config(base, [], selected_experts={path: [0, 9] for path in paths[:4]}, layers_to_transform=[0, 1, 2, 3])
    model = get_peft_model(base, first, "first")
    model.add_adapter(
        "second", config(base, [], selected_experts={path: [9, 30] for path in paths[3:]}, exclude_modules=["q_proj"])
    )
    randomize_adapters(model)
    expected = weighted(model, ["first", "second"], WEIGHTS)
    model.add_weighted_adapter(["first", "second"], WEIGHTS, "sum", "cat")
    mask = model.peft_config["sum"].selected_experts
    assert list(mask.values()) == [[0, 9]] * 3 + [[0, 9, 30]] + [[9, 30]] * 2
    assert_same_deltas(deltas(model, "sum"), expected)
    assert not any("layers.5.self_attn.q_proj" in path for path in deltas(model, "sum"))


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"combination_type": "ties"}, "combination_type .*'ties'"),
    ({}, {"combination_type": "dare_linear_svd"}, "combination_type .*'dare_linear_svd'"),
    ({}, {"combination_type": "magnitude_prune", "density": 0.5}, "combination_type .*'magnitude_prune'"),
    ({"r": 2}, {"combination_type": "linear"}, r"ranks \[4, 2\] in .*'cat' or 'svd'"),
    ({"rank_pattern": {"down_proj": 2}}, {"combination_type": "linear"}, r"ranks \[4, 2\] in .*experts.down_proj"),
    ({}, {"adapters": ["first", "third"]}, r"add_weighted_adapter .*'third'"),
    ({}, {"adapters": []}, r"add_weighted_adapter .*\[\]"),
    ({}, {"weights": [1.0]}, "1 weights for 2 adapters"),
    ({}, {"svd_rank": 0}, r"svd_rank .*\b0\b"),
    ({}, {"svd_clamp": 0.9}, "svd_clamp"),
    ({"modules_to_save": ["lm_head"]}, {}, r"'second' has modules_to_save=\['lm_head'\]"),
    ({"trainable_token_indices": [3]}, {}, r"'first' has trainable_token_indices=\[3\]"),
    ({"bias": "lora_only"}, {}, "'second' has bias='lora_only'"),
]


@pytest.mark.parametrize(("second", "arguments", "match"), REFUSED)
def test_sums_that_there_are_not(second: dict[str, Any], arguments: dict[str, Any], match: str) -> None:
    base = tiny_model("olmoe")
    model = pair(base, **second)
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(SieveError, match=match):
        model.add_weighted_adapter(
            **{"adapters": ["first", "second"], "weights": WEIGHTS[:2], "adapter_name": "sum", **arguments}
        )
    assert list(model.peft_config) == ["first", "second"]
    assert [name for name, _ in model.named_parameters()] == before


def test_the_arithmetic() -> None:
    """On stacks of matrices, against products that are built in full."""
    torch.manual_seed(0)
    shares = [
        Share(torch.randn(3, rank, 10).double(), torch.randn(3, rank, 8).double(), coefficient)
        for rank, coefficient in ((2, 0.5), (3, -2.0))
    ]
    full = sum(s.coefficient * s.b.transpose(1, 2) @ s.a for s in shares)
    assert isinstance(full, torch.Tensor)
    for kind, rank in (("cat", 5), ("cat", 6), ("svd", 5), ("svd", 7)):
        a, b = combine(kind, shares, rank)
        assert a.shape == (3, rank, 10) and b.shape == (3, rank, 8)
        assert_same(b.transpose(1, 2) @ a, full, kind)
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    a, b = combine("svd", shares, 2)
    assert_same(b.transpose(1, 2) @ a, u[..., :2] * s[:, None, :2] @ vh[:, :2], "rank 2")
    same = [Share(s.a[:, :2], s.b[:, :2], s.coefficient) for s in shares]
    a, b = combine("linear", same, 3)
    first, second = 0.5**0.5, 2**0.5
    assert_same(a[:, :2], first * same[0].a - second * same[1].a, "A")
    assert_same(b[:, :2], first * same[0].b + second * same[1].b, "B")
    assert not a[:, 2].any() and not b[:, 2].any()
