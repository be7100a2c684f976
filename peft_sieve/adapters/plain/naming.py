"""Names in the configuration of a plain LoRA, by which PEFT finds what is adapted and nothing else."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel

from ...checks import first_line
from ...errors import SieveError
from ...moe.linear import is_linear
from ...moe.topology import MoELayer
from ..stack_layout import parameters_of, projections_in


def name_modules(
    config: LoraConfig, skeleton: PreTrainedModel, others: dict[str, LoraLayer], in_experts: Iterable[str] = ()
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
    _set_targets(config, linears, modules)
    # PEFT takes some of these names for those of experts (`gate_proj`, in models that once had a module of that name
    # per expert). The weight of such a module by its own name means the same, and has the same keys.
    mistaken = {word for word in map(without_index, linears) if _is_mistaken(config, skeleton, word)}
    taken = {path for path in linears if without_index(path) in mistaken}
    if taken:
        _set_targets(config, linears - taken, modules)
        wrapped |= {f"{path}.weight" for path in taken}
    if wrapped:
        config.target_parameters = fewest_words(wrapped, parameters)


def name_stacks(config: LoraConfig, layers: list[MoELayer]) -> None:
    """Name the stacks; a stack of two projections gets the ranks of both, since it has one A for both."""
    names = set(config.target_parameters or ())
    for layer in layers:
        for parameter in parameters_of(layer):
            names.add(without_index(f"{layer.experts_path}.{parameter}"))
            count = len(projections_in(layer, parameter))
            if count > 1:
                key = f"{layer.experts_path.rpartition('.')[2]}.{parameter}"
                config.rank_pattern = {**(config.rank_pattern or {}), key: count * config.r}
                config.alpha_pattern = {**(config.alpha_pattern or {}), key: count * config.r}
    config.target_parameters = sorted(names)


def name_matrices(
    config: LoraConfig, skeleton: PreTrainedModel, layers: list[MoELayer], others: dict[str, LoraLayer]
) -> None:
    """Name the matrices in stacks as if they were modules.

    SGLang allocates by the last words in `target_modules`, vLLM goes by the keys, and PEFT turns the words into its
    parameters for some models; for the others those are named, too.
    """
    words = {projection for layer in layers for projection in layer.shape.projections}
    config.target_modules = sorted({*(config.target_modules or ()), *words})
    converted = set(_as_peft_converts(config, skeleton).target_parameters or ())
    stacks = {name for layer in layers for name in layer.family.parameter_names(layer.experts, list(words))}
    if not stacks <= converted:
        name_stacks(config, layers)
    modules = {path: module for path, module in skeleton.named_modules() if path}
    left_alone = {
        path
        for path, module in modules.items()
        if is_linear(module) and path.rpartition(".")[2] in words and path not in others
    }
    if left_alone:
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *fewest_words(left_alone, set(modules))})


def without_index(path: str) -> str:
    """What follows the index of the block."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def _set_targets(config: LoraConfig, wanted: set[str], modules: set[str]) -> None:
    """Name modules, and exclude those of a model inside this one whose whole paths end the same."""
    inside = {path for path in modules - wanted if any(path[dot.end() :] in wanted for dot in re.finditer(r"\.", path))}
    config.target_modules = fewest_words(wanted, modules - inside)
    config.exclude_modules = fewest_words(inside, modules) or None


def fewest_words(wanted: set[str], all_names: set[str]) -> list[str]:
    """Endings that fit the wanted names and no others."""
    return sorted(_find_minimal_target_modules(wanted, all_names - wanted)) if wanted else []


def _as_peft_converts(config: LoraConfig, skeleton: PreTrainedModel) -> LoraConfig:
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, skeleton, None)
    except ValueError as error:
        raise SieveError(
            f"Plain PEFT takes modules of {type(skeleton).__name__} for matrices of its experts ({first_line(error)}). "
            "Pass layout='stacked'."
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
