"""The embeddings that an adapter brings along, in the place of a checkpoint's."""

from __future__ import annotations

import torch

from ...errors import SieveError
from ..reading import OpenedAdapter
from ..vocabulary import embedding_modules
from .keys import CheckpointKeys
from .names import module_names
from .rows import spellings


def replaced_embeddings(opened: OpenedAdapter, checkpoint: CheckpointKeys) -> dict[str, torch.Tensor]:
    """Key of a checkpoint -> what takes its place.

    Raises:
        SieveError: the checkpoint has no such weight, or one of another size that nothing takes the place of.
    """
    given = opened.embeddings
    modules = embedding_modules(opened.base)
    names = [module_names(skeleton, modules) for skeleton in spellings(opened.new_skeleton())]
    tied = bool(getattr(opened.base.config.get_text_config(), "tie_word_embeddings", False))
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
        if key and weight is not None:
            replaced[key] = weight
        elif weight is not None and not tied:
            raise _other_base(f"has no weight '{path}.weight', which the adapter changes")
    return replaced


def _other_base(problem: str) -> SieveError:
    return SieveError(
        f"The base model's checkpoint {problem}. Pass the checkpoint of the model that the adapter was trained on as "
        "base_model."
    )
