"""`add_weighted_adapter`: a new adapter that is a weighted sum of others, on the union of their experts and modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...errors import SieveError
from ...moe.families.family import PROJECTIONS
from ..common.experts.layer import SieveExpertLayer
from .combination import COMBINATION_TYPES, Share, combine, combine_stacked, combined_rank
from .config import SieveLoraConfig


def weighted_config(
    model: nn.Module,
    configs: dict[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
) -> SieveLoraConfig:
    """The configuration of the sum: one rank and one scaling everywhere, so that it needs no patterns.

    Args:
        configs: the `SieveLoraConfig` of every adapter, by name.

    Raises:
        SieveError: these adapters have no such sum; nothing was changed.
    """
    _check_sum(configs, adapters, weights, combination_type, svd_rank)
    ranks = [_checked_ranks(path, found, combination_type) for path, found in _ranks(model, adapters)]
    rank = max(combined_rank(combination_type, found) for found in ranks)
    if combination_type == "svd" and svd_rank is not None:
        rank = svd_rank
    chosen = [configs[name] for name in adapters]
    mask: dict[str, set[int]] = {}
    for config in chosen:
        for path, ids in (config.selected_experts or {}).items():
            if config.adapts(ids):
                mask.setdefault(path, set()).update(ids)
    plain = [(path, m) for path, m in model.named_modules() if isinstance(m, LoraLayer) and _holds(m, adapters)]
    return replace(
        chosen[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        hellori_density=None,
        cold_experts="shared" if any(c.cold_experts == "shared" for c in chosen) else "frozen",
        share_outer=all(c.share_outer for c in chosen),
        selected_experts={path: sorted(ids) for path, ids in mask.items()},
        expert_projections=[p for p in PROJECTIONS if any(p in (c.expert_projections or PROJECTIONS) for c in chosen)],
        train_router=False,
        # By their full names, to which no other rule is left to apply; routers, too.
        target_modules=[path for path, _ in plain],
        target_parameters=None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        # The experts come from several calibrations.
        calibration=None,
        expert_shapes=None,
        calib_dataset=None,
        calib_tokenizer=None,
        calib_formatting_func=None,
    )


@torch.no_grad()
def fill_weighted(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """Give the factors of `adapter_name`, which is in `model` already, their values."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_dropout:
            # New modules are in training mode, whatever the model is in.
            layer.lora_dropout[adapter_name].train(model.training)
        if isinstance(layer, SieveExpertLayer):
            if adapter_name not in layer.plans:
                continue
            for projection in layer.plans[adapter_name].ranks:
                _fill_experts(layer, projection, adapters, weights, adapter_name, combination_type)
        elif isinstance(layer, LoraLayer) and _holds(layer, [adapter_name]):
            a, b = _plain_factors(layer, adapter_name)
            found = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if _holds(layer, [name])]
            scaling: dict[str, float] = layer.scaling
            shares = [Share(*_plain_factors(layer, name), weight * scaling[name]) for name, weight in found]
            _fill(a, b, shares, combine, combination_type)


def _fill(a: torch.Tensor, b: torch.Tensor, shares: list[Share], how: Any, combination_type: str) -> None:
    if not shares:
        a.zero_()
        b.zero_()
        return
    new_a, new_b = how(combination_type, shares, a.shape[-2])
    a.copy_(new_a)
    b.copy_(new_b)


def _fill_experts(
    layer: SieveExpertLayer,
    projection: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    """The same for one projection of experts."""
    factors, plan = layer.factors(adapter_name, projection), layer.plans[adapter_name]
    assert factors is not None
    a, b, _ = factors
    in_slots = [*((expert,) for expert in plan.experts), *([plan.cold] if plan.cold else [])]
    shares = []
    for name, weight in zip(adapters, weights, strict=True):
        held = layer.factors(name, projection) if name in layer.plans else None
        if held is not None:
            # Experts that are cold in the sum are cold in each adapter: the first of them stands for all.
            slots = [layer.plans[name].slot_of.get(experts[0]) for experts in in_slots]
            own_a, own_b = (_for_slots(own, slots, new) for own, new in zip(held[:2], (a, b), strict=True))
            shares.append(Share(own_a, own_b, weight * held[2]))
    if plan.share_outer:
        # All experts count, those that share a matrix, too.
        _fill(a, b, shares, partial(combine_stacked, counts=[len(experts) for experts in in_slots]), combination_type)
    else:
        _fill(a, b, shares, combine, combination_type)


def _for_slots(factor: torch.Tensor, slots: Sequence[int | None], new: torch.Tensor) -> torch.Tensor:
    """An adapter's factor in the form of the sum's.

    Args:
        factor: (the adapter's slots, rank, features); one slot where it is the same for all.
        slots: of the adapter, for each slot of the sum; None where it has no adapter.
        new: the factor of the sum; one slot where it is the same for all.

    Returns:
        (slots of the sum, rank, features), zeros where the adapter has none.
    """
    if len(new) < len(slots):
        return factor
    wide = factor.new_zeros(len(slots), *factor.shape[1:])
    held = {place: slot for place, slot in enumerate(slots) if slot is not None}
    wide[list(held)] = factor[[slot if len(factor) > 1 else 0 for slot in held.values()]]
    return wide


def _plain_factors(layer: Any, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (rank, out) of a linear layer, an embedding or a router: views of its parameters."""
    if adapter_name in layer.lora_A:
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    else:
        a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    return a.detach(), b.detach().transpose(0, 1)  # a view, so that it can be written to


def _holds(layer: LoraLayer, adapters: Sequence[str]) -> bool:
    return any(name in layer.lora_A or name in layer.lora_embedding_A for name in adapters)


def _ranks(model: nn.Module, adapters: Sequence[str]) -> list[tuple[str, list[int]]]:
    """For each module or projection of experts that an adapter has: its path and the adapters' ranks."""
    found = []
    for path, layer in model.named_modules():
        if isinstance(layer, SieveExpertLayer):
            plans = [layer.plans[name] for name in adapters if name in layer.plans]
            for projection in layer.shape.projections:
                found.append((f"{path}.{projection}", [p.ranks[projection] for p in plans if projection in p.ranks]))
        elif isinstance(layer, LoraLayer):
            names = [name for name in adapters if _holds(layer, [name])]
            if any(_plain_factors(layer, name)[0].dim() != 2 for name in names):
                raise SieveError(
                    f"add_weighted_adapter met the adapted convolution {path}, expected linear layers, embeddings and "
                    "experts: activate the adapters at once with set_adapter instead"
                )
            found.append((path, [layer.r[name] for name in names]))
    return [(path, ranks) for path, ranks in found if ranks]


def _checked_ranks(path: str, ranks: list[int], combination_type: str) -> list[int]:
    if combination_type == "linear" and len(set(ranks)) > 1:
        raise SieveError(
            f"combination_type='linear' adds up factors and the adapters have the ranks {ranks} in {path}, expected "
            "one rank: use combination_type='cat' or 'svd'"
        )
    return ranks


def _check_sum(
    configs: dict[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
) -> None:
    if combination_type not in COMBINATION_TYPES:
        raise SieveError(
            f"combination_type is {combination_type!r}, expected one of {', '.join(COMBINATION_TYPES)}, since the "
            "others prune a whole weight and experts that only some adapters have would be pruned as if they were "
            "zeros: use one of these"
        )
    unknown = sorted(set(adapters) - set(configs))
    if unknown or not adapters:
        raise SieveError(
            f"add_weighted_adapter was called for {list(adapters)}, expected one or more of {sorted(configs)}: pass "
            "the names of adapters that are loaded"
        )
    if len(weights) != len(adapters):
        raise SieveError(
            f"add_weighted_adapter got {len(weights)} weights for {len(adapters)} adapters, expected one each: pass "
            "as many weights as adapters"
        )
    if svd_rank is not None and (isinstance(svd_rank, bool) or not isinstance(svd_rank, int) or svd_rank < 1):
        raise SieveError(f"svd_rank is {svd_rank!r}, expected a positive whole number or None: pass one")
    for name in adapters:
        _check_low_rank(name, configs[name])


def _check_low_rank(name: str, config: SieveLoraConfig) -> None:
    if config.expert_tuning != "lora":
        raise SieveError(
            f"adapter '{name}' has expert_tuning={config.expert_tuning!r}, expected only low-rank factors for a "
            "weighted sum: activate the adapters at once with set_adapter instead"
        )
    neutral: dict[str, Any] = {"modules_to_save": None, "trainable_token_indices": None, "bias": "none"}
    for field, value in neutral.items():
        given = getattr(config, field)
        if given and given != value:
            raise SieveError(
                f"adapter '{name}' has {field}={given!r}, expected only low-rank factors for a weighted sum: activate "
                "the adapters at once with set_adapter, or train without it"
            )
