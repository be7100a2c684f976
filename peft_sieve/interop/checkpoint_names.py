"""What the checkpoints of a base model call its weights, where transformers loads them under other names.

Servers and PEFT's loading of plain LoRA go by those names. transformers knows how to write a loaded model back; here
it writes back tiny tensors whose values say where they came from.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import SieveError
from ..moe.families import FusedExperts
from ..moe.module_experts import ModuleExperts
from ..moe.topology import MoELayer
from .stacks import is_stack, is_transposed, parameters_of, projections_in

# (projection, expert) -> the name of that matrix, as a module of its own.
ExpertNames = dict[tuple[str, int], str]


def module_names(skeleton: PreTrainedModel, paths: Iterable[str]) -> dict[str, str]:
    """Module path -> the name that checkpoints have for it, which for most is the same.

    Raises:
        SieveError: transformers cannot tell.
    """
    keys = weight_keys(skeleton, paths)
    # One that is transposed in the checkpoint is not the same module there.
    same = {path for path, (key, transposed) in keys.items() if key.endswith(".weight") and not transposed}
    return {path: key.removesuffix(".weight") if path in same else path for path, (key, _) in keys.items()}


def weight_keys(skeleton: PreTrainedModel, paths: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Module path -> the key that checkpoints have for its weight, and whether they have it transposed.

    A weight that is split in the checkpoint, or fused with others there, keeps its own key.

    Raises:
        SieveError: transformers cannot tell.
    """
    paths = list(paths)
    probes = {f"{path}.weight": torch.tensor([[float(i)] * 2]) for i, path in enumerate(paths)}
    found: dict[str, list[tuple[str, bool]]] = {path: [] for path in paths}
    for key, value in _reverted(skeleton, probes).items():
        if value.shape in ((1, 2), (2, 1)):
            found[paths[int(value[0, 0])]].append((key, value.shape == (2, 1)))
    return {path: keys[0] if len(keys) == 1 else (f"{path}.weight", False) for path, keys in found.items()}


def expert_names(skeleton: PreTrainedModel, layers: list[MoELayer]) -> dict[str, ExpertNames]:
    """The names that checkpoints have for the experts' matrices, by the paths of layers.

    Layers are left out whose experts are in stacks in the checkpoints of this model, too.

    Args:
        layers: all that the model has: some conversions need several at once.

    Raises:
        SieveError: transformers cannot tell.
    """
    names: dict[str, ExpertNames] = {}
    probes: dict[str, torch.Tensor] = {}
    matrices: list[tuple[MoELayer, str, int]] = []
    for layer in layers:
        if isinstance(layer.family, ModuleExperts):
            names[layer.path] = {k: f"{layer.path}.{name}" for k, name in layer.family.names(layer.experts).items()}
        elif isinstance(layer.family, FusedExperts) and all(is_stack(layer, p) for p in parameters_of(layer)):
            for parameter in parameters_of(layer):
                probes[f"{layer.experts_path}.{parameter}"] = _numbered(layer, parameter, len(matrices))
                matrices += [(layer, p, e) for e in range(layer.num_experts) for p in projections_in(layer, parameter)]
    for name, value in (_reverted(skeleton, probes) if probes else {}).items():
        if value.numel() == 1 and name.endswith(".weight"):
            layer, projection, expert = matrices[int(value)]
            names.setdefault(layer.path, {})[projection, expert] = name.removesuffix(".weight")
    number = {layer.path: len(layer.shape.projections) * layer.num_experts for layer in layers}
    return {path: of_layer for path, of_layer in names.items() if len(of_layer) == number[path]}


def _numbered(layer: MoELayer, parameter: str, first: int) -> torch.Tensor:
    """A stack with one row a projection, (num_experts, projections, 1) or as the model has it; rows are numbered."""
    rows = len(projections_in(layer, parameter))
    stack = first + torch.arange(layer.num_experts * rows).float().view(layer.num_experts, rows, 1)
    return stack.transpose(1, 2) if is_transposed(layer, parameter) else stack


def _reverted(skeleton: PreTrainedModel, probes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The probes under the names of checkpoints.

    Raises:
        SieveError: transformers converts weights of this model in a way that takes no such probes.
    """
    try:
        return revert_weight_conversion(skeleton, probes)
    except Exception as error:
        raise SieveError(
            f"transformers does not say what checkpoints of {type(skeleton).__name__} call its weights "
            f"({type(error).__name__}: {error}), expected names for {next(iter(probes))} and the others: pass "
            "layout='stacked', which needs none"
        ) from error


def stack_names(skeleton: PreTrainedModel, layer: MoELayer) -> dict[str, str]:
    """Parameter of the experts module -> the name that checkpoints have for it, where they hold the same stack."""
    names: dict[str, str] = {}
    for parameter in [] if isinstance(layer.family, ModuleExperts) else parameters_of(layer):
        # All sizes differ and are even, so that nothing but the same stack comes back equal.
        probe = torch.arange(2 * 4 * 6).view((2, 4, 6) if is_stack(layer, parameter) else (6, 8)).float()
        written = _reverted(skeleton, {f"{layer.experts_path}.{parameter}": probe})
        for name, value in written.items():
            if len(written) == 1 and torch.equal(value, probe):
                names[parameter] = name
    return names
