"""Which modules an adapter goes on: experts from the mask, the rest from the config's switches."""

from __future__ import annotations

import copy
import re

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from ...errors import SieveError
from ...moe.families import PROJECTIONS
from ...moe.topology import MoELayer, Router, attention_linears, base_modules
from .config import SieveLoraConfig


def wanted_layers(config: SieveLoraConfig, layers: list[MoELayer]) -> list[MoELayer]:
    """The MoE layers that `layers_to_transform`, `layers_pattern` and `exclude_modules` leave over.

    Raises:
        SieveError: none is left.
    """
    probe = copy.copy(config)
    kept = []
    for layer in layers:
        # PEFT's own rule, asked about the experts module by its last name (a full name skips the layer indices). An
        # excluded one comes back as a falsy marker.
        probe.target_modules = [layer.path.rpartition(".")[2]]
        if check_target_module_exists(probe, layer.path):
            kept.append(layer)
    if not kept:
        raise SieveError(
            f"layers_to_transform={config.layers_to_transform} and exclude_modules={config.exclude_modules} leave none "
            f"of the {len(layers)} MoE layers, expected at least one: widen them"
        )
    return kept


def resolve_targets(config: SieveLoraConfig, model: nn.Module, layers: list[MoELayer]) -> None:
    """Fill in `target_modules` (linear layers) and `target_parameters` (expert stacks and routers).

    Raises:
        SieveError: the config names parameters that its switches would not adapt.
    """
    masked = [layer for layer in layers if (config.selected_experts or {}).get(layer.path)]
    if config.target_modules is None:
        config.target_modules = _exactly(set(_always_active(config, model, layers)), config, model)  # type: ignore
    else:
        _keep_out_of_experts(config, model, layers)
    resolved = sorted({name for layer in masked for name in _parameter_names(config, layer)})
    foreign = sorted(set(config.target_parameters or ()) - set(resolved))
    if foreign:
        raise SieveError(
            f"target_parameters names {foreign}, expected None, since experts are chosen by selected_experts and "
            "expert_projections and the router by train_router: leave it out"
        )
    config.target_parameters = resolved


def router_parameters(config: SieveLoraConfig, layers: list[MoELayer]) -> list[Router]:
    """The routers to adapt whose weight is a bare parameter."""
    if not config.train_router:
        return []
    return [router for layer in layers for router in layer.routers if router.parameter is not None]


def _always_active(config: SieveLoraConfig, model: nn.Module, layers: list[MoELayer]) -> list[str]:
    paths = attention_linears(model, layers) if config.train_attention else []
    for layer in layers:
        if config.train_router:
            paths += [router.path for router in layer.routers if router.parameter is None]
        if config.train_shared_experts:
            paths += layer.shared_linears
    return paths


def _exactly(paths: set[str], config: SieveLoraConfig, model: nn.Module) -> set[str] | str:
    """What makes PEFT match these modules and no others: it takes a path for the ending of longer ones, too.

    So where another model is inside, whose paths end the same, the paths become a pattern.
    """
    longer = {path for path in base_modules(model) if path not in paths and _endings(path) & paths}
    if not longer or config.layers_to_transform is not None:  # which goes with names only
        return paths
    return "|".join(re.escape(path) for path in sorted(paths))


def _endings(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[start:]) for start in range(1, len(parts))}


def _keep_out_of_experts(config: SieveLoraConfig, model: nn.Module, layers: list[MoELayer]) -> None:
    """A pattern such as "gate_proj" or "all-linear" also matches inside a ModuleList of experts: only the mask decides
    there."""
    inside = tuple(layer.path + "." for layer in layers)
    modules = base_modules(model)
    if not any(isinstance(m, nn.Linear) for path, m in modules.items() if path.startswith(inside)):
        return
    _maybe_include_all_linear_layers(config, model)
    matched = {path for path in modules if path and check_target_module_exists(config, path)}
    config.target_modules = {path for path in matched if not path.startswith(inside)}  # type: ignore[assignment]


def _parameter_names(config: SieveLoraConfig, layer: MoELayer) -> list[str]:
    """Names in PEFT's sense, that is endings of full names; the index of the block is left out."""
    parts = layer.experts_path.split(".")
    last_index = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    wanted = [p for p in layer.shape.projections if p in (config.expert_projections or PROJECTIONS)]
    prefix = ".".join(parts[last_index + 1 :])
    names = [f"{prefix}.{name}" for name in layer.family.parameter_names(layer.experts, wanted)]
    for router in router_parameters(config, [layer]):
        names.append(".".join(router.path.split(".")[last_index + 1 :]) + f".{router.parameter}")
    return names
