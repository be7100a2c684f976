"""Which linear layers get LoRA experts."""

from __future__ import annotations

import copy

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from ...checks import shown
from ...errors import SieveError
from ...moe.families.registry import family_of
from ...moe.linear import is_linear
from ...moe.topology import base_modules, find_moe_layers, read_weights, standing_modules
from .config import LoraMoeConfig

CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def resolve_linear_targets(config: LoraMoeConfig, model: nn.Module) -> None:
    """Fill in `target_modules`, and refuse what cannot be adapted before anything is.

    Raises:
        SieveError: a target is no linear layer, or there is none, or the kept experts belong to other layers.
    """
    modules = base_modules(model)
    if config.target_modules is None:
        wanted = _all_linears(model, modules) - _heads(config, model, modules)
        config.target_modules = wanted  # type: ignore[assignment]
    else:
        wanted = None
    probe = copy.copy(config)
    _maybe_include_all_linear_layers(probe, model)
    matched = [path for path in modules if path and check_target_module_exists(probe, path)]
    if wanted is not None and not set(matched) <= wanted:
        path = sorted(set(matched) - wanted)[0]
        raise SieveError(
            f"the model has {path} beside a layer of which it is the ending, expected names that tell them apart: "
            "set target_modules"
        )
    for path in matched:
        if not is_linear(modules[path]):
            raise SieveError(
                f"target_modules names {path}, a {type(modules[path]).__name__}, expected linear layers (experts in "
                "3-D stacks are adapted by SieveLoraConfig): leave it out"
            )
    if not matched:
        raise SieveError(
            f"target_modules={shown(config.target_modules)} and exclude_modules={shown(config.exclude_modules)} leave "
            f"no linear layer of {type(model).__name__}. Change them."
        )
    foreign = sorted(set(config.kept_experts or {}) - set(matched))
    if foreign:
        raise SieveError(
            f"kept_experts names {foreign[0]}, which is no targeted layer of {type(model).__name__}, expected the "
            "layers of the model that was pruned: load the adapter onto its base model"
        )


def _heads(config: LoraMoeConfig, model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """What a classifier has beside its backbone: PEFT trains that whole, and cannot where it has adapters."""
    if config.task_type not in CLASSIFIERS or not isinstance(model, PreTrainedModel):
        return set()
    backbone = {id(module) for module in model.base_model.modules()}
    return {path for path, module in modules.items() if id(module) not in backbone}


def _all_linears(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """All linear layers that are called and learn, but the output layer, routers, and what is inside routed experts."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    left_out = {path for path, module in standing_modules(model) if module is output}
    is_moe = any(family_of(module) is not None for module in modules.values())
    layers = find_moe_layers(model) if is_moe else []
    # In a layer whose weight is read instead of being called an adapter would not be seen.
    left_out |= set(read_weights(model, layers))
    for layer in layers:
        left_out |= {layer.experts_path, *(router.path for router in layer.routers)}
        block = layer.path.rpartition(".")[0]
        # Of one output: the gate of a shared expert, which is a router, too.
        left_out |= {
            path
            for path, module in modules.items()
            if path.startswith(f"{block}.") and is_linear(module) and getattr(module, "out_features", None) == 1
        }
    inside = tuple(f"{path}." for path in left_out)
    return {
        path
        for path, module in modules.items()
        if is_linear(module)
        and path not in left_out
        and not path.startswith(inside)
        # An indexer picks keys without gradients: an adapter in it would never learn.
        and "indexer" not in path.split(".")
    }
