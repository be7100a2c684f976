"""The one pruning: each layer keeps the experts that it uses (DMEP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...checks import whole
from ...errors import SieveError
from ...routing.distributed import rank_and_world
from .config import MIN_KEPT, LoraMoeConfig
from .cutting import check_cuttable, cut
from .layer import LoraMoeLayer, lora_moe_layers


def experts_to_keep(tokens: Sequence[int], threshold: float) -> list[int]:
    """The experts of one layer that stay: `tokens` routed to each -> ascending ids.

    Those with at least `threshold` times the uniform share, and never fewer than two, the most used ones; of equals the
    lower id.
    """
    least = threshold * sum(tokens) / len(tokens)
    ranked = sorted(range(len(tokens)), key=lambda expert: (-tokens[expert], expert))
    count = sum(0 < tokens[expert] >= least for expert in ranked)
    return sorted(ranked[: max(MIN_KEPT, count)])


def adapters_to_prune(model: nn.Module) -> list[str]:
    """The adapters that are being trained and were not pruned yet."""
    layers = lora_moe_layers(model)
    names = [n for _, layer in layers for n, plan in layer.plans.items() if layer.is_trained(n) and not plan.pruned]
    return list(dict.fromkeys(names))


def refuse_several_processes() -> None:
    """Raise if there are several: each counts its own tokens, and DDP has sized its buckets for the full adapter."""
    _, world = rank_and_world()
    if world > 1:
        raise SieveError(
            f"LoRA experts are to be pruned under {world} processes, expected one, since their wrappers hold the "
            "shapes before pruning: train up to the pruning in one process and go on from its checkpoint in several, "
            "or set prune_step=None and prune_ratio=None"
        )


def update_and_prune(
    model: nn.Module, configs: dict[str, LoraMoeConfig], step: int, optimizer: Any, total_steps: int | None
) -> bool:
    """Prune every trained adapter whose step has come; see `LoraMoeModel.update_and_prune`.

    Args:
        model: the base model with the layers, whose paths the configurations use.
    """
    step = whole("step", step, least=0)
    due = {}
    for name in adapters_to_prune(model):
        at = configs[name].pruning_step(total_steps)
        if at is None:
            continue
        refuse_several_processes()
        if step >= at:
            due[name] = {path: layer for path, layer in lora_moe_layers(model) if name in layer.plans}
    kept = {name: _decide(name, layers, configs[name].prune_threshold) for name, layers in due.items()}
    cuts = []
    for name, layers in due.items():
        for path, layer in layers.items():
            cuts += layer.cuts(name, kept[name][path], path)
    if optimizer is not None:
        check_cuttable(cuts, optimizer)
    cut(cuts, optimizer)
    for name, layers in due.items():
        for path, layer in layers.items():
            layer.declare(name, kept[name][path], pruned=True)
        configs[name].kept_experts = kept[name]
    return bool(due)


def _decide(adapter_name: str, layers: dict[str, LoraMoeLayer], threshold: float) -> dict[str, list[int]]:
    counts = {path: layer.usage(adapter_name).tokens.tolist() for path, layer in layers.items()}
    if not any(map(sum, counts.values())):
        raise SieveError(
            f"adapter '{adapter_name}' is to be pruned and no token has been counted, expected forwards in training "
            "mode before: call model.train(), and the model itself rather than a part of it"
        )
    return {path: experts_to_keep(tokens, threshold) for path, tokens in counts.items()}
