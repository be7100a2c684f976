"""Which experts to adapt: scores, then a strategy, then the selection. Pure functions on numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..checks import is_whole, must_be, quoted
from ..errors import SieveError
from ..table import Table
from .profile import RoutingProfile
from .profile_fields import check_layers_match
from .scores import hottest_first, layer_scores, total_of
from .strategies import STRATEGIES, SelectionOptions

_SAME_MODEL = "Use a profile of the same model."


class ExpertSelection(Mapping[str, tuple[int, ...]]):
    """The experts to adapt: an immutable mapping from layer name to a tuple of ascending expert ids.

    Equal to any mapping with the same items, whatever their order; can be pickled and copied.

    Args:
        experts: layer name -> expert ids >= 0, each once, in any order. `to_dict()` gives this back.

    Raises:
        SieveError: if a layer's ids are not distinct whole numbers of at least 0.
    """

    __slots__ = ("_experts",)
    _experts: dict[str, tuple[int, ...]]

    def __init__(self, experts: Mapping[str, Iterable[int]]) -> None:
        if not isinstance(experts, Mapping):
            raise must_be("The selected experts", "a mapping from layer name to expert ids", experts)
        checked = {layer: _ascending_ids(layer, ids) for layer, ids in experts.items()}
        object.__setattr__(self, "_experts", checked)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"ExpertSelection cannot be changed, so {name!r} cannot be set")

    def __reduce__(self) -> tuple[Any, ...]:
        return ExpertSelection, (dict(self._experts),)

    def __getitem__(self, layer: str) -> tuple[int, ...]:
        return self._experts[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)

    def __repr__(self) -> str:
        return f"ExpertSelection({len(self)} layers, {sum(map(len, self.values()))} experts)"

    def to_table(self) -> Table:
        """One row per layer: how many experts are selected, and which."""
        rows = [(layer, str(len(experts)), " ".join(map(str, experts))) for layer, experts in self.items()]
        total = ("all layers", str(sum(map(len, self.values()))), "")
        return Table(("layer", "selected", "expert ids"), rows, total, wrapped=(2,))

    def _repr_html_(self) -> str:
        return self.to_table().to_html()

    def coverage(self, profile: RoutingProfile, score: str = "count") -> dict[str, float]:
        """The share of each layer's score that the selected experts capture (MoE-Sieve §3).

        Args:
            profile: a profile with the selection's layers; it need not be the one that the selection was made from.
            score: the score to share out.

        Returns:
            Layer name -> share in [0, 1] for the selection's layers; 0.0 for a layer that no token reached, because
            nothing was captured there.

        Raises:
            SieveError: if the profile lacks a selected layer or expert, or the score.
        """
        scores = layer_scores(profile, score)
        missing = [layer for layer in self if layer not in scores]
        if missing:
            raise SieveError(f"The profile does not have the layers {quoted(missing)}. {_SAME_MODEL}")
        shares = {}
        for layer, experts in self.items():
            values = scores[layer]
            if experts and experts[-1] >= len(values):
                raise SieveError(
                    f"Expert {experts[-1]} of layer {layer!r} is selected, but the profile has {len(values)} experts "
                    f"there. {_SAME_MODEL}"
                )
            total = total_of(values)
            shares[layer] = total_of([values[expert] for expert in experts]) / total if total else 0.0
        return shares

    def hottest_first(self, profile: RoutingProfile, score: str = "count") -> dict[str, list[int]]:
        """The selected experts of each layer by falling score, ties by rising id: the order they were selected in.

        Args:
            profile: a profile with the selection's layers and experts.
            score: the score to sort by.

        Raises:
            SieveError: if the profile lacks a selected layer or expert, or the score.
        """
        self.coverage(profile, score)  # checks that the two go together
        scores = layer_scores(profile, score)
        return {layer: [e for e in hottest_first(scores[layer]) if e in experts] for layer, experts in self.items()}

    def jaccard(self, other: Mapping[str, Iterable[int]]) -> float:
        """How far two selections agree: the experts of both over the experts of either, as the mean over layers.

        Args:
            other: a selection of the same layers, or a mapping that is one.

        Returns:
            A number in [0, 1]. A layer for which neither selects an expert counts as 1.0, and so do no layers at all.

        Raises:
            SieveError: if the layers differ.
        """
        overlaps = self.layer_jaccard(other).values()
        return math.fsum(overlaps) / len(overlaps) if overlaps else 1.0

    def layer_jaccard(self, other: Mapping[str, Iterable[int]]) -> dict[str, float]:
        """As `jaccard`, layer by layer: layer name -> a number in [0, 1], in the selection's order."""
        theirs = other if isinstance(other, ExpertSelection) else ExpertSelection(other)
        check_layers_match(self, theirs, "the two selections", "Compare selections for the same model.")
        overlaps = {}
        for layer, experts in self.items():
            either = set(experts) | set(theirs[layer])
            overlaps[layer] = len(set(experts) & set(theirs[layer])) / len(either) if either else 1.0
        return overlaps

    def to_dict(self) -> dict[str, list[int]]:
        """The selection as plain lists, ready for JSON and for `SieveLoraConfig(selected_experts=...)`."""
        return {layer: list(experts) for layer, experts in self.items()}


def select_experts(
    profile: RoutingProfile,
    *,
    top_k_frac: float = 0.25,
    top_k: int | None = None,
    strategy: str = "uniform",
    score: str = "count",
    coverage: float = 0.6,
    seed: int = 0,
    top_p: float | None = None,
) -> ExpertSelection:
    """Select the experts to adapt in each layer (MoE-Sieve; greedy: Appendix C, random: §6).

    A layer's budget is `max(1, round(top_k_frac * num_experts))` or `top_k`. Experts with equal scores are taken in
    the order of their ids. A layer that no token reached, or whose score is 0 for all experts, gets no experts and is
    named in a `UserWarning`.

    Args:
        profile: what the router did on the calibration data.
        top_k_frac: share of a layer's experts, in (0, 1].
        top_k: number of experts per layer, from 1 to the smallest layer's number of experts; wins over `top_k_frac`.
        strategy: `uniform`: each layer's highest scores, as many as its budget. `greedy`: as many in all as `uniform`
            takes, given out one by one to the expert with the largest share of its own layer's score, ties to the
            earlier layer, and at least one per layer. `coverage`: the fewest of each layer that hold the share
            `coverage` of its score; no budget. `cumulative`: each layer's highest scores until their sum, not their
            share, reaches `top_p`, the expert that reaches it included; no budget; for scores that are averages
            (ESFT, arXiv 2407.01906). `random`: as many as `uniform` but drawn with `seed`, a control.
        score: `count` (tokens routed), `mass` (summed gate weight), `esft_gate` or `esft_token` (gate weight, or
            1/top-k of each selection, as the mean over samples of the mean over a sample's tokens), or a name given to
            `register_score`.
        coverage: target of the strategy `coverage`, in (0, 1].
        seed: of the strategy `random`, any whole number; each layer's draw depends on it and the layer's name, and
            neither uses nor changes the state of a global generator.
        top_p: target of the strategy `cumulative`, in (0, 1]; None is 0.1 for `esft_gate` and 0.2 for `esft_token`.

    Returns:
        The selection, with all layers of the profile in their order.

    Raises:
        SieveError: if an option is out of range, the profile lacks the score, or no token reached any layer.
    """
    options = SelectionOptions(
        top_k_frac=top_k_frac, top_k=top_k, strategy=strategy, score=score, coverage=coverage, top_p=top_p, seed=seed
    )
    scores = layer_scores(profile, score)
    for layer, values in scores.items():
        if options.budget(len(values)) > len(values):
            kind = f"at most {len(values)}, the number of experts of layer {layer!r}"
            raise must_be("top_k", kind, top_k, "Lower it or use top_k_frac.")
    with_tokens = [layer for layer, counts in profile.counts.items() if counts.any()]
    reached = {layer: scores[layer] for layer in with_tokens if total_of(scores[layer]) > 0}
    no_token = "No token" if len(with_tokens) == len(reached) else f"No token with a {score} above 0"
    if not reached:
        raise SieveError(
            f"{no_token} reached any of the {len(scores)} layers. Profile on calibration data that is not empty."
        )
    unreached = [layer for layer in scores if layer not in reached]
    if unreached:
        warnings.warn(
            f"{no_token} reached {quoted(unreached)}, so no expert is selected there. Profile on more data to adapt "
            "these layers.",
            UserWarning,
            stacklevel=2,
        )
    selected = STRATEGIES[strategy](reached, options)
    return ExpertSelection({layer: selected.get(layer, ()) for layer in scores})


def hottest_experts(profile: RoutingProfile, sizes: Mapping[str, int], *, score: str = "count") -> ExpertSelection:
    """The experts with the highest scores, as many of each layer as `sizes` says; ties to the lower id.

    Args:
        profile: what the router did; it must have the layers of `sizes`.
        sizes: layer name -> number of experts.
        score: as for `select_experts`.

    Returns:
        The selection, in the order of `sizes`; nothing in a layer whose score is 0 for all experts.
    """
    scores = layer_scores(profile, score)
    return ExpertSelection(
        {layer: hottest_first(scores[layer])[:size] if any(scores[layer]) else () for layer, size in sizes.items()}
    )


def _ascending_ids(layer: Any, ids: Any) -> tuple[int, ...]:
    if not isinstance(layer, str):
        raise must_be("The name of a layer", "a string", layer)
    experts = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str | bytes) else None
    if (
        experts is None
        or not all(is_whole(expert) and expert >= 0 for expert in experts)
        or len(set(experts)) != len(experts)
    ):
        raise must_be(f"The experts of layer {layer!r}", "distinct whole numbers of at least 0", ids)
    return tuple(sorted(map(int, experts)))
