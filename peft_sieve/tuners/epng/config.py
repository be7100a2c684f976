"""`EpngConfig`: the sieve's options, plus when and how ranks move from expert to expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftType

from ...checks import is_whole, must_be, number, share, whole
from ..common.config import BY_HAND
from ..sieve.config import SieveLoraConfig
from .ledger import blocks_after

# How whole-number options may be: their smallest value, and whether None is one, too.
_WHOLE_NUMBERS = {
    "rank_block": (1, False),
    "warmup_steps": (0, False),
    "update_interval": (1, False),
    "update_until": (0, True),
    "max_rank": (1, True),
}
# Options of the sieve that leave no ranks to move.
_ONLY = {"expert_tuning": "lora", "hellori_density": None, "cold_experts": "frozen", "share_outer": False}


@dataclass
class EpngConfig(SieveLoraConfig):
    """LoRA on experts, pruned and grown by the routing during training (EPnG, arXiv 2607.01789).

    It starts from the mask of a calibration (`calib_dataset`), from a given one (`selected_experts`), or, with neither,
    from all experts, each with rank `r`. At each update, in every layer, the least important experts lose their
    adapter, and its ranks go to the most important ones.

    Args (beyond those of `SieveLoraConfig`):
        r: the rank that every expert starts with, default 8; lora_alpha: default 16. The scaling stays what these two
            make it, whatever rank an expert comes to.
        rank_block: ranks are moved in blocks of so many; divides `r`. Where `rank_pattern` gives projections other
            ranks, a block is the same part of each.
        warmup_steps: optimizer steps before the first update, which comes at this step.
        update_interval: optimizer steps from one update to the next.
        update_until: no update comes after this step; None for no end. The ranks that an update gives need some steps
            to learn in.
        prune_ratio: share of a layer's adapted experts that an update prunes, in (0, 1); at least one expert.
        grow_ratio: share of a layer's adapted experts that get the ranks, in (0, 1]; at least one expert.
        keep_ratio: share of a layer's first experts that are never pruned, in (0, 1]; at least one expert.
        decay: factor on the importance from one step to the next, in [0, 1].
        max_rank: the highest rank of an expert, the measure being that of `r`; None for what the matrices allow.
        expert_blocks: experts-module path -> blocks of each expert of `selected_experts`, in that order. Filled in
            training and saved.
        ledger: experts-module path -> [step, expert, its blocks from then on], in the order in which it happened.
            Filled in training and saved.

    Raises:
        SieveError: an option has a value that cannot work; the text says which one, and what would.
    """

    r: int = field(default=8, metadata={"help": "Rank of every adapter at the start."})
    lora_alpha: int = field(default=16, metadata={"help": "Adapter output is scaled by lora_alpha / r, always."})
    rank_block: int = field(default=1, metadata={"help": "Ranks are moved in blocks of so many; divides r."})
    warmup_steps: int = field(default=100, metadata={"help": "Optimizer steps before the first update."})
    update_interval: int = field(default=100, metadata={"help": "Optimizer steps between updates."})
    update_until: int | None = field(default=None, metadata={"help": "No update after this step; None for no end."})
    prune_ratio: float = field(default=0.1, metadata={"help": "Share of a layer's adapters that an update prunes."})
    grow_ratio: float = field(default=0.1, metadata={"help": "Share of a layer's adapters that get the ranks."})
    keep_ratio: float = field(default=0.25, metadata={"help": "Share of a layer's first adapters that always stay."})
    decay: float = field(default=0.99, metadata={"help": "Factor on the importance from one step to the next."})
    max_rank: int | None = field(default=None, metadata={"help": "The highest rank of an expert; None for no limit."})
    expert_blocks: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Experts-module path -> blocks of each selected expert."}
    )
    ledger: dict[str, list[list[int]]] | None = field(
        default=None, metadata={"help": "Experts-module path -> [step, expert, its blocks from then on]."}
    )

    def __post_init__(self, calib_dataset: Any, calib_tokenizer: Any, calib_formatting_func: Any) -> None:
        super().__post_init__(calib_dataset, calib_tokenizer, calib_formatting_func)
        self.peft_type = PeftType("SIEVE_EPNG")
        for name, only in _ONLY.items():
            if getattr(self, name) != only:
                advice = "Only ranks move: leave it out, or make a SieveLoraConfig."
                raise must_be(name, f"{only!r} for EPnG", getattr(self, name), advice)
        for name, (least, optional) in _WHOLE_NUMBERS.items():
            setattr(self, name, whole(name, getattr(self, name), least=least, optional=optional))
        if self.r % self.rank_block:
            raise must_be("rank_block", f"a divisor of r, which is {self.r}", self.rank_block)
        if self.max_rank is not None and self.max_rank < self.r:
            raise must_be("max_rank", f"at least r, which is {self.r}", self.max_rank)
        number("prune_ratio", self.prune_ratio, lambda ratio: 0 < ratio < 1, "a number in (0, 1)")
        number("decay", self.decay, lambda decay: 0 <= decay <= 1, "a number in [0, 1]")
        for name in ("grow_ratio", "keep_ratio"):
            share(name, getattr(self, name))
        self._check_state()

    def is_update(self, step: int) -> bool:
        """Whether an update comes after optimizer step `step`."""
        if step < self.warmup_steps or (self.update_until is not None and step > self.update_until):
            return False
        return (step - self.warmup_steps) % self.update_interval == 0

    @property
    def first_blocks(self) -> int:
        """The blocks that every expert starts with."""
        return self.r // self.rank_block

    def blocks_in(self, path: str) -> list[int]:
        """The blocks of each selected expert of one layer."""
        experts = (self.selected_experts or {}).get(path, [])
        return (self.expert_blocks or {}).get(path) or [self.first_blocks] * len(experts)

    @property
    def update_steps(self) -> list[int]:
        """The steps of the updates so far that moved ranks."""
        return sorted({step for entries in (self.ledger or {}).values() for step, _, _ in entries})

    def _check_state(self) -> None:
        """What training filled in: of one update, and of this mask."""
        mask = self.selected_experts or {}
        blocks = {} if self.expert_blocks is None else self.expert_blocks
        ledger = {} if self.ledger is None else self.ledger
        for name, value in (("expert_blocks", blocks), ("ledger", ledger)):
            if not isinstance(value, Mapping):
                raise must_be(name, "a mapping or None", value, BY_HAND)
        for path, numbers in blocks.items():
            positive = isinstance(numbers, list | tuple) and all(is_whole(n) and n > 0 for n in numbers)
            if not positive or len(numbers) != len(mask.get(path, ())):
                kind = f"a positive whole number for each of the {len(mask.get(path, ()))} experts of selected_experts"
                raise must_be(f"expert_blocks[{path!r}]", kind, numbers, BY_HAND)
        for path, entries in ledger.items():
            rows = isinstance(entries, list | tuple) and all(
                isinstance(e, list | tuple) and len(e) == 3 and all(map(is_whole, e)) for e in entries
            )
            if not rows or path not in blocks:
                kind = "a list of [step, expert, blocks] for a layer of expert_blocks"
                raise must_be(f"ledger[{path!r}]", kind, entries, BY_HAND)
        for path, numbers in blocks.items():
            held = dict(zip(mask[path], numbers, strict=True))
            if blocks_after(held, ledger.get(path, ()), self.first_blocks) != held:
                kind = f"what its ledger comes to from {self.first_blocks} for each expert"
                raise must_be(f"expert_blocks[{path!r}]", kind, numbers, BY_HAND)
