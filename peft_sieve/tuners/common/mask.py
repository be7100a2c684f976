"""A mask against the model it is meant for."""

from __future__ import annotations

from typing import Any

from ...checks import listed
from ...errors import SieveError
from ...moe.topology import MoELayer


def check_mask(config: Any, layers: list[MoELayer]) -> None:
    """Refuse a mask that does not fit the model.

    Raises:
        SieveError: it names layers that the model lacks, ids out of range, or was made for other sizes.
    """
    mask = config.selected_experts or {}
    known = {layer.path: layer for layer in layers}
    missing = [path for path in mask if path not in known]
    if missing:
        raise SieveError(
            f"selected_experts names {listed(missing)}, which the model does not have; it has {layers[0].path!r} and "
            "the like. Load the base model that the mask was made for, or calibrate again."
        )
    for path, ids in mask.items():
        _check_shape(config, known[path])
        if ids and ids[-1] >= known[path].num_experts:
            raise SieveError(
                f"selected_experts[{path!r}] holds the id {ids[-1]}, and that layer has {known[path].num_experts} "
                "experts. Load the base model that the mask was made for, or calibrate again."
            )


def shape_of(layer: MoELayer) -> list[int]:
    """[num_experts, hidden_size, intermediate_size]"""
    return [layer.num_experts, layer.shape.hidden_size, layer.shape.intermediate_size]


def _check_shape(config: Any, layer: MoELayer) -> None:
    made_for = (config.expert_shapes or {}).get(layer.path)
    if made_for is not None and made_for != shape_of(layer):
        names = ("experts", "hidden size", "intermediate size")
        text = [", ".join(f"{name} {n}" for name, n in zip(names, s, strict=True)) for s in (made_for, shape_of(layer))]
        raise SieveError(
            f"The adapter was made for {text[0]} in {layer.path}, and this model has {text[1]}. Load the base model "
            "that it was trained on."
        )
