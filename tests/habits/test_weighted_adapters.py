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
from peft_sieve.tuners.common.experts.layer import SieveExpertLayer, expert_layers
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
                for expert in (*plan.experts, *plan.cold):
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


BOTH: dict[str, Any] = {"cold_experts": "shared", "share_outer": True}
# Of the first adapter, of the second, and of the sum.
SHARING: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (BOTH, BOTH, BOTH),
    (BOTH, {"share_outer": True}, BOTH),
    ({"share_outer": True}, {"share_outer": True}, {"share_outer": True}),
    (BOTH, {}, {"cold_experts": "shared"}),
    ({}, {"cold_experts": "shared"}, {"cold_experts": "shared"}),
    ({"share_outer": True}, {}, {}),
]


def sharing_pair(base: nn.Module, first: dict[str, Any], second: dict[str, Any], **settings: Any) -> PeftModel:
    """The second has ranks of its own, and in the first layer no expert of its own, if it shares one adapter there."""
    model = get_peft_model(copy.deepcopy(base), config(base, [1, 4, 6], **settings, **first), "first")
    paths = [layer.path for layer in find_moe_layers(base)]
    mask = {path: [] if path == paths[0] and second.get("cold_experts") else [0, 4] for path in paths}
    given = {**settings, **second, "selected_experts": mask}
    model.add_adapter("second", config(base, [], **given))
    randomize_adapters(model, seed=3)
    return model.eval()


@pytest.mark.parametrize("combination_type", ["cat", "svd"])
@pytest.mark.parametrize(
    ("name", "sharing"),
    [*(("olmoe", number) for number in range(len(SHARING))), ("module list", 0), ("module list", 3)],
)
def test_the_sum_of_adapters_that_share_factors(name: str, sharing: int, combination_type: str, tmp_path: Path) -> None:
    first, second, summed = SHARING[sharing]
    base = MODELS[name]()
    different = {"lora_alpha": 6, "use_rslora": True, "rank_pattern": {"experts.down_proj": 3}}
    model = sharing_pair(base, first, {**second, **different})
    expected = weighted(model, ["first", "second"], WEIGHTS)
    model.add_weighted_adapter(["first", "second"], WEIGHTS, "sum", combination_type, svd_rank=8)
    assert_same_deltas(deltas(model, "sum"), expected)
    made = model.peft_config["sum"]
    assert {"cold_experts": made.cold_experts, "share_outer": made.share_outer} == {
        **{"cold_experts": "frozen", "share_outer": False},
        **summed,
    }
    model.set_adapter("sum")
    batch = token_batch(base)
    with torch.no_grad():
        logits = model(**batch).logits
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path / "sum").eval()
        assert torch.equal(loaded(**batch).logits, logits)


def stacked(found: dict[str, torch.Tensor], layer: str, projection: str) -> torch.Tensor:
    """All experts' deltas of a projection where their common factor is one: below each other, or side by side."""
    parts = [found[f"{layer}.{expert}.{projection}"] for expert in range(8)]
    return torch.cat(parts, dim=1 if projection == "down_proj" else 0)


@pytest.mark.parametrize("second", [BOTH, {"share_outer": True}])
def test_svd_of_one_outer_factor_is_the_closest_for_all_experts_together(second: dict[str, Any]) -> None:
    base = tiny_model("olmoe")
    model = sharing_pair(base, BOTH, second)
    expected = weighted(model, ["first", "second"], WEIGHTS)
    model.add_weighted_adapter(["first", "second"], WEIGHTS, "sum")
    found, compared = deltas(model, "sum"), 0
    for layer in find_moe_layers(base):
        for projection in layer.shape.projections:
            whole = stacked(expected, layer.path, projection)
            u, s, vh = torch.linalg.svd(whole, full_matrices=False)
            assert s[4] > 0.05 * s[0]
            closest = u[:, :4] * s[:4] @ vh[:4]
            assert_same(stacked(found, layer.path, projection), closest, projection, rtol=1e-3, atol=1e-4)
            compared += 1
    assert compared == 6
    for expert in (0, 1, 4, 6):  # each as close as it can be, where each has both factors
        model = sharing_pair(base, BOTH, {})
        expected = weighted(model, ["first", "second"], WEIGHTS)
        model.add_weighted_adapter(["first", "second"], WEIGHTS, "sum")
        path = f"{find_moe_layers(base)[0].path}.{expert}.up_proj"
        u, s, vh = torch.linalg.svd(expected[path], full_matrices=False)
        assert_same(deltas(model, "sum")[path], u[:, :4] * s[:4] @ vh[:4], path, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weights", [[0.7, 0.5], [0.7, -1.3]])
def test_linear_sums_of_adapters_that_share_factors_are_sums_of_factors(weights: list[float]) -> None:
    base = tiny_model("olmoe")
    model = sharing_pair(base, BOTH, {"share_outer": True}, lora_alpha=6)
    model.add_weighted_adapter(["first", "second"], weights, "sum", "linear")
    compared = 0
    for path, layer in expert_layers(model):
        for projection in layer.plans["sum"].ranks:
            for expert in range(8):
                a, b = 0, 0
                for name, weight in zip(["first", "second"], weights, strict=True):
                    held = layer.expert_factors(name, projection, expert)
                    outer = layer.factors(name, projection)
                    scaled = abs(weight * outer[2]) ** 0.5
                    own_a, own_b = (factor[0] for factor in outer[:2]) if held is None else held[:2]
                    if held is None:  # of a cold expert only what is one for all
                        own_a, own_b = (own_a * 0, own_b) if projection == "down_proj" else (own_a, own_b * 0)
                    a = a + scaled * (1 if weight > 0 else -1) * own_a
                    b = b + scaled * own_b
                delta = layer.get_delta_weight("sum", projection, expert)
                assert_same(delta, b.T @ a, f"{path} {projection} {expert}", rtol=1e-3, atol=1e-5)
                compared += 1
    assert compared == 2 * 3 * 8


@pytest.mark.parametrize("settings", [BOTH, {"cold_experts": "shared"}, {"share_outer": True}])
def test_one_adapter_that_shares_factors_is_scaled(settings: dict[str, Any]) -> None:
    model = sharing_pair(tiny_model("olmoe"), settings, {})
    expected = weighted(model, ["first"], [-0.5])
    model.add_weighted_adapter(["first"], [-0.5], "scaled")
    assert_same_deltas(deltas(model, "scaled"), expected)
    for name, parameter in model.named_parameters():
        if ".scaled." in name:
            assert parameter.shape == model.get_parameter(name.replace(".scaled.", ".first.")).shape


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
