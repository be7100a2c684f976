"""What the checkpoints of a base model call its weights, where transformers loads them under other names.

Servers and PEFT's loading of plain LoRA go by those names. transformers knows how to write a loaded model back; here
it writes back tiny tensors whose values say where they came from.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..moe.families import FusedExperts
from ..moe.module_experts import ModuleExperts
from ..moe.topology import MoELayer
from .stacks import projections_in


def module_names(skeleton: PreTrainedModel, paths: Iterable[str]) -> dict[str, str]:
    """Module path -> the name that checkpoints have for it, which for most is the same."""
    paths = list(paths)
    probes = {f"{path}.weight": torch.tensor([float(i)]) for i, path in enumerate(paths)}
    found: dict[int, list[str]] = {}
    for name, value in revert_weight_conversion(skeleton, probes).items():
        if value.numel() == 1:
            found.setdefault(int(value), []).append(name)
    names = {}
    for i, path in enumerate(paths):
        # A weight that is split in the checkpoint, or fused with others there, keeps its own name.
        candidates = found.get(i, [])
        renamed = candidates[0] if len(candidates) == 1 else f"{path}.weight"
        names[path] = renamed.removesuffix(".weight")
    return names


def expert_names(skeleton: PreTrainedModel, layer: MoELayer) -> dict[tuple[str, int], str] | None:
    """(projection, expert) -> the name that checkpoints have for that matrix, as a module of its own.

    Returns:
        None if the checkpoints of this model hold the experts in stacks, too.
    """
    projections, num_experts = list(layer.shape.projections), layer.num_experts
    if isinstance(layer.family, ModuleExperts):
        return {key: f"{layer.path}.{name}" for key, name in layer.family.names(layer.experts).items()}
    if not isinstance(layer.family, FusedExperts):
        return None
    probes = {}
    for parameter in layer.family.parameter_names(layer.experts, projections):
        # (num_experts, out, 1), one row of output a projection; the value says whose it is.
        inside = projections_in(layer, parameter)
        rows = torch.tensor(
            [[float(projections.index(p) * num_experts + e) for p in inside] for e in range(num_experts)]
        )
        stack = rows.unsqueeze(-1)
        probes[f"{layer.path}.{parameter}"] = stack.transpose(1, 2) if layer.experts.is_transposed else stack
    names = {}
    for name, value in revert_weight_conversion(skeleton, probes).items():
        if value.numel() != 1 or not name.endswith(".weight"):
            return None
        projection, expert = divmod(int(value), num_experts)
        names[projections[projection], expert] = name.removesuffix(".weight")
    return names if len(names) == len(projections) * num_experts else None


def stack_names(skeleton: PreTrainedModel, layer: MoELayer) -> dict[str, str]:
    """Parameter of the experts module -> the name that checkpoints have for it, where they hold the same stack."""
    parameters = layer.family.parameter_names(layer.experts, list(layer.shape.projections))
    names = {}
    for parameter in parameters:
        held = getattr(layer.experts, parameter, None)
        if not isinstance(held, torch.Tensor):
            continue
        # All sizes differ and are even, so that nothing but the same stack comes back equal.
        probe = torch.arange(2 * 4 * 6).view((2, 4, 6)[-held.dim() :] if held.dim() == 3 else (6, 8)).float()
        written = revert_weight_conversion(skeleton, {f"{layer.path}.{parameter}": probe})
        for name, value in written.items():
            if len(written) == 1 and torch.equal(value, probe):
                names[parameter] = name
    return names
