"""Files of ordinary LoRA that PEFT would misread: factors of some or all experts, and another order of a stack's B."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper

from ...checks import shown
from ...errors import SieveError
from ...moe.topology import MoELayer
from ..checkpoint.names import matrix_names
from ..reading import KEY_PREFIX, lora_layers
from ..skeleton import Maker

# (experts-module path, projection, expert)
Matrix = tuple[str, str, int]

_OF_AN_EXPERT = re.compile(r"\.experts\.\d+\.")

# What Unsloth says in `adapter_config.json` of the columns of B: PEFT's order, or the one that it had itself before.
_LAYOUT, _OF_PEFT, _GROUPED = "lora_B_layout", "rank_major", "grouped_by_expert"


def with_absent_experts(
    tensors: dict[str, torch.Tensor], model: PeftModel, new_skeleton: Maker, layers: list[MoELayer]
) -> tuple[dict[str, torch.Tensor], set[Matrix]]:
    """The tensors of a file with a pair of factors per expert, and zeros for the experts that have none in it.

    PEFT stacks the pairs that it finds, and takes those of some experts for those of others.

    Args:
        model: has the LoRA.
        new_skeleton, layers: its base model without adapters, and the MoE layers of that.

    Returns:
        The tensors, and the matrices that have zeros.
    """
    if not any(_OF_AN_EXPERT.search(key) for key in tensors):
        return tensors, set()
    matrices = matrix_names(new_skeleton(), layers)
    adapted = {path.replace(".base_layer", "") for path, _ in lora_layers(model.get_base_model(), "default")}
    names = {
        (layer.path, *key): f"{KEY_PREFIX}{name}"
        for layer in layers
        if layer.experts_path in adapted or adapted.intersection(layer.linears.values())
        for key, name in matrices.get(layer.path, {}).items()
    }
    there = {matrix: key for matrix, key in names.items() if f"{key}.lora_A.weight" in tensors}
    like = {projection: key for (_, projection, _), key in there.items()}
    absent = {matrix for matrix in names.keys() - there.keys() if matrix[1] in like}
    zeros = {
        f"{names[matrix]}.{side}.weight": torch.zeros_like(tensors[f"{like[matrix[1]]}.{side}.weight"])
        for matrix in absent
        for side in ("lora_A", "lora_B")
    }
    return {**zeros, **tensors}, absent


def refuse_shared_outer(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Refuse a file that has factors of all experts in one tensor with a dimension of experts, as some servers take it.

    Raises:
        SieveError: it has some.
    """
    stacks = [key for key, tensor in tensors.items() if ".experts." in key and tensor.dim() == 3]
    if stacks:
        raise SieveError(
            f"The LoRA {path!r} has factors that experts share ({stacks[0].removeprefix(KEY_PREFIX)}), a form for "
            "servers. Pass a LoRA with a pair per expert (export_lora writes it with layout='auto'), or PEFT's own."
        )


def in_pefts_order(
    tensors: dict[str, torch.Tensor], model: PeftModel, settings: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of a file with B of stacks as PEFT has it, (out, ranks, experts): Unsloth had (out, experts, ranks).

    Args:
        model: has the LoRA.
        settings: what is in `adapter_config.json`.

    Raises:
        SieveError: the file is of Unsloth, and does not say which order it has.
    """
    stacks = {
        f"{KEY_PREFIX}{path}.lora_B.weight": module
        for path, module in lora_layers(model.get_base_model(), "default")
        if isinstance(module, ParamWrapper) and module.num_experts > 1
    }
    stacks = {key: module for key, module in stacks.items() if key in tensors}
    if not stacks:
        return tensors
    by_unsloth = (settings.get("auto_mapping") or {}).get("unsloth_fixed")
    order = settings.get(_LAYOUT, None if by_unsloth else _OF_PEFT)
    if order not in (_OF_PEFT, _GROUPED):
        raise SieveError(
            f"The LoRA was saved by Unsloth with {_LAYOUT}={shown(order)}, which does not say how B of its experts is "
            f'ordered. Write "{_LAYOUT}": "{_GROUPED}" (older versions) or "{_OF_PEFT}" into adapter_config.json.'
        )
    if order == _OF_PEFT:
        return tensors
    ordered = {
        key: tensors[key].unflatten(1, (module.num_experts, -1)).transpose(1, 2).flatten(1)
        for key, module in stacks.items()
        if tensors[key].shape[1] % module.num_experts == 0
    }
    return {**tensors, **ordered}
