"""The weights that a checkpoint has, asked for by the names that transformers writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .additions import Addition
from .rows import StoredWeight


@dataclass(frozen=True)
class CheckpointKeys:
    """The weights of a checkpoint.

    Attributes:
        shapes: by key.
        prefix: of the keys that a model with its head has for the model without.
    """

    shapes: Mapping[str, tuple[int, ...]]
    prefix: str

    def key_of(self, name: str) -> str:
        """The key of a weight, "" if it is not there. It may be that of the model without its head, or with it."""
        keys = (name, name.removeprefix(self.prefix), self.prefix + name)
        return next((key for key in keys if key in self.shapes), "")

    def problems(self, addition: Addition, weights: list[StoredWeight]) -> list[str]:
        """What keeps a matrix from being added to these weights."""
        found = []
        for stored in weights:
            shape, wanted = (
                self.shapes.get(self.key_of(stored.key)),
                stored.whole_shape(addition.shape[addition.columns]),
            )
            if shape is None:
                found.append(f"has no weight {stored.key!r}, which the adapter changes")
            elif shape != wanted:
                found.append(f"has a weight of shape {shape} where the adapter adds {wanted} ({stored.key})")
        return found
