"""What a layer's ledger says: rows of [step, expert, its blocks from then on], in the order in which it happened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Ledger = Sequence[Sequence[int]]


def first_experts(adapted: Iterable[int], ledger: Ledger) -> frozenset[int]:
    """Those that were adapted at the beginning: what is left, and what was pruned."""
    return frozenset({*adapted, *(expert for _, expert, _ in ledger)})


def blocks_after(experts: Iterable[int], ledger: Ledger, first_blocks: int) -> dict[int, int]:
    """Adapted expert -> its blocks at the end of a ledger, by ascending id.

    Args:
        experts: that were adapted at the beginning, those that the ledger names may be left out.
        first_blocks: what each had then.
    """
    blocks = dict.fromkeys(experts, first_blocks)
    blocks |= {expert: number for _, expert, number in ledger}
    return {expert: number for expert, number in sorted(blocks.items()) if number}
