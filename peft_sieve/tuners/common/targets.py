"""Which modules an adapter goes on: experts from the mask, the rest from the config's switches."""

from __future__ import annotations

import copy
import re
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from ...checks import shown
from ...errors import SieveError
from ...moe.attention import attention_linears
from ...moe.families.family import PROJECTIONS, ExpertsShape
from ...moe.linear import is_linear
from ...moe.topology import MoELayer, Router, base_modules


def is_wanted(config: Any, path: str) -> bool:
    """Whether `layers_to_transform`, `layers_pattern`, `exclude_modules` and `modules_to_save` leave `path` over."""
    probe = copy.copy(config)
    # PEFT's own rule, asked about the module by its last name: a full name skips the layer indices. What is excluded
    # comes back as a falsy marker.
    probe.target_modules = [path.rpartition(".")[2]]
    return bool(check_target_module_exists(probe, path))


def adapted_projections(config: Any, layer_path: str, shape: ExpertsShape) -> list[str]:
    """The projections of one layer's experts that get an adapter."""
    chosen = config.expert_projections or PROJECTIONS
    return [name for name in shape.projections if name in chosen and is_wanted(config, f"{layer_path}.{name}")]


def wanted_layers(config: Any, layers: list[MoELayer]) -> list[MoELayer]:
    """The MoE layers that `layers_to_transform`, `layers_pattern`, `exclude_modules` and `modules_to_save` leave over,
    of those that the mask names, if there is one.

    Raises:
        SieveError: none is left.
    """
    mask = config.selected_experts
    named = [layer for layer in layers if mask is None or _in_mask(config, layer)]
    kept = [
        layer
        for layer in named
        if is_wanted(config, layer.path) and adapted_projections(config, layer.path, layer.shape)
    ]
    if not kept:
        names = ("layers_to_transform", "exclude_modules", "modules_to_save", "expert_projections")
        given = " and ".join(
            f"{name}={shown(getattr(config, name))}" for name in names if getattr(config, name) is not None
        )
        raise SieveError(
            f"The settings {given} leave none of the {len(named)} MoE layers"
            f"{'' if mask is None else ' of selected_experts'}. Change them."
        )
    return kept


def resolve_targets(config: Any, model: nn.Module, layers: list[MoELayer]) -> None:
    """Fill in `target_modules` (linear layers, and routers that were named) and `target_parameters` (expert stacks and
    the weights of routers).

    Args:
        layers: all MoE layers of the model.

    Raises:
        SieveError: the config names other parameters than its mask and its switches do, weights of routers left out.
    """
    experts = {name for layer in layers if _in_mask(config, layer) for name in _expert_parameters(config, layer)}
    named = None if experts & set(config.target_parameters or ()) else _named_routers(config, model, layers)
    if config.target_modules is None:
        paths = {*_always_active(config, model, layers), *(named or ())}
        config.target_modules = exactly(paths, config, model)
    else:
        _keep_out_of_experts(config, model, layers)
        if named:
            _maybe_include_all_linear_layers(config, model)
            config.target_modules = exactly(named | _matched(config, model), config, model)
    weights = {_without_block(f"{router.path}.{router.parameter}") for router in router_parameters(config, layers)}
    resolved = sorted(experts | weights)
    if config.target_parameters and named is None and set(config.target_parameters) != set(resolved):
        raise SieveError(
            "target_parameters must be None or name weights of routers, got "
            f"{shown(sorted(config.target_parameters))}. Experts are chosen by selected_experts and expert_projections."
        )
    config.target_parameters = resolved


def router_parameters(config: Any, layers: list[MoELayer]) -> list[Router]:
    """The routers to adapt whose weight is a bare parameter: those that `target_modules` names, and with `train_router`
    those of the layers in the mask."""
    return [
        router
        for layer in layers
        for router in layer.routers
        if router.parameter is not None
        and is_wanted(config, router.path)
        and ((config.train_router and _in_mask(config, layer)) or _is_named(config, router.path))
    ]


def _in_mask(config: Any, layer: MoELayer) -> bool:
    """Whether experts of a layer are adapted; before calibration, whether they may be."""
    mask = config.selected_experts
    return mask is None or (layer.path in mask and config.adapts(mask[layer.path]))


def _is_named(config: Any, path: str) -> bool:
    return config.target_modules is not None and bool(check_target_module_exists(config, path))


def _named_routers(config: Any, model: nn.Module, layers: list[MoELayer]) -> set[str] | None:
    """Paths of the routers whose weights `target_parameters` names; None if it names anything else."""
    routers = {f"{r.path}.{r.parameter or 'weight'}": r.path for layer in layers for r in layer.routers}
    names = [f"{path}.{name}" for path, module in base_modules(model).items() for name in module._parameters]
    found = {n: {name for name in names if f".{name}".endswith(f".{n}")} for n in config.target_parameters or ()}
    if not all(matched and matched <= routers.keys() for matched in found.values()):
        return None
    return {routers[name] for matched in found.values() for name in matched}


def _always_active(config: Any, model: nn.Module, layers: list[MoELayer]) -> list[str]:
    paths = attention_linears(model, layers) if config.train_attention else []
    for layer in layers:
        if config.train_router:
            paths += [router.path for router in layer.routers if router.parameter is None]
        if config.train_shared_experts:
            paths += layer.shared_linears
    # PEFT takes full names for an order that stands above layers_to_transform.
    return [path for path in paths if is_wanted(config, path)]


def exactly(paths: set[str], config: Any, model: nn.Module) -> set[str] | str:
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


def _keep_out_of_experts(config: Any, model: nn.Module, layers: list[MoELayer]) -> None:
    """A pattern such as "gate_proj" or "all-linear" also matches inside a ModuleList of experts: only the mask decides
    there."""
    inside = tuple(layer.path + "." for layer in layers)
    modules = base_modules(model)
    if not any(is_linear(m) for path, m in modules.items() if path.startswith(inside)):
        return
    _maybe_include_all_linear_layers(config, model)
    config.target_modules = {path for path in _matched(config, model) if not path.startswith(inside)}


def _matched(config: Any, model: nn.Module) -> set[str]:
    return {path for path in base_modules(model) if path and check_target_module_exists(config, path)}


def _expert_parameters(config: Any, layer: MoELayer) -> list[str]:
    """Names in PEFT's sense, that is endings of full names; the index of the block is left out."""
    wanted = adapted_projections(config, layer.path, layer.shape)
    prefix = _without_block(layer.experts_path)
    return [f"{prefix}.{name}" for name in layer.family.parameter_names(layer.experts, wanted)]


def _without_block(path: str) -> str:
    parts = path.split(".")
    last_index = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last_index + 1 :])
