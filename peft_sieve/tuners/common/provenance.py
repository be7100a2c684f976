"""Where a mask came from, as its configuration saves it and model cards tell it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ...routing.profile import RoutingProfile
from ...routing.selection import ExpertSelection


def provenance(selection: ExpertSelection, profile: RoutingProfile, options: Any, **source: Any) -> dict[str, Any]:
    """The note on a selection.

    Args:
        profile: what it was made from.
        options: has `score` and `strategy`.
        source: what else is known, such as `dataset`, `fingerprint`, `samples` and `tokens`.
    """
    coverage = selection.coverage(profile, score=options.score)
    return {
        **source,
        "score": options.score,
        "strategy": options.strategy,
        "coverage": {path: round(share, 4) for path, share in coverage.items() if selection[path]},
        "peft_sieve_version": _package_version(),
    }


def selection_lines(config: Any) -> list[str]:
    """Lines of a model card: where a configuration's experts come from, and a table of them.

    A note may lack anything, since it may have been written by hand.
    """
    known: dict[str, Any] = config.calibration or {}
    text = "The experts were given by hand or by an earlier calibration."
    if known:
        tokens = known.get("tokens")
        size = f"{tokens:,}" if isinstance(tokens, int) else "an unknown number of"
        text = (
            f"Calibrated on {known.get('samples', 'some')} samples ({size} tokens) of "
            f"`{known.get('dataset', 'unknown')}`, score `{known.get('score', 'unknown')}`, strategy "
            f"`{known.get('strategy', 'unknown')}`. Coverage is the share of a layer's routed tokens (or gate weight, "
            "by the score) that its adapted experts received."
        )
    coverage = known.get("coverage")
    rows = []
    for path, ids in (config.selected_experts or {}).items():
        share = coverage.get(path) if isinstance(coverage, dict) else None
        covered = f"{share:.1%}" if isinstance(share, int | float) else ""
        rows.append(f"| {path} | {len(ids)} of {(config.expert_shapes or {}).get(path, [0])[0]} | {covered} |")
    return [text, "", "| layer | experts | coverage |", "| --- | --- | --- |", *rows]


def _package_version() -> str:
    """Version of the installed package; "unknown" when it runs from a folder that was never installed."""
    try:
        return version("peft-sieve")
    except PackageNotFoundError:
        return "unknown"
