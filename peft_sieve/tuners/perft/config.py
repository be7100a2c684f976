"""`PerftConfig`: which adapters stand beside a MoE block, and how they are mixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftType
from transformers.activations import ACT2FN

from ...checks import choice, flags, must_be, number, whole
from ...errors import SieveError
from ..common.config import SelectionConfig, as_sets, with_former_names
from ..common.peft_settings import check_names, rank

VARIANTS = ("R", "E", "D", "S")
FORMS = ("lora", "bottleneck")
DEFAULT_NUM_ADAPTERS = 4
DEFAULT_ADAPTERS_PER_TOKEN = 2
# The names that settings had before they were named as in the other methods -> those that they have.
FORMER_NAMES = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "init_weights": "init_lora_weights",
    "aux_loss_coef": "balance_loss_coef",
}


@with_former_names(FORMER_NAMES)
@dataclass
class PerftConfig(SelectionConfig):
    """Adapters whose output is added to that of a MoE block (PERFT, arXiv 2508.02587).

    Args:
        variant: "R" (routed: a router of its own sends each token to some of the adapters), "E" (embedded: one adapter
            for each expert, mixed with the weights that the frozen router gives the experts), "D" (dense: all adapters
            on every token, summed) or "S" (a single adapter on every token).
        form: "lora" (B A x * lora_alpha / r) or "bottleneck" (up(activation(down x))); neither has biases.
        r: rank, or width of the bottleneck; default 16.
        lora_alpha: of the form "lora", default 32.
        lora_dropout: on the input of the adapters, not of their router, in [0, 1); default 0.05.
        activation: of the form "bottleneck", a name that transformers knows; default "silu".
        init_lora_weights: True starts with an adapter that adds zero; False with random values (for debugging).
        num_adapters: adapters at each block, for R and D; None is 4.
        num_adapters_per_tok: adapters that R sends a token to; None is 2, or all if there are fewer.
        norm_topk_prob: whether the gates of a token's adapters are made to sum to 1 (R).
        balance_loss_coef: factor of the balance loss of R's router, 0 for none; default 0.01.
        target_modules: None adapts every MoE block; names or a pattern, those MoE blocks that match.
        exclude_modules: leaves some of these out, as the next two do, all as in `peft.LoraConfig`.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers.
        modules_to_save: modules to train whole beside the adapters.
        selected_experts: E only: experts-module path -> ids of the experts that get an adapter; None is all of them.
            Filled by calibration and saved.
        calib_dataset: E only: data to find the hot experts with. This, `calib_tokenizer`, `calib_formatting_func`,
            `calib_split`, `calib_samples`, `calib_max_length`, `calib_batch_size`, `calib_seed`, `calib_stability`,
            `top_k_frac`, `top_k`, `strategy`, `score`, `coverage` and `top_p` are those of `SieveLoraConfig`.
        calibration: E only: where the selection came from.
        expert_shapes: E only: the sizes of the experts it was made for.

    Four settings are also taken, read and set by the names that they had: `alpha` (`lora_alpha`), `dropout`
    (`lora_dropout`), `init_weights` (`init_lora_weights`), `aux_loss_coef` (`balance_loss_coef`).

    Raises:
        SieveError: an option has a value that cannot work; the text says which one, and what would.
    """

    variant: str = field(default="R", metadata={"help": "R (routed), E (embedded), D (dense) or S (single)."})
    form: str = field(default="lora", metadata={"help": "lora or bottleneck."})
    r: int = field(default=16, metadata={"help": "Rank, or width of the bottleneck."})
    lora_alpha: float = field(default=32, metadata={"help": "The output of the form lora is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the adapters."})
    activation: str = field(default="silu", metadata={"help": "Activation of the form bottleneck."})
    init_lora_weights: bool = field(default=True, metadata={"help": "Start with an adapter that adds zero."})
    num_adapters: int | None = field(default=None, metadata={"help": "Adapters at each block, for R and D."})
    num_adapters_per_tok: int | None = field(default=None, metadata={"help": "Adapters that R sends a token to."})
    norm_topk_prob: bool = field(default=False, metadata={"help": "Whether R's gates of a token sum to 1."})
    balance_loss_coef: float = field(default=0.01, metadata={"help": "Factor of the balance loss of R's router."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "MoE blocks to adapt, by name or pattern; None is all of them."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "MoE blocks to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train whole."})

    def __post_init__(self, calib_dataset: Any, calib_tokenizer: Any, calib_formatting_func: Any) -> None:
        super().__post_init__()
        self.peft_type = PeftType("PERFT")
        check_names(self)
        flags(self, ("init_lora_weights", "norm_topk_prob"))
        self._check_selection(calib_dataset, calib_tokenizer, calib_formatting_func)
        # The paper's names are capitals.
        self.variant = self.variant.upper() if isinstance(self.variant, str) else self.variant
        choice("variant", self.variant, VARIANTS)
        choice("form", self.form, FORMS)
        if not isinstance(self.activation, str) or self.activation not in ACT2FN:
            kind = "a name that transformers knows, such as 'silu', 'gelu' or 'relu'"
            raise must_be("activation", kind, self.activation)
        self.r = rank("r", self.r)
        for name in ("num_adapters", "num_adapters_per_tok"):
            setattr(self, name, whole(name, getattr(self, name), optional=True))
        number("lora_alpha", self.lora_alpha, lambda value: value != 0, "a finite, non-zero number")
        number("lora_dropout", self.lora_dropout, lambda value: 0 <= value < 1, "a number in [0, 1)")
        number("balance_loss_coef", self.balance_loss_coef, lambda value: value >= 0, "a finite number of at least 0")
        self._check_variant()
        as_sets(self)

    @property
    def selects(self) -> bool:
        """Whether only some of the experts are to get an adapter."""
        return self.selected_experts is not None or self.calibrates

    @property
    def scaling(self) -> float:
        """Factor on the output of an adapter."""
        return self.lora_alpha / self.r if self.form == "lora" else 1.0

    def _check_variant(self) -> None:
        if self.variant != "E" and self.selects:
            raise SieveError(
                f"experts are selected (selected_experts or calib_dataset) for variant {self.variant}, expected that "
                "for variant E only, since the others have no adapter for an expert: leave it out, or pass variant='E'"
            )
        if self.variant == "E" and self.num_adapters is not None:
            raise SieveError(
                f"num_adapters is {self.num_adapters} for variant E, expected None, since that has one for each "
                "expert: leave it out, or select experts with calib_dataset or selected_experts"
            )
        if self.variant == "S" and self.num_adapters not in (None, 1):
            raise SieveError(
                f"num_adapters is {self.num_adapters} for variant S, expected None or 1, since that has a single one: "
                "leave it out, or pass variant='D' for several"
            )
        if self.variant != "R" and self.num_adapters_per_tok is not None:
            raise SieveError(
                f"num_adapters_per_tok is {self.num_adapters_per_tok} for variant {self.variant}, expected None, since "
                "only R has a router of its own: leave it out, or pass variant='R'"
            )
        if self.variant in ("R", "D") and self.num_adapters is None:
            self.num_adapters = DEFAULT_NUM_ADAPTERS
        if self.variant == "S":
            self.num_adapters = 1
        if self.variant == "R":
            assert self.num_adapters is not None
            if self.num_adapters_per_tok is None:
                self.num_adapters_per_tok = min(DEFAULT_ADAPTERS_PER_TOKEN, self.num_adapters)
            if self.num_adapters_per_tok > self.num_adapters:
                raise SieveError(
                    f"num_adapters_per_tok is {self.num_adapters_per_tok} of num_adapters {self.num_adapters}, "
                    "expected no more than there are: pass a smaller number"
                )
