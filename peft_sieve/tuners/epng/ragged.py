"""Factors whose ranks differ by expert, packed without padding: who has which rows, and where rows go in an update.

The factors of a layer's projections that share an input are one tensor, (rows, features), and a row is one rank of one
projection of one expert. Experts lie in the order of their ranks, those of one rank by their ids, so that each rank's
experts are one range of rows, and a view of it is (experts, ranks, features). As no update changes the number of rows,
the tensor stays the same object of the same shape for as long as it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..common.experts.factors import AdapterPlan, ExpertFactors


@dataclass(frozen=True)
class RaggedPlan(AdapterPlan):
    """What one adapter adds to one layer of experts, `ranks` being the highest of each projection.

    Attributes:
        blocks: of each expert, in the order of `experts`.
        block_ranks: projection -> rank of one block.
    """

    blocks: tuple[int, ...]
    block_ranks: dict[str, int]

    @classmethod
    def of(cls, plan: AdapterPlan, blocks: Sequence[int], block_ranks: dict[str, int]) -> RaggedPlan:
        """`plan` with ranks of its own for each expert."""
        ranks = {projection: max(blocks) * rank for projection, rank in block_ranks.items()}
        return cls(plan.experts, ranks, plan.relative_scaling, tuple(blocks), block_ranks)

    def moved_to(self, blocks: dict[int, int]) -> RaggedPlan:
        """The plan after an update: expert -> its blocks, by ascending id."""
        kept = AdapterPlan(tuple(blocks), self.ranks, self.relative_scaling)
        return self.of(kept, tuple(blocks.values()), self.block_ranks)

    @cached_property
    def blocks_of(self) -> dict[int, int]:
        """Adapted expert -> its blocks."""
        return dict(zip(self.experts, self.blocks, strict=True))

    @cached_property
    def by_blocks(self) -> list[tuple[int, Mapping[int, int]]]:
        """(number of blocks, expert -> its place among the experts that have so many), in the order of the rows."""
        blocks = self.blocks_of
        return [
            (number, {expert: place for place, expert in enumerate(e for e in self.experts if blocks[e] == number)})
            for number in sorted(set(self.blocks))
        ]

    @property
    def stored(self) -> list[int]:
        """The adapted experts in the order of their rows."""
        return [expert for _, places in self.by_blocks for expert in places]

    def group_ranks(self, group: Sequence[str], blocks: int = 1) -> dict[str, int]:
        """Those of a group's projections that are adapted -> their ranks for so many blocks."""
        return {p: blocks * self.block_ranks[p] for p in group if p in self.block_ranks}

    def num_rows(self, group: Sequence[str]) -> int:
        """Rows of the factors of a group of projections."""
        return sum(self.blocks) * sum(self.group_ranks(group).values())

    def rows(self, group: Sequence[str]) -> dict[tuple[str, int], slice]:
        """(projection, expert) -> its rows."""
        found, start = {}, 0
        for number, experts in self.by_blocks:
            for expert in experts:
                for projection, rank in self.group_ranks(group, number).items():
                    found[projection, expert] = slice(start, start + rank)
                    start += rank
        return found


class RaggedFactors(ExpertFactors):
    """Low-rank factors of all adapted experts of a layer, for the projections that share an input.

    `weight` has shape (rows, features), the rows being those of a `RaggedPlan`; `features` is the input width for A and
    the output width for B.
    """

    def __init__(self, num_rows: int, features: int, device: torch.device | None = None) -> None:
        super().__init__(1, num_rows, features, device)
        self.weight = torch.nn.Parameter(self.weight.data.squeeze(0))

    def extra_repr(self) -> str:
        return "rows={}, features={}".format(*self.weight.shape)


@dataclass(frozen=True)
class RowMove:
    """Where the rows of a tensor come from in an update.

    Attributes:
        source: the row that each row was before, (rows,), int64; 0 for new ones.
        new: which rows are new, (rows,), bool.
    """

    source: torch.Tensor
    new: torch.Tensor

    @classmethod
    def between(cls, before: RaggedPlan, after: RaggedPlan, group: Sequence[str]) -> RowMove:
        """The move from one plan to another: ranks that stay come first in what an expert has then."""
        old = before.rows(group)
        source: list[int] = []
        new: list[bool] = []
        for key, rows in after.rows(group).items():
            size, known = rows.stop - rows.start, range(old[key].start, old[key].stop)
            source += [*known, *([0] * (size - len(known)))]
            new += [False] * len(known) + [True] * (size - len(known))
        return cls(torch.tensor(source, dtype=torch.int64), torch.tensor(new, dtype=torch.bool))

    @torch.no_grad()
    def apply(self, tensor: torch.Tensor, new_rows: torch.Tensor | None = None) -> None:
        """Move the rows of `tensor`, (rows, features), in place.

        Args:
            new_rows: what the new rows hold, in their order, (new rows, features); None for zeros.
        """
        moved = tensor.index_select(0, self.source.to(tensor.device))
        moved[self.new.to(tensor.device)] = 0 if new_rows is None else new_rows.to(moved)
        tensor.copy_(moved)
