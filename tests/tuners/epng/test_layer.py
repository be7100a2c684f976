"""Experts of ranks that differ: against an expert-at-a-time reference, before and after rows moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_sieve import EpngConfig, SieveError, SieveLoraConfig
from peft_sieve.moe.families.registry import family_of
from peft_sieve.moe.topology import MoELayer
from peft_sieve.tuners.common.optimizers import remember_optimizers
from peft_sieve.tuners.epng.layer import EpngFusedExperts
from tests.reference import NaiveAdapter, assert_same, naive_experts
from tests.tuners.test_expert_layer import (  # noqa: F401 (the fixture)
    LAYOUTS,
    backend,
    dispatch,
    gradients,
    make_experts,
    make_layer,
    randomize,
)

PATH = "layer.experts"
EXPERTS = [0, 1, 2, 4, 6]
# What an update makes of five experts with two blocks each: 0 and 4 gone, 1 and 6 grown by two and by two.
MOVED = {1: 4, 2: 2, 6: 4}
# A module's packed factors and the projections in them, as the reference reads them.
GROUPS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def ragged_layer(
    layout: str = "olmoe", ids: list[int] | None = None, dtype: torch.dtype = torch.float64, **options: Any
) -> EpngFusedExperts:
    """Random factors of equal rank."""
    experts = make_experts(layout, dtype)
    family = family_of(experts)
    assert family is not None
    layer = EpngFusedExperts(experts, MoELayer(PATH, experts, family, family.shape(experts), (), ()))
    layer.update_layer("default", EXPERTS if ids is None else ids, config(ids, **options))
    randomize(layer)
    return layer


def config(ids: list[int] | None = None, **options: Any) -> EpngConfig:
    mask = {PATH: EXPERTS if ids is None else ids}
    return EpngConfig(**{"r": 4, "rank_block": 2, "lora_dropout": 0.0, "selected_experts": mask, **options})


def move(layer: EpngFusedExperts, blocks: dict[int, int] | None = None, step: int = 7) -> None:
    blocks = MOVED if blocks is None else blocks
    rows = layer.new_rows("default", blocks, (0, step))
    layer.move("default", blocks, rows, layer.tensors_by_row("default"), step)


def moved_layer(layout: str = "olmoe", **options: Any) -> EpngFusedExperts:
    """Random factors of ranks that differ."""
    layer = ragged_layer(layout, **options)
    move(layer)
    randomize(layer)
    return layer


def read_by_hand(layer: EpngFusedExperts, block_ranks: dict[str, int]) -> dict[tuple[str, int], NaiveAdapter]:
    """The factors of each expert: experts of fewer blocks first, of as many by id, and an expert's gate before its up.

    Args:
        block_ranks: projection -> rank of a block.
    """
    slots = layer.slots_module("default")
    blocks = {e: n for e, n in enumerate(slots.blocks.tolist()) if n}
    found = {}
    for side, projections in GROUPS.items():
        if f"lora_{side}_A" not in {name.rpartition(".default")[0] for name, _ in layer.named_parameters()}:
            continue
        a, b = (getattr(layer, f"lora_{side}_{s}")["default"].weight for s in "AB")
        start = 0
        for _, expert in sorted((n, e) for e, n in blocks.items()):
            for projection in projections:
                if projection in block_ranks:
                    rows = slice(start, start := start + blocks[expert] * block_ranks[projection])
                    scaling = layer.scaling["default"] * layer.plans["default"].relative_scaling[projection]
                    found[projection, expert] = NaiveAdapter(a[rows], b[rows], scaling)
        assert start == a.shape[0] == b.shape[0]
    return found


def compare(
    layer: EpngFusedExperts, block_ranks: dict[str, int], dtype: torch.dtype = torch.float64, **close: float
) -> None:
    """Output and every gradient against the reference."""
    hidden, ids, weights = dispatch(dtype)
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    out = layer(hidden, ids, weights)
    (out * target).sum().backward()
    fast = gradients(layer, hidden, weights)
    expected = naive_experts(layer.get_base_layer(), hidden, ids, weights, [read_by_hand(layer, block_ranks)])
    (expected * target).sum().backward()
    slow = gradients(layer, hidden, weights)
    assert_same(out.detach(), expected.detach(), "output", **close)
    assert fast.keys() == slow.keys() and len(fast) == 6
    for name in fast:
        assert_same(fast[name], slow[name], name, **close)


def ranks_of(layer: EpngFusedExperts, rank: int = 2) -> dict[str, int]:
    return dict.fromkeys(layer.shape.projections, rank)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_equals_the_reference_before_and_after_an_update(layout: str, implementation: str) -> None:
    layer = ragged_layer(layout)
    layer.get_base_layer().config._experts_implementation = implementation
    compare(layer, ranks_of(layer))
    move(layer)
    randomize(layer)
    compare(layer, ranks_of(layer))
    assert layer.slots_module("default").blocks.tolist() == [0, 4, 2, 0, 0, 0, 4, 0]


def test_equals_the_reference_in_float32(backend: str) -> None:  # noqa: F811
    layer = moved_layer(dtype=torch.float32)
    compare(layer, ranks_of(layer), torch.float32, rtol=1e-3, atol=1e-4)


def test_projections_of_ranks_of_their_own() -> None:
    layer = moved_layer(rank_pattern={"up_proj": 6}, alpha_pattern={"up_proj": 3})
    compare(layer, {"gate_proj": 2, "up_proj": 3, "down_proj": 2})


def test_some_projections_only() -> None:
    layer = moved_layer(expert_projections=["up_proj"])
    block_ranks = {"up_proj": 2}
    hidden, ids, weights = dispatch()
    out = layer(hidden, ids, weights)
    expected = naive_experts(layer.get_base_layer(), hidden, ids, weights, [read_by_hand(layer, block_ranks)])
    assert_same(out.detach(), expected.detach(), "output")


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_of_equal_ranks_it_is_the_sieve_layer_to_the_bit(dropout: float) -> None:
    """Values at the start, output and gradients."""
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout}
    torch.manual_seed(1)
    sieve = make_layer("olmoe", EXPERTS, torch.float32, **options)
    torch.manual_seed(1)
    ragged = ragged_layer("olmoe", dtype=torch.float32, **options)
    torch.manual_seed(2)
    sieve.update_layer("default", EXPERTS, SieveLoraConfig(**options))
    torch.manual_seed(2)
    ragged.update_layer("default", EXPERTS, config(**options))
    found = {}
    for layer in (sieve, ragged):
        parameters = {n: p.detach().clone().flatten() for n, p in layer.named_parameters() if "lora_" in n}
        assert all(p.any() != ("_B" in n) for n, p in parameters.items())
        randomize(layer)
        hidden, ids, weights = dispatch(torch.float32)
        torch.manual_seed(3)
        out = layer(hidden, ids, weights)
        out.square().sum().backward()
        given = gradients(layer, hidden, weights)
        found[layer] = [out, *parameters.values(), *(g.flatten() for g in given.values())]
    assert len(found[sieve]) == len(found[ragged]) == 11
    assert all(torch.equal(a, b) for a, b in zip(found[sieve], found[ragged], strict=True))


def test_dropout_hits_the_same_elements_whatever_the_ranks() -> None:
    """New ranks change nothing yet, so neither does dropout if it is drawn as before."""
    layer = ragged_layer(lora_dropout=0.5)
    hidden, ids, weights = dispatch()
    ids = torch.stack([torch.tensor([1, 2, 3])[torch.randperm(3)] for _ in ids])  # 1 grows, 2 stays
    torch.manual_seed(0)
    before = layer(hidden, ids, weights)
    move(layer)
    assert len(layer.packs("default", "lora_gate_up")) == 2
    torch.manual_seed(0)
    assert_same(layer(hidden, ids, weights).detach(), before.detach(), "output")
    assert not torch.allclose(layer(hidden, ids, weights), before), "dropout must show, or the test sees nothing"


# --- an update ------------------------------------------------------------------------------------------------------


def test_an_update_leaves_the_function_of_those_that_stay() -> None:
    layer = ragged_layer()
    hidden, ids, weights = dispatch()
    kept = sorted(MOVED)
    before = naive_experts(
        layer.get_base_layer(),
        hidden,
        ids,
        weights,
        [{key: f for key, f in read_by_hand(layer, ranks_of(layer)).items() if key[1] in kept}],
    ).detach()
    everything = layer(hidden, ids, weights).detach()
    move(layer)
    assert_same(layer(hidden, ids, weights).detach(), before, "output")
    assert not torch.allclose(everything, before), "pruning must show, or the test sees nothing"


def test_new_rows_are_orthogonal_and_their_columns_zero() -> None:
    layer = ragged_layer(r=8, rank_block=4)
    before = {key: (f.a.clone(), f.b.clone()) for key, f in read_by_hand(layer, ranks_of(layer, 4)).items()}
    move(layer)
    for (projection, expert), factors in read_by_hand(layer, ranks_of(layer, 4)).items():
        a, b = before[projection, expert]
        rank = a.shape[0]
        assert torch.equal(factors.a[:rank], a) and torch.equal(factors.b[:rank], b)
        new = factors.a[rank:]
        assert new.shape[0] == (8 if expert in (1, 6) else 0)
        assert not factors.b[rank:].any()
        if expert in (1, 6):
            length = a.norm(dim=1).mean()
            assert (new @ a.T).abs().max() < 1e-12 * length**2
            assert torch.allclose(new @ new.T, torch.eye(8, dtype=torch.float64) * length**2, atol=1e-12)


def test_experts_grow_in_directions_of_their_own() -> None:
    layer = ragged_layer()
    move(layer)
    factors = read_by_hand(layer, ranks_of(layer))
    new = [factors[p, e].a[4:] for p in ("gate_proj", "up_proj") for e in (1, 6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(new) for b in new[:i])


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_and_gradients_follow_their_rows(name: str) -> None:
    remember_optimizers()
    layer = ragged_layer()
    optimizer = OPTIMIZERS[name]([p for p in layer.parameters() if p.requires_grad])
    for _ in range(2):
        hidden, ids, weights = dispatch()
        layer(hidden, ids, weights).square().sum().backward()
        optimizer.step()
    parameters = dict(layer.named_parameters())
    names = [n for n in parameters if "lora_" in n]
    rows_before = {n: rows_by_expert(layer, n) for n in names}
    before = {n: {k: v.clone() for k, v in optimizer.state[parameters[n]].items()} for n in names}
    grads = {n: parameters[n].grad.clone() for n in names}
    move(layer)
    for n in names:
        assert layer.get_parameter(n) is parameters[n], "the optimizer must not lose its parameters"
        rows = rows_by_expert(layer, n)
        states = {"grad": (grads[n], parameters[n].grad)} | {
            k: (before[n][k], v) for k, v in optimizer.state[parameters[n]].items() if v.dim()
        }
        assert len(states) > 1
        for old, new in states.values():
            for key, where in rows.items():
                stayed = min(len(where), len(rows_before[n][key]))
                assert torch.equal(new[where[:stayed]], old[rows_before[n][key][:stayed]])
                assert not new[where[stayed:]].any()
        assert states["grad"][0].any()
    assert all(before[n].get("step", 2) == 2 for n in names)
    optimizer.step()


def rows_by_expert(layer: EpngFusedExperts, name: str) -> dict[tuple[str, int], torch.Tensor]:
    """Which rows of a factor are whose, found by numbering its rows."""
    parameter = layer.get_parameter(name)
    kept = parameter.data.clone()
    parameter.data.copy_(torch.arange(len(kept), dtype=kept.dtype).unsqueeze(1).expand_as(kept))
    side = "a" if "_A" in name else "b"
    found = {
        key: getattr(f, side)[:, 0].detach().long()
        for key, f in read_by_hand(layer, ranks_of(layer)).items()
        if (key[0] == "down_proj") == ("_down_" in name)
    }
    parameter.data.copy_(kept)
    return found


def test_an_optimizer_whose_states_cannot_follow_is_refused_and_nothing_moved() -> None:
    from transformers import Adafactor

    remember_optimizers()
    layer = ragged_layer(dtype=torch.float32)
    optimizer = Adafactor([p for p in layer.parameters() if p.requires_grad], lr=0.01, relative_step=False)
    hidden, ids, weights = dispatch(torch.float32)
    layer(hidden, ids, weights).square().sum().backward()
    optimizer.step()
    before = {n: p.clone() for n, p in layer.named_parameters()}
    with pytest.raises(SieveError, match="Adafactor keeps exp_avg_sq_row of shape .* AdamW"):
        move(layer)
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())


def test_shapes_and_storage_stay_the_same() -> None:
    layer = ragged_layer()
    before = {n: (p.shape, p.data_ptr()) for n, p in layer.named_parameters()}
    move(layer)
    assert {n: (p.shape, p.data_ptr()) for n, p in layer.named_parameters()} == before
    # 5 experts of rank 4, each with hidden 32 and intermediate 24.
    expected = 5 * 4 * (2 * (32 + 24) + (24 + 32))
    assert sum(p.numel() for n, p in layer.named_parameters() if "lora_" in n) == expected


def test_rows_that_are_not_there_are_not_computed() -> None:
    """The products' widths are the experts' own ranks: what passes through them says so."""
    layer = moved_layer()
    widths = {tuple(pack.slots.of): pack.a.shape[1] for pack in layer.packs("default", "lora_down")}
    assert widths == {(2,): 4, (1, 6): 8}


def test_the_factors_of_all_experts_are_no_tensor() -> None:
    with pytest.raises(SieveError, match="use expert_factors"):
        moved_layer().factors("default", "up_proj")


def test_deltas_by_hand() -> None:
    for layer in (ragged_layer(), moved_layer()):
        for (projection, expert), f in read_by_hand(layer, ranks_of(layer)).items():
            assert_same(layer.get_delta_weight("default", projection, expert), f.scaling * f.b.T @ f.a, "delta")
        assert layer.expert_factors("default", "up_proj", 7) is None
