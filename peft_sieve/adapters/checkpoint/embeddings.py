"""The embeddings that an adapter brings along, in the place of a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...errors import SieveError
from ..reading import OpenedAdapter
from ..vocabulary import are_tied, embedding_modules
from .keys import CheckpointKeys
from .names import module_names
from .rows import spellings


def replaced_embeddings(
    opened: OpenedAdapter, checkpoint: CheckpointKeys, read: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Key of a checkpoint -> what takes its place.

    Args:
        read: reads a tensor of the checkpoint: an adapter that was loaded with embeddings has put them into its model.

    Raises:
        SieveError: the checkpoint has no such weight, or one of another size that nothing takes the place of.
    """
    given = opened.embeddings
    # Shapes are those of the skeleton: a live model may have quantised ones.
    skeleton = opened.new_skeleton()
    modules, live = embedding_modules(skeleton), embedding_modules(opened.base)
    names = [module_names(spelled, modules) for spelled in spellings(skeleton)]
    tied = are_tied(skeleton)
    if tied and given:
        one, *others = given.values()
        if not all(torch.equal(one, other) for other in others):
            raise SieveError(
                f"The adapter has different weights for {' and '.join(given)}, which the model ties. Train with "
                "tie_word_embeddings=False, or without embeddings of its own."
            )
        given = dict.fromkeys(modules, one)
    replaced = {}
    for path, module in modules.items():
        key = next((key for of in names if (key := checkpoint.key_of(f"{of[path]}.weight"))), "")
        weight = given.get(path)
        wanted = tuple((module.weight if weight is None else weight).shape)
        if key and checkpoint.shapes[key] != wanted and (weight is None or checkpoint.shapes[key][1:] != wanted[1:]):
            raise _other_base(f"has {key} of shape {checkpoint.shapes[key]}, and the adapter's model has {wanted}")
        if key and weight is None and path in live and _has_values_of_its_own(opened, path, live[path].weight):
            own = live[path].weight.detach().cpu()
            weight = None if torch.equal(read(key).to(own.dtype), own) else own
        if key and weight is not None:
            replaced[key] = weight
        elif weight is not None and not tied:
            raise _other_base(f"has no weight '{path}.weight', which the adapter changes")
    return replaced


def _has_values_of_its_own(opened: OpenedAdapter, path: str, weight: torch.Tensor) -> bool:
    """Whether a weight is that of the live base model: not a skeleton's, quantised, spread out, or merged into."""
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta
    return plain and not getattr(opened.base.get_submodule(path), "merged", False)


def _other_base(problem: str) -> SieveError:
    return SieveError(
        f"The base model's checkpoint {problem}. Pass the checkpoint of the model that the adapter was trained on as "
        "base_model."
    )
