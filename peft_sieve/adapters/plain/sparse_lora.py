"""The sparse adapter that has given factors: its configuration, and the tensors of its experts and of all else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import nn

from ...tuners.common.experts.factors import SLOTS_KEY, slots_of
from ...tuners.common.experts.layer import FACTOR_GROUPS, expert_layers
from ...tuners.sieve.config import SieveLoraConfig
from ..reading import KEY_PREFIX, lora_factors, lora_layers
from .full_lora import ExpertPairs


def sparse_config(
    given: LoraConfig,
    mask: Mapping[str, list[int]],
    pairs: ExpertPairs,
    others: Mapping[str, LoraLayer],
    base: nn.Module,
    calibration: dict[str, Any] | None,
) -> SieveLoraConfig:
    """The configuration of a sparse adapter that keeps the ranks and scalings of an ordinary LoRA.

    Args:
        given: of the LoRA.
        mask, pairs, others: what is kept of its experts; the factors; its other layers.
        base: the base model without adapters.
    """
    name = next(iter(others.values())).active_adapters[0] if others else ""
    # What each thing adapted has: (rank, scaling).
    settings = {f"{path}.{p}": (f.a.shape[0], f.scaling) for path in mask for (p, _), f in pairs[path].items()}
    settings |= {path: (module.r[name], module.scaling[name]) for path, module in others.items()}
    (rank, scaling), *_ = settings.values()
    targets = set(others)
    names = {path for path, _ in base.named_modules() if path}
    return SieveLoraConfig(
        r=rank,
        lora_alpha=_alpha(rank, scaling),  # type: ignore[arg-type]
        lora_dropout=given.lora_dropout,
        rank_pattern={path: r for path, (r, _) in settings.items() if r != rank},
        alpha_pattern={path: _alpha(r, s) for path, (r, s) in settings.items() if (r, s) != (rank, scaling)},
        selected_experts=dict(mask),
        expert_projections=sorted({projection for of in pairs.values() for projection, _ in of}),
        train_attention=False,
        train_shared_experts=False,
        train_router=False,
        # Routers, too: those that the LoRA has, whether experts of their layers are kept or not.
        target_modules=sorted(_find_minimal_target_modules(targets, names - targets)) if targets else [],
        calibration=calibration,
        task_type=given.task_type,
        base_model_name_or_path=given.base_model_name_or_path,
        revision=given.revision,
        inference_mode=True,
    )


def sparse_tensors(
    model: PeftModel, pairs: ExpertPairs, others: Mapping[str, LoraLayer], name: str
) -> dict[str, torch.Tensor]:
    """The tensors of a sparse adapter, under the keys of a saved one.

    Args:
        model: has the adapter, on the meta device.
        pairs, others: factors of its experts, and what it has besides, with the adapter `name`.
    """
    tensors = {}
    for path, layer in expert_layers(model.get_base_model()):
        ids = layer.plans["default"].experts
        for group, projections in FACTOR_GROUPS.items():
            inside = [p for p in projections if (p, ids[0]) in pairs[path]]
            if inside:
                rows = [[pairs[path][p, e] for p in inside] for e in ids]
                tensors[f"{path}.{group}_A.weight"] = torch.stack([torch.cat([pair.a for pair in row]) for row in rows])
                tensors[f"{path}.{group}_B.weight"] = torch.stack(
                    [torch.cat([pair.b.T for pair in row]) for row in rows]
                )
        tensors[f"{path}{SLOTS_KEY}"] = slots_of(layer.shape.num_experts, ids)
    for path, module in lora_layers(model.get_base_model(), "default"):
        ending = "" if "default" in module.lora_embedding_A else ".weight"
        kind = "lora" if ending else "lora_embedding"
        for side, value in zip("AB", lora_factors(others[path], name), strict=True):
            tensors[f"{path}.{kind}_{side}{ending}"] = value
    return {f"{KEY_PREFIX}{key}": value.cpu().contiguous() for key, value in tensors.items()}


def _alpha(rank: int, scaling: float) -> float:
    alpha = rank * scaling
    return int(alpha) if alpha == int(alpha) else alpha
