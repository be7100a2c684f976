"""Options that several commands have."""

from __future__ import annotations

import argparse
from typing import Any

# As `select_experts` names them; their values are checked there.
_SELECTION = ("top_k_frac", "top_k", "strategy", "score", "coverage", "seed", "top_p")


def add_selection(parser: argparse.ArgumentParser, *, defaults: bool = True) -> None:
    """The options of `select_experts`; without defaults, those that were not given are None."""
    group = parser.add_argument_group("which experts are selected")
    group.add_argument(
        "--top-k-frac", type=float, default=0.25, metavar="SHARE", help="share of each layer's experts (default: 0.25)"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="the same as a number; wins over --top-k-frac")
    group.add_argument(
        "--strategy",
        default="uniform",
        metavar="NAME",
        help="uniform (default), greedy, coverage, cumulative or random",
    )
    group.add_argument(
        "--score",
        default="count",
        metavar="NAME",
        help="count (tokens, default), mass (gate weight), or esft_token or esft_gate (averages over samples)",
    )
    group.add_argument(
        "--coverage", type=float, default=0.6, metavar="SHARE", help="target of the strategy coverage (default: 0.6)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="SUM",
        help="target of the strategy cumulative (default: 0.2 for esft_token, 0.1 for esft_gate)",
    )
    group.add_argument("--seed", type=int, default=0, help="of the strategy random (default: 0)")
    if not defaults:
        parser.set_defaults(**dict.fromkeys(_SELECTION))


def selection_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for `select_experts`."""
    return {name: getattr(args, name) for name in _SELECTION}


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`"""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
