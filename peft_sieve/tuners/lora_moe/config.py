"""`LoraMoeConfig`: how many LoRA experts a linear layer gets, how they are routed, and when they are pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftType

from ...checks import flags, must_be, number, whole
from ...errors import SieveError
from ..common.config import BY_HAND, MethodConfig, as_sets
from ..common.peft_settings import check_names, rank

MIN_KEPT = 2


@dataclass
class LoraMoeConfig(MethodConfig):
    """A mixture of LoRA experts around linear layers, pruned once during training (DMEP, arXiv 2604.26340).

    Each targeted layer has `num_experts` LoRA experts and a linear router without bias. A token goes to the `top_k`
    experts of the highest router scores, weighted by a softmax over those scores. A balance loss spreads the tokens
    until, at one step of training, every layer keeps the experts that it uses.

    Args:
        num_experts: LoRA experts of a layer before pruning, 2 or more, default 8.
        top_k: experts that a token goes to, default 2; where fewer are kept, all of those.
        r: rank of an expert, default 8.
        lora_alpha: an expert's output is scaled by `lora_alpha / r`, default 16.
        lora_dropout: on the input of the experts, not of the router, in [0, 1), default 0.05.
        target_modules: names, or a regular expression, of linear layers. None takes all but the output layer and, in a
            MoE model, its routers and its routed experts; "all-linear" is PEFT's.
        exclude_modules: names or a regular expression of layers to leave out.
        modules_to_save: names of modules to train whole and to save.
        init_lora_weights: True draws A and the router and sets B to zero; False draws B, too.
        balance_loss_coef: factor of the balance loss, default 0.01; 0 leaves it out.
        prune_step: number of optimizer steps after which the experts are pruned. Wins over `prune_ratio`.
        prune_ratio: the same as a share of all steps, in (0, 1), default 0.1. With None in both, nothing is pruned.
        prune_threshold: an expert stays if its share of the layer's routed tokens is at least `prune_threshold /
            num_experts`, default 0.9. Two stay at least, the most used ones.
        kept_experts: path of a layer -> ids of the experts that it kept. Filled by pruning, and saved.

    Raises:
        SieveError: an option has a value that cannot work; the text says which one, and what would.
    """

    num_experts: int = field(default=8, metadata={"help": "LoRA experts of a layer before pruning."})
    top_k: int = field(default=2, metadata={"help": "Experts that a token goes to."})
    r: int = field(default=8, metadata={"help": "Rank of an expert."})
    lora_alpha: float = field(default=16, metadata={"help": "An expert's output is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the experts."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linear layers to adapt; None is all but output layer, routers and experts."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train whole and to save."})
    init_lora_weights: bool = field(default=True, metadata={"help": "Whether B starts as zeros."})
    balance_loss_coef: float = field(default=0.01, metadata={"help": "Factor of the balance loss."})
    prune_step: int | None = field(default=None, metadata={"help": "Optimizer steps before pruning."})
    prune_ratio: float | None = field(default=0.1, metadata={"help": "Share of the steps before pruning."})
    prune_threshold: float = field(
        default=0.9, metadata={"help": "An expert stays with this multiple of the uniform share of tokens."}
    )
    kept_experts: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Layer path -> ids of the experts kept by pruning."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORA_MOE")
        check_names(self)
        as_sets(self)
        self.num_experts = whole("num_experts", self.num_experts, least=MIN_KEPT)
        self.top_k, self.r = whole("top_k", self.top_k), rank("r", self.r)
        if self.top_k > self.num_experts:
            raise must_be("top_k", f"at most num_experts, which is {self.num_experts}", self.top_k)
        flags(self, ("init_lora_weights",))
        number("lora_alpha", self.lora_alpha, lambda alpha: alpha != 0, "a finite, non-zero number")
        number("lora_dropout", self.lora_dropout, lambda p: 0 <= p < 1, "a number in [0, 1)")
        number("balance_loss_coef", self.balance_loss_coef, lambda coef: coef >= 0, "a finite number of at least 0")
        number("prune_threshold", self.prune_threshold, lambda threshold: threshold > 0, "a finite number above 0")
        self.prune_step = whole("prune_step", self.prune_step, optional=True)
        if self.prune_ratio is not None:
            number("prune_ratio", self.prune_ratio, lambda ratio: 0 < ratio < 1, "a number between 0 and 1, or None")
        self.kept_experts = _checked_kept(self.kept_experts, self.num_experts)

    def pruning_step(self, total_steps: int | None = None) -> int | None:
        """After how many optimizer steps the experts are pruned; None for never.

        Raises:
            SieveError: that is a share of steps whose number is not known.
        """
        if self.prune_step is not None or self.prune_ratio is None:
            return self.prune_step
        if total_steps is None:
            raise SieveError(
                f"prune_ratio is {self.prune_ratio}, and the number of training steps is not known. Set prune_step in "
                "LoraMoeConfig, or pass total_steps."
            )
        return max(1, round(self.prune_ratio * total_steps))


def _checked_kept(value: Any, num_experts: int) -> dict[str, list[int]] | None:
    if value is None:
        return None
    fine = isinstance(value, Mapping) and all(
        isinstance(ids, list | tuple)
        and all(type(i) is int and 0 <= i < num_experts for i in ids)
        and len(ids) >= MIN_KEPT
        and sorted(set(ids)) == list(ids)
        for ids in value.values()
    )
    if not fine:
        kind = f"layer path -> {MIN_KEPT} or more ascending ids below {num_experts}"
        raise must_be("kept_experts", kind, value, BY_HAND)
    return {path: list(ids) for path, ids in value.items()}
