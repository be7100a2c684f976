"""`SieveLoraConfig`: LoRA's options, plus how to choose the experts that get an adapter."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftType
from peft.utils import CONFIG_NAME

from ...checks import share
from ...errors import SieveError
from ...files import replaced_when_done
from ...moe.families.family import PROJECTIONS
from ...routing.strategies import validate_selection_options
from ..common.config import RUNTIME_ONLY
from ..common.peft_settings import check_flags, check_names, check_patterns

# LoRA options that have no meaning for adapters inside a stack of experts, and what to write instead.
_REFUSED = {
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "use_qalora": False,
    "use_bdlora": None,
    "megatron_config": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "arrow_config": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}
_INITS = (True, False, "gaussian")
# Numbers that may be NumPy's, which JSON does not take.
_PLAIN: dict[str, type[int] | type[float]] = {
    "top_k": int,
    **dict.fromkeys(("top_k_frac", "coverage", "top_p", "hellori_density", "calib_stability"), float),
}


@dataclass
class SieveLoraConfig(LoraConfig):
    """LoRA on the experts that a task uses, and on attention, router and shared experts (MoE-Sieve, arXiv 2603.24044).

    It takes what `peft.LoraConfig` takes, and:

    Args:
        r: rank.
        lora_alpha: the scaling is `lora_alpha / r`.
        lora_dropout: on expert adapters, too; the three are the recipe of the paper. The adapter of a router that is a
            bare parameter takes no dropout.
        top_k_frac: share of each layer's routed experts to adapt, in (0, 1]; `max(1, round(top_k_frac * num_experts))`.
        top_k: the same as a count; wins over `top_k_frac`.
        strategy: "uniform", "greedy" (same total budget, largest coverage gain first, Appendix C), "coverage" (fewest
            experts per layer that reach `coverage`), "cumulative" (highest scores of each layer until their sum reaches
            `top_p`; ESFT, arXiv 2407.01906) or "random" (control).
        score: "count" (tokens routed), "mass" (summed gate weight), "esft_gate" or "esft_token" (the same as averages
            over samples).
        coverage: target of the "coverage" strategy, in (0, 1].
        top_p: target of the "cumulative" strategy, in (0, 1]; None is 0.1 for "esft_gate" and 0.2 for "esft_token".
        expert_projections: which of "gate_proj", "up_proj", "down_proj" get an adapter; None is all.
        train_attention: adapt the attention, which every token passes. `target_modules`, if given, replaces this and
            the next two for linear layers (a router whose weight is a bare parameter, as in most models of
            transformers 5, still follows `train_router`).
        train_router: adapt the router.
        train_shared_experts: adapt the shared experts.
        expert_tuning: "lora", or "full": the selected experts' own weights are trained, as a difference to the base's
            that has their shape and begins at zero; r, alpha and dropout do not apply to them (ESFT, arXiv 2407.01906).
        hellori_density: HELLoRI (arXiv 2605.18795): A of the experts' adapters is frozen, and of B only this share, in
            (0, 1], drawn with `hellori_seed`, is trained, the rest being zero. None trains all of both.
        calib_dataset: what to profile the routing on: Hub id or local file, `datasets.Dataset`, list of strings or
            dicts (`text`, `messages`, `prompt` + `completion`, `input_ids`), or model-ready batches. Runtime only.
        calib_tokenizer: tokenizer, or a name or path of one; None takes the one saved with the model. Runtime only.
        calib_formatting_func: row -> str, for rows in another form. Runtime only.
        calib_split: the split to read, where there are several.
        calib_samples: rows to profile; drawn at random where there are more.
        calib_max_length: tokens of a row; the rest is cut off.
        calib_batch_size: rows of a forward pass.
        calib_seed: of the drawing.
        calib_stability: None profiles all samples. A share in (0, 1] stops as soon as two halves of the samples so far
            select the same experts to at least this Jaccard similarity in every layer, and warns if they never do.
        selected_experts: the mask, experts-module path -> expert ids. Filled by calibration and saved in
            `adapter_config.json`; if given, nothing is calibrated.
        calibration: where the mask came from. Filled by calibration and saved.
        expert_shapes: experts-module path -> [num_experts, hidden_size, intermediate_size] of the model that the mask
            belongs to. Filled at injection and saved, so that another model is refused.

    Raises:
        SieveError: an option has a value that cannot work; the text says which one, and what would.
    """

    r: int = field(default=32, metadata={"help": "Rank of every adapter."})
    lora_alpha: int = field(default=64, metadata={"help": "Adapter output is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of every adapter."})
    top_k_frac: float = field(default=0.25, metadata={"help": "Share of each layer's routed experts to adapt."})
    top_k: int | None = field(default=None, metadata={"help": "Experts to adapt per layer; wins over top_k_frac."})
    strategy: str = field(default="uniform", metadata={"help": "uniform, greedy, coverage, cumulative or random."})
    score: str = field(default="count", metadata={"help": "count, mass, esft_gate or esft_token."})
    coverage: float = field(default=0.6, metadata={"help": "Target of the coverage strategy."})
    top_p: float | None = field(default=None, metadata={"help": "Target of the cumulative strategy."})
    expert_projections: list[str] | None = field(
        default=None, metadata={"help": "Which of gate_proj, up_proj, down_proj get an adapter; None is all."}
    )
    train_attention: bool = field(default=True, metadata={"help": "Adapt the attention projections."})
    train_router: bool = field(default=True, metadata={"help": "Adapt the router."})
    train_shared_experts: bool = field(default=True, metadata={"help": "Adapt the shared experts."})
    expert_tuning: str = field(default="lora", metadata={"help": "lora, or full for the experts' own weights."})
    hellori_density: float | None = field(
        default=None, metadata={"help": "Train this share of the expert adapters' B, and nothing of their A (HELLoRI)."}
    )
    hellori_seed: int = field(default=0, metadata={"help": "Seed of the share that hellori_density trains."})
    calib_split: str = field(default="train", metadata={"help": "Split of the calibration data set."})
    calib_samples: int = field(default=512, metadata={"help": "Samples to profile at most."})
    calib_max_length: int = field(default=2048, metadata={"help": "Tokens per sample at most."})
    calib_batch_size: int = field(default=8, metadata={"help": "Samples per forward pass."})
    calib_seed: int = field(default=0, metadata={"help": "Seed of the sample of the data and of strategy='random'."})
    calib_stability: float | None = field(
        default=None,
        metadata={"help": "Profile until two halves of the data select the same to this Jaccard similarity."},
    )
    selected_experts: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "The mask: experts-module path -> expert ids."}
    )
    calibration: dict[str, Any] | None = field(default=None, metadata={"help": "Provenance of the mask."})
    expert_shapes: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Experts-module path -> [num_experts, hidden_size, intermediate_size]."}
    )
    calib_dataset: InitVar[Any] = None
    calib_tokenizer: InitVar[Any] = None
    calib_formatting_func: InitVar[Callable[[dict[str, Any]], Any] | None] = None

    def __post_init__(self, calib_dataset: Any, calib_tokenizer: Any, calib_formatting_func: Any) -> None:
        self._refuse_options()
        super().__post_init__()
        self.peft_type = PeftType("SIEVE_LORA")
        vars(self).update(zip(RUNTIME_ONLY, (calib_dataset, calib_tokenizer, calib_formatting_func), strict=True))
        names = ("top_k_frac", "top_k", "strategy", "score", "coverage", "top_p")
        validate_selection_options(**{name: getattr(self, name) for name in names})
        self._check_expert_tuning()
        share("calib_stability", self.calib_stability, optional=True)
        for name, plain in _PLAIN.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | float):
                setattr(self, name, plain(value))
        self.expert_projections = _checked_projections(self.expert_projections)
        self.selected_experts = checked_mask(self.selected_experts)
        self.expert_shapes = _checked_shapes(self.expert_shapes)
        if not isinstance(self.calibration, dict | None):
            raise SieveError(
                f"calibration is {_shown(self.calibration)}, expected the mapping that calibration fills in, or None: "
                "the adapter_config.json was changed by hand, take it from its source again"
            )

    def _refuse_options(self) -> None:
        for name, neutral in _REFUSED.items():
            value = getattr(self, name, neutral)
            if value not in (neutral, None, False):  # an empty mapping switches on, too
                raise SieveError(
                    f"{name}={_shown(value)} cannot hold for adapters inside a stack of experts: leave it at {neutral}"
                )
        # By identity first: 1 == True.
        if not (self.init_lora_weights in _INITS and isinstance(self.init_lora_weights, bool | str)):
            raise SieveError(
                f"init_lora_weights={_shown(self.init_lora_weights)} is no initialisation that packed expert factors "
                "have, expected one that needs neither base weights nor data: use True, False or 'gaussian'"
            )
        for name in ("r", "calib_samples", "calib_max_length", "calib_batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SieveError(f"{name} is {_shown(value)}, expected a positive whole number: pass one")
        check_names(self)
        check_patterns(self)
        check_flags(self, ("train_attention", "train_router", "train_shared_experts"))
        if self.bias not in ("none", "all", "lora_only"):
            raise SieveError(f"bias is {_shown(self.bias)}, expected 'none', 'all' or 'lora_only': pass one")
        alpha = self.lora_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha or not math.isfinite(alpha):
            raise SieveError(f"lora_alpha is {_shown(alpha)}, expected a finite number other than 0: pass one")
        dropout = self.lora_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise SieveError(f"lora_dropout is {_shown(dropout)}, expected a number in [0, 1): pass one")

    def _check_expert_tuning(self) -> None:
        if self.expert_tuning not in ("lora", "full"):
            raise SieveError(f"expert_tuning is {_shown(self.expert_tuning)}, expected 'lora' or 'full': pass one")
        if isinstance(self.hellori_seed, bool) or not isinstance(self.hellori_seed, int):
            raise SieveError(
                f"hellori_seed is {_shown(self.hellori_seed)}, expected a whole number: pass one such as 0"
            )
        if self.hellori_density is None:
            return
        share("hellori_density", self.hellori_density)
        if self.expert_tuning == "full":
            raise SieveError(
                "hellori_density was given with expert_tuning='full', expected 'lora', since it is a share of a "
                "factor that full tuning has not: leave one of them out"
            )

    # The data set, the tokenizer and the function stay with the object, are shared by its copies, and go no further.

    def __copy__(self) -> SieveLoraConfig:
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> SieveLoraConfig:
        clone = copy.copy(self)
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            clone.__dict__[name] = value if name in RUNTIME_ONLY else copy.deepcopy(value, memo)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in RUNTIME_ONLY:
            # A name or a path travels to another process; a data set, a tokenizer or a lambda may not be able to.
            if not isinstance(state.get(name), str):
                state[name] = None
        return state

    def to_dict(self) -> dict[str, Any]:
        """The serialisable fields; sets as sorted lists, so that saving twice gives the same file."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, lists of numbers on one line each, so that a person can read the mask.

        The file appears whole or not at all: it is written beside its place and then moved there.
        """
        with replaced_when_done(save_directory) as staging:
            super().save_pretrained(staging, **kwargs)
            path = Path(staging, CONFIG_NAME)
            path.write_text(_compact_lists(path.read_text()) + "\n")


def checked_mask(mask: Any) -> dict[str, list[int]] | None:
    """A mask as sorted lists of ids.

    Raises:
        SieveError: not a mapping from paths to non-negative, unrepeated whole numbers.
    """
    if mask is None:
        return None
    if not isinstance(mask, Mapping):
        raise SieveError(
            f"selected_experts is {_shown(mask)}, expected a mapping from experts-module path to expert ids such as "
            "{'model.layers.0.mlp.experts': [3, 17]}: pass one, or calib_dataset to have it filled"
        )
    checked = {}
    for path, ids in mask.items():
        if not isinstance(path, str):
            raise SieveError(f"selected_experts has the key {_shown(path)}, expected the path of an experts module")
        if isinstance(ids, str | Mapping) or not hasattr(ids, "__iter__"):
            raise SieveError(f"selected_experts[{path!r}] is {_shown(ids)}, expected a list of expert ids: pass one")
        checked[path] = _checked_ids(path, list(ids))
    if not any(checked.values()):
        raise SieveError("selected_experts names no expert at all, expected one or more: pass a mask with expert ids")
    return checked


def _checked_ids(path: str, ids: list[Any]) -> list[int]:
    for value in ids:
        # numpy and torch integers have __index__ too; bool does as well, but is no id.
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise SieveError(
                f"selected_experts[{path!r}] holds {_shown(value)}, expected whole numbers: pass the ids of experts"
            )
    numbers = sorted(value.__index__() for value in ids)
    if numbers and numbers[0] < 0:
        raise SieveError(
            f"selected_experts[{path!r}] holds the negative id {numbers[0]}, expected ids from 0 on: pass those"
        )
    repeated = sorted({n for n in numbers if numbers.count(n) > 1})
    if repeated:
        raise SieveError(
            f"selected_experts[{path!r}] holds {repeated} more than once, expected each id once: drop them"
        )
    return numbers


def _checked_projections(value: Any) -> list[str] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    unknown = [name for name in names if name not in PROJECTIONS]
    if unknown or not names:
        raise SieveError(
            f"expert_projections is {_shown(value)}, expected one or more of {', '.join(PROJECTIONS)}: pass those, or "
            "None for all"
        )
    return [name for name in PROJECTIONS if name in names]


def _checked_shapes(value: Any) -> dict[str, list[int]] | None:
    if value is None:
        return None
    fine = isinstance(value, Mapping) and all(
        isinstance(sizes, list | tuple) and len(sizes) == 3 and all(type(n) is int and n > 0 for n in sizes)
        for sizes in value.values()
    )
    if not fine:
        raise SieveError(
            f"expert_shapes is {_shown(value)}, expected experts-module path -> [num_experts, hidden_size, "
            "intermediate_size]: the adapter_config.json was changed by hand, take it from its source again"
        )
    return {path: list(sizes) for path, sizes in value.items()}


def _compact_lists(text: str) -> str:
    """JSON with every list of numbers on one line."""
    return re.sub(r"\[[\d\s,]+\]", lambda match: json.dumps(json.loads(match.group())), text)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
