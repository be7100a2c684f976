"""Plain LoRA for a MoE model in the two layouts there are, and what PEFT makes of its configuration.

`stacked` has the keys of PEFT's `target_parameters`: what its layers are called on the model. `per_expert` has a pair
of factors per matrix, named as in the base model's checkpoint; PEFT turns those into its own when it loads them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn
from transformers import PreTrainedModel

from ...errors import SieveError
from ...moe.families.fused import FusedExperts
from ...moe.families.modules import ModuleExperts
from ...moe.linear import is_linear
from ...moe.topology import MoELayer
from ..checkpoint.names import expert_names, module_names
from ..reading import OpenedAdapter, first_line
from ..stack_layout import parameters_of, projections_in
from .factors import Tensors, expert_factors, linear_factors

PREFIX = "base_model.model."


@dataclass(frozen=True)
class PlainLora:
    """A plain LoRA before it is written."""

    config: LoraConfig
    tensors: Tensors


def stacked(opened: OpenedAdapter, layers: list[MoELayer], others: dict[str, LoraLayer], rank: int) -> PlainLora:
    """PEFT's own layout for stacks of experts: keys are what its layers are called once they are on the model."""
    config = _plain_config(opened, rank)
    skeleton = opened.new_skeleton()
    _target(config, skeleton, others)
    _target_stacks(config, layers)
    plain = _injected(config, skeleton)
    experts = expert_factors(opened, layers, rank)
    stacks = {f"{layer.experts_path}.{parameter}": layer for layer in layers for parameter in parameters_of(layer)}
    tensors: Tensors = {}
    placed = set()
    for path, module in _plain_layers(plain):
        base_path = path.replace(".base_layer", "")
        stack = f"{base_path}.{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
        placed.add(stack if stack in stacks else base_path)
        if stack in stacks:
            factors = experts[stacks[stack].path]
            parameter = stack.removeprefix(f"{stacks[stack].experts_path}.")
            tensors[f"{PREFIX}{path}.lora_A.weight"] = _lazy(
                module.lora_A["default"], partial(factors.stacked_a, parameter)
            )
            tensors[f"{PREFIX}{path}.lora_B.weight"] = _lazy(
                module.lora_B["default"], partial(factors.stacked_b, parameter)
            )
        elif base_path in others:
            for key, make in linear_factors(others[base_path], opened.name, rank).items():
                tensors[f"{PREFIX}{path}.{key}"] = make
    wrong = sorted(placed ^ {*stacks, *others})
    if wrong:
        raise SieveError(
            f"plain PEFT cannot tell {wrong[0]} of {type(skeleton).__name__} from other modules by names ({len(wrong)} "
            "in all), expected adapters where it can: write a whole checkpoint (peft-sieve export --merge)"
        )
    return PlainLora(config, tensors)


def per_expert(opened: OpenedAdapter, layers: list[MoELayer], others: dict[str, LoraLayer], rank: int) -> PlainLora:
    """A pair of factors per matrix, named as the base model's checkpoint names it."""
    skeleton = opened.new_skeleton()
    names = module_names(skeleton, others)
    tensors: Tensors = {}
    for path, other in others.items():
        for key, make in linear_factors(other, opened.name, rank).items():
            tensors[f"{PREFIX}{names[path]}.{key}"] = make
    factors = expert_factors(opened, layers, rank)
    matrices = expert_names(skeleton, layers)
    for layer in layers:
        if layer.path not in matrices:
            raise SieveError(
                f"received layout='per_expert', and checkpoints of {opened.base_name or type(skeleton).__name__} hold "
                "the experts in stacks, so that nothing would load it, expected 'stacked' or 'auto': pass one of those"
            )
        for (projection, expert), name in matrices[layer.path].items():
            of, (in_features, out_features) = factors[layer.path], layer.shape.projections[projection]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = (rank, in_features), partial(of.a, projection, expert)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = (out_features, rank), partial(of.b, projection, expert)
    config = _plain_config(opened, rank)
    listed = [layer.path for layer in layers if isinstance(layer.family, ModuleExperts)]
    _target(config, skeleton, others, {name for path in listed for name in matrices[path].values()})
    fused = [layer for layer in layers if isinstance(layer.family, FusedExperts)]
    if fused:
        _target_matrices(config, skeleton, fused, others)
    plain = PlainLora(config, tensors)
    _check_loadable(plain, opened)
    return plain


def _lazy(module: nn.Module, make: Callable[[], torch.Tensor]) -> tuple[tuple[int, ...], Callable[[], torch.Tensor]]:
    assert isinstance(module.weight, torch.Tensor)
    return tuple(module.weight.shape), make


def _plain_config(opened: OpenedAdapter, rank: int) -> LoraConfig:
    config = opened.config
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=[],
        target_parameters=[],
        task_type=config.task_type,
        base_model_name_or_path=opened.base_name or config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _target(
    config: LoraConfig,
    skeleton: PreTrainedModel,
    others: dict[str, LoraLayer],
    in_experts: Iterable[str] = (),
) -> None:
    """Name the modules outside stacks of experts, in as few words as tell them apart from all others.

    Args:
        others: PEFT's own layers.
        in_experts: linear layers inside experts that are modules.
    """
    modules = {path for path, _ in skeleton.named_modules() if path}
    parameters = {path for path, _ in skeleton.named_parameters()}
    linears = {path for path, layer in others.items() if not isinstance(layer, ParamWrapper)} | set(in_experts)
    wrapped = {f"{path}.{x.parameter_name}" for path, x in others.items() if isinstance(x, ParamWrapper)}
    _target_modules(config, linears, modules)
    # PEFT takes some of these names for those of experts (`gate_proj`, in models that once had a module of that name
    # per expert). The weight of such a module by its own name means the same, and has the same keys.
    mistaken = {word for word in map(_without_index, linears) if _is_mistaken(config, skeleton, word)}
    taken = {path for path in linears if _without_index(path) in mistaken}
    if taken:
        _target_modules(config, linears - taken, modules)
        wrapped |= {f"{path}.weight" for path in taken}
    if wrapped:
        config.target_parameters = _fewest_words(wrapped, parameters)


def _target_modules(config: LoraConfig, wanted: set[str], modules: set[str]) -> None:
    """Name modules, and exclude those of a model inside this one whose whole paths end the same."""
    inside = {path for path in modules - wanted if not _endings(path).isdisjoint(wanted)}
    config.target_modules = _fewest_words(wanted, modules - inside)
    config.exclude_modules = _fewest_words(inside, modules) or None


def _endings(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[start:]) for start in range(1, len(parts))}


def _fewest_words(wanted: set[str], all_names: set[str]) -> list[str]:
    """Endings that fit the wanted names and no others."""
    return sorted(_find_minimal_target_modules(wanted, all_names - wanted)) if wanted else []


def _as_peft_converts(config: LoraConfig, skeleton: PreTrainedModel) -> LoraConfig:
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, skeleton, None)
    except ValueError as error:
        raise SieveError(
            f"plain PEFT takes modules of {type(skeleton).__name__} for matrices of its experts ({first_line(error)}), "
            "expected names that tell them apart: pass layout='stacked'"
        ) from error
    return converted


def _is_mistaken(config: LoraConfig, skeleton: PreTrainedModel, name: str) -> bool:
    """Whether PEFT takes the name of a module for one of experts."""
    alone = copy.copy(config)
    alone.target_modules = [name]
    try:
        return not check_target_module_exists(_as_peft_converts(alone, skeleton), name)
    except SieveError:
        return True


def _target_stacks(config: LoraConfig, layers: list[MoELayer]) -> None:
    """Name the stacks; a stack of two projections gets the ranks of both, since it has one A for both."""
    names = set(config.target_parameters or ())
    for layer in layers:
        for parameter in parameters_of(layer):
            names.add(_without_index(f"{layer.experts_path}.{parameter}"))
            count = len(projections_in(layer, parameter))
            if count > 1:
                key = f"{layer.experts_path.rpartition('.')[2]}.{parameter}"
                config.rank_pattern = {**(config.rank_pattern or {}), key: count * config.r}
                config.alpha_pattern = {**(config.alpha_pattern or {}), key: count * config.r}
    config.target_parameters = sorted(names)


def _target_matrices(
    config: LoraConfig, skeleton: PreTrainedModel, layers: list[MoELayer], others: dict[str, LoraLayer]
) -> None:
    """Name the experts' matrices as if they were modules.

    SGLang allocates by the last words in `target_modules`, vLLM goes by the keys, and PEFT turns the words into its
    parameters for some models; for the others those are named, too.
    """
    words = {projection for layer in layers for projection in layer.shape.projections}
    given = set(config.target_modules or ())
    config.target_modules = sorted(given | words)
    converted = set(_as_peft_converts(config, skeleton).target_parameters or ())
    stacks = {name for layer in layers for name in layer.family.parameter_names(layer.experts, list(words))}
    if not stacks <= converted:
        _target_stacks(config, layers)
    left_alone = {
        path
        for path, module in skeleton.named_modules()
        if is_linear(module) and path.rpartition(".")[2] in words and path not in others
    }
    if left_alone:
        modules = {path for path, _ in skeleton.named_modules() if path}
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *_fewest_words(left_alone, modules)})


def _without_index(path: str) -> str:
    """What follows the index of the block."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


# --- what plain PEFT makes of it ------------------------------------------------------------------------------------


def _injected(config: LoraConfig, skeleton: PreTrainedModel) -> PeftModel:
    """Plain LoRA on the meta device, as any PEFT would set it up from the configuration.

    Raises:
        SieveError: it refuses to.
    """
    with warnings.catch_warnings():
        # PEFT looks for patterns among modules only, and says that those of parameters were ignored: they are not.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        try:
            return PeftModel(skeleton, copy.deepcopy(config))
        except ValueError as error:
            raise SieveError(
                f"plain PEFT takes no such LoRA on {type(skeleton).__name__} ({first_line(error)}), expected adapters "
                "on modules where it does: train with exclude_modules, or write a whole checkpoint (peft-sieve export "
                "--merge)"
            ) from error


def _plain_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _check_loadable(plain: PlainLora, opened: OpenedAdapter) -> None:
    """That PEFT, given these files, finds each tensor a place of its shape: tried on the meta device.

    Raises:
        SieveError: it does not.
    """
    model = _injected(plain.config, opened.new_skeleton())
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    given = {key: torch.empty(shape, device="meta") for key, (shape, _) in plain.tensors.items()}
    found = convert_peft_adapter_state_dict_for_transformers(model, plain.config, given)
    shapes = [{(key, tuple(value.shape)) for key, value in tensors.items()} for tensors in (expected, found)]
    wrong = sorted(shapes[0] ^ shapes[1])
    if wrong:
        raise SieveError(
            f"received layout='per_expert', and PEFT would not find a place for it in "
            f"{type(model.get_base_model()).__name__} ({wrong[0][0]}, {len(wrong)} in all), expected 'stacked' or "
            "'auto': pass one of those"
        )
