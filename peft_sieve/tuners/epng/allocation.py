"""Which experts of a layer lose their adapter, and which get its ranks: pure arithmetic on numbers of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AllocationRule:
    """How an update moves the blocks of one layer.

    Attributes:
        prune_ratio, grow_ratio: shares of the experts adapted now.
        keep: experts that stay adapted at least.
        capacity: the most blocks of an expert; one that has more, by an earlier rule, does not grow.
    """

    prune_ratio: float
    grow_ratio: float
    keep: int
    capacity: int

    def __call__(self, importance: Sequence[float], blocks: Mapping[int, int]) -> dict[int, int]:
        """The blocks of each expert after an update; their sum is that of before.

        The least important are pruned, and their blocks are dealt out one at a time, in turn, from the most important
        on, to those that grow; when those are full, to the next important. Where the others have no room for what
        pruning would free, fewer are pruned. Of equally important experts the higher id is pruned first, and grows
        last.

        Args:
            importance: of every expert of the layer, (num_experts,).
            blocks: adapted expert -> its blocks.

        Returns:
            Adapted expert -> its blocks, by ascending id; `blocks` itself if nothing is to move.
        """
        order = sorted(blocks, key=lambda expert: (importance[expert], -expert))  # the least important first
        number = min(share_of(self.prune_ratio, len(blocks)), len(blocks) - self.keep)
        for count in range(number, 0, -1):
            freed = sum(blocks[expert] for expert in order[:count])
            others = {expert: blocks[expert] for expert in reversed(order[count:])}
            if freed <= sum(max(0, self.capacity - own) for own in others.values()):
                self._deal(freed, others, share_of(self.grow_ratio, len(blocks)))
                return dict(sorted(others.items()))
        return dict(sorted(blocks.items()))

    def _deal(self, freed: int, blocks: dict[int, int], growing: int) -> None:
        """Add `freed` blocks to the first `growing` experts, as far as there is room, then to those after them."""
        experts = list(blocks)
        while freed:
            for expert in [e for e in experts[:growing] if blocks[e] < self.capacity][:freed]:
                blocks[expert] += 1
                freed -= 1
            if all(blocks[expert] >= self.capacity for expert in experts[:growing]):
                growing += 1


def share_of(ratio: float, number: int) -> int:
    """A share of a number of experts: at least one."""
    return max(1, round(ratio * number))
