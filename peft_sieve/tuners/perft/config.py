"""`PerftConfig`: which adapters stand beside a MoE block, and how they are mixed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft import PeftConfig, PeftType
from transformers.activations import ACT2FN

from ...errors import SieveError
from ..common.config import RUNTIME_ONLY
from ..common.peft_settings import check_flags, check_names
from ..sieve.config import SieveLoraConfig

VARIANTS = ("R", "E", "D", "S")
FORMS = ("lora", "bottleneck")
DEFAULT_NUM_ADAPTERS = 4
DEFAULT_ADAPTERS_PER_TOKEN = 2

# Options of `SieveLoraConfig` that say which experts are hot; they mean the same here.
SELECTION = (
    *("top_k_frac", "top_k", "strategy", "score", "coverage", "selected_experts", "calibration", "expert_shapes"),
    *("calib_split", "calib_samples", "calib_max_length", "calib_batch_size", "calib_seed", "calib_stability"),
)


@dataclass
class PerftConfig(PeftConfig):
    """Adapters whose output is added to that of a MoE block (PERFT, arXiv 2508.02587).

    Args:
        variant: "R" (routed: a router of its own sends each token to some of the adapters), "E" (embedded: one adapter
            for each expert, mixed with the weights that the frozen router gives the experts), "D" (dense: all adapters
            on every token, summed) or "S" (a single adapter on every token).
        form: "lora" (B A x * alpha / r) or "bottleneck" (up(activation(down x))); neither has biases.
        r: rank, or width of the bottleneck; default 16.
        alpha: of the form "lora", default 32.
        dropout: on the input of the adapters, not of their router, in [0, 1); default 0.05.
        activation: of the form "bottleneck", a name that transformers knows; default "silu".
        init_weights: True starts with an adapter that adds zero; False with random values (for debugging).
        num_adapters: adapters at each block, for R and D; None is 4.
        num_adapters_per_tok: adapters that R sends a token to; None is 2, or all if there are fewer.
        norm_topk_prob: whether the gates of a token's adapters are made to sum to 1 (R).
        aux_loss_coef: factor of the balance loss of R's router, 0 for none; default 0.01.
        target_modules: None adapts every MoE block; names or a pattern, those MoE blocks that match.
        exclude_modules: leaves some of these out, as the next two do, all as in `peft.LoraConfig`.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers.
        modules_to_save: modules to train whole beside the adapters.
        selected_experts: E only: experts-module path -> ids of the experts that get an adapter; None is all of them.
            Filled by calibration and saved.
        calib_dataset: E only: data to find the hot experts with. This, `calib_tokenizer`, `calib_formatting_func`,
            `calib_split`, `calib_samples`, `calib_max_length`, `calib_batch_size`, `calib_seed`, `calib_stability`,
            `top_k_frac`, `top_k`, `strategy`, `score` and `coverage` are those of `SieveLoraConfig`.
        calibration: E only: where the selection came from.
        expert_shapes: E only: the sizes of the experts it was made for.

    Raises:
        SieveError: an option has a value that cannot work; the text says which one, and what would.
    """

    variant: str = field(default="R", metadata={"help": "R (routed), E (embedded), D (dense) or S (single)."})
    form: str = field(default="lora", metadata={"help": "lora or bottleneck."})
    r: int = field(default=16, metadata={"help": "Rank, or width of the bottleneck."})
    alpha: float = field(default=32, metadata={"help": "The output of the form lora is scaled by alpha / r."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the adapters."})
    activation: str = field(default="silu", metadata={"help": "Activation of the form bottleneck."})
    init_weights: bool = field(default=True, metadata={"help": "Start with an adapter that adds zero."})
    num_adapters: int | None = field(default=None, metadata={"help": "Adapters at each block, for R and D."})
    num_adapters_per_tok: int | None = field(default=None, metadata={"help": "Adapters that R sends a token to."})
    norm_topk_prob: bool = field(default=False, metadata={"help": "Whether R's gates of a token sum to 1."})
    aux_loss_coef: float = field(default=0.01, metadata={"help": "Factor of the balance loss of R's router."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "MoE blocks to adapt, by name or pattern; None is all of them."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "MoE blocks to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train whole."})
    top_k_frac: float = field(default=0.25, metadata={"help": "E: share of each layer's experts with an adapter."})
    top_k: int | None = field(default=None, metadata={"help": "E: the same as a count; wins over top_k_frac."})
    strategy: str = field(default="uniform", metadata={"help": "E: how experts are selected."})
    score: str = field(default="count", metadata={"help": "E: what experts are selected by."})
    coverage: float = field(default=0.6, metadata={"help": "E: target of the coverage strategy."})
    calib_split: str = field(default="train", metadata={"help": "Split of the calibration data set."})
    calib_samples: int = field(default=512, metadata={"help": "Samples to profile at most."})
    calib_max_length: int = field(default=2048, metadata={"help": "Tokens per sample at most."})
    calib_batch_size: int = field(default=8, metadata={"help": "Samples per forward pass."})
    calib_seed: int = field(default=0, metadata={"help": "Seed of the sample of the data."})
    calib_stability: float | None = field(default=None, metadata={"help": "Profile until the selection is stable."})
    selected_experts: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "E: experts-module path -> ids of the experts with an adapter."}
    )
    calibration: dict[str, Any] | None = field(default=None, metadata={"help": "Provenance of selected_experts."})
    expert_shapes: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Experts-module path -> [num_experts, hidden_size, intermediate_size]."}
    )
    calib_dataset: InitVar[Any] = None
    calib_tokenizer: InitVar[Any] = None
    calib_formatting_func: InitVar[Callable[[dict[str, Any]], Any] | None] = None

    def __post_init__(self, calib_dataset: Any, calib_tokenizer: Any, calib_formatting_func: Any) -> None:
        super().__post_init__()
        self.peft_type = PeftType("PERFT")
        check_names(self)
        check_flags(self, ("init_weights", "norm_topk_prob"))
        runtime = dict(zip(RUNTIME_ONLY, (calib_dataset, calib_tokenizer, calib_formatting_func), strict=True))
        # Holds what is never saved, under copies and pickling too, and checks what the two have in common.
        self._selection = SieveLoraConfig(**{name: getattr(self, name) for name in SELECTION}, **runtime)
        for name in SELECTION:
            setattr(self, name, getattr(self._selection, name))
        self._check_choices()
        self._check_numbers()
        self._check_variant()
        for name in ("target_modules", "exclude_modules"):
            # As in PEFT, which then looks names up.
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    def selection(self) -> SieveLoraConfig:
        """How E selects experts, as the functions that do it take it."""
        selection = copy.copy(self._selection)
        for name in SELECTION:
            setattr(selection, name, getattr(self, name))
        return selection

    @property
    def selects(self) -> bool:
        """Whether only some of the experts are to get an adapter."""
        return self.selected_experts is not None or vars(self._selection)["calib_dataset"] is not None

    @property
    def scaling(self) -> float:
        """Factor on the output of an adapter."""
        return self.alpha / self.r if self.form == "lora" else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The serialisable fields; sets as sorted lists, so that saving twice gives the same file."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    def _check_choices(self) -> None:
        # The paper's names are capitals.
        self.variant = self.variant.upper() if isinstance(self.variant, str) else self.variant
        for name, choices in (("variant", VARIANTS), ("form", FORMS)):
            if getattr(self, name) not in choices:
                raise SieveError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}: pass one")
        if not isinstance(self.activation, str) or self.activation not in ACT2FN:
            raise SieveError(
                f"activation is {self.activation!r}, expected a name that transformers knows, such as 'silu', 'gelu' "
                "or 'relu': pass one"
            )

    def _check_numbers(self) -> None:
        for name in ("r", "num_adapters", "num_adapters_per_tok"):
            value = getattr(self, name)
            if value is None and name != "r":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SieveError(f"{name} is {value!r}, expected a positive whole number: pass one")
        ranges: dict[str, tuple[Callable[[float], bool], str]] = {
            "alpha": (lambda value: value != 0 and math.isfinite(value), "a finite number other than 0"),
            "dropout": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
            "aux_loss_coef": (lambda value: 0 <= value < math.inf, "a finite number from 0 on"),
        }
        for name, (fits, expected) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                raise SieveError(f"{name} is {value!r}, expected {expected}: pass one")

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
