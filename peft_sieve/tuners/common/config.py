"""What the configurations of several methods have in common: how they are saved, and how experts are selected."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields
from functools import partial, wraps
from operator import attrgetter
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ...checks import must_be, one_line, share, shown, whole
from ...errors import SieveError
from ...files import replaced_when_done
from ...moe.wrappers import plain_name
from ...routing.strategies import SelectionOptions

# Held by the object, never by a dataclass field: PEFT serialises with `dataclasses.asdict`, which deep-copies fields.
RUNTIME_ONLY = ("calib_dataset", "calib_tokenizer", "calib_formatting_func")
# The options of a selection that a configuration has under the same name.
_OPTIONS = [option.name for option in fields(SelectionOptions) if option.name != "seed"]
BY_HAND = "The adapter_config.json was changed by hand: take it from its source again."


class MethodConfig(PeftConfig):
    """A configuration that is saved whole or not at all, and twice to the same file.

    Names in it are those of a model without wrappers, such as `torch.compile` puts around modules.
    """

    def __post_init__(self, *args: Any) -> None:
        for one in fields(self):
            setattr(self, one.name, _without_wrappers(one.name, getattr(self, one.name)))
        try:
            super().__post_init__(*args)
        except SieveError:
            raise
        except (TypeError, ValueError) as error:  # PEFT's own checks
            raise SieveError(f"{one_line(error)}.") from error

    def to_dict(self) -> dict[str, Any]:
        """The serialisable fields; sets as sorted lists, so that saving twice gives the same file."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, lists of numbers on one line each, so that a person can read the mask.

        The file appears whole or not at all: it is written beside its place and then moved there.
        """
        with replaced_when_done(save_directory, "configuration") as staging:
            super().save_pretrained(staging, **kwargs)
            path = Path(staging, CONFIG_NAME)
            path.write_text(_compact_lists(path.read_text()) + "\n")


def _without_wrappers(setting: str, value: Any) -> Any:
    """A setting with plain names of modules in it; others are themselves."""
    if isinstance(value, str):
        return plain_name(value)
    if not isinstance(value, Mapping | list | tuple | set) or all(plain_name(n) == n for n in value if type(n) is str):
        return value
    names = [plain_name(name) if isinstance(name, str) else name for name in value]
    if not isinstance(value, Mapping):
        return type(value)(names)
    repeated = sorted({str(name) for name in names if names.count(name) > 1})
    if repeated:
        raise SieveError(f"{setting} names {repeated[0]!r} more than once, with and without a wrapper. Pass it once.")
    return dict(zip(names, value.values(), strict=True))


def _compact_lists(text: str) -> str:
    """JSON with every list of numbers on one line."""
    return re.sub(r"\[[\d\s,]+\]", lambda match: json.dumps(json.loads(match.group())), text)


def as_sets(config: Any) -> None:
    """Lists of modules as sets, as in PEFT, which then looks names up."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), list):
            setattr(config, name, set(getattr(config, name)))


def with_former_names(names: Mapping[str, str]) -> Callable[[type], type]:
    """A class decorator: settings are also taken, read and set by the names that they had.

    Args:
        names: former name -> name.
    """

    def decorate(config: Any) -> type:
        original = config.__init__

        @wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            # dataclasses.replace gives all fields, and those to change by whatever name.
            is_copy = all(one.name in kwargs for one in fields(config) if one.init)
            for former, name in names.items():
                if former in kwargs:
                    if name in kwargs and not is_copy:
                        raise SieveError(f"{former} is the former name of {name}. Pass one of them.")
                    kwargs[name] = kwargs.pop(former)
            original(self, *args, **kwargs)

        config.__init__ = init
        for former, name in names.items():
            setattr(config, former, property(attrgetter(name), partial(_set, name)))
        return config

    return decorate


def _set(name: str, config: Any, value: Any) -> None:
    setattr(config, name, value)


@dataclass
class SelectionConfig(MethodConfig):
    """How experts are selected: the fields of every method that calibrates, which mean the same in each.

    They are described at `SieveLoraConfig`.
    """

    top_k_frac: float = field(default=0.25, metadata={"help": "Share of each layer's routed experts to adapt."})
    top_k: int | None = field(default=None, metadata={"help": "Experts to adapt per layer; wins over top_k_frac."})
    strategy: str = field(default="uniform", metadata={"help": "uniform, greedy, coverage, cumulative or random."})
    score: str = field(default="count", metadata={"help": "count, mass, esft_gate or esft_token."})
    coverage: float = field(default=0.6, metadata={"help": "Target of the coverage strategy."})
    top_p: float | None = field(default=None, metadata={"help": "Target of the cumulative strategy."})
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

    def _check_selection(self, *runtime: Any) -> None:
        """Check the fields, and take the values of `RUNTIME_ONLY`."""
        vars(self).update(zip(RUNTIME_ONLY, runtime, strict=True))
        self.selected_experts = checked_mask(self.selected_experts, may_be_empty=self.adapts([]))
        self.expert_shapes = _checked_shapes(self.expert_shapes)
        self.calib_seed = whole("calib_seed", self.calib_seed, least=None)
        # A saved mask needs no score: that may be one which only the process that calibrated knew.
        options = SelectionOptions(**self.selection_options(), check_scores=self.selected_experts is None)
        for name in _OPTIONS:
            setattr(self, name, getattr(options, name))  # plain numbers, which JSON takes
        for name in ("calib_samples", "calib_max_length", "calib_batch_size"):
            setattr(self, name, whole(name, getattr(self, name)))
        self.calib_stability = share("calib_stability", self.calib_stability, optional=True)
        if not isinstance(self.calibration, dict | None):
            raise must_be("calibration", "the mapping that calibration fills in, or None", self.calibration, BY_HAND)

    def adapts(self, experts: Sequence[int]) -> bool:
        """Whether a layer in which these experts are selected gets an adapter."""
        return bool(experts)

    def selection_options(self) -> dict[str, Any]:
        """The arguments of `select_experts`."""
        return {**{name: getattr(self, name) for name in _OPTIONS}, "seed": self.calib_seed}

    @property
    def calibrates(self) -> bool:
        """Whether there are data to calibrate on, and no mask yet."""
        return self.selected_experts is None and vars(self)["calib_dataset"] is not None

    # The data set, the tokenizer and the function stay with the object, are shared by its copies, and go no further.

    def __copy__(self) -> Any:
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
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


def checked_mask(mask: Any, may_be_empty: bool = False) -> dict[str, list[int]] | None:
    """A mask as sorted lists of ids.

    Args:
        may_be_empty: every list of ids may be.

    Raises:
        SieveError: not a mapping from paths to non-negative, unrepeated whole numbers.
    """
    if mask is None:
        return None
    example = "Pass a mapping such as {'model.layers.0.mlp.experts': [3, 17]}, or calib_dataset to have it filled."
    if not isinstance(mask, Mapping):
        raise must_be("selected_experts", "a mapping from experts-module paths to expert ids", mask, example)
    checked = {}
    for path, ids in mask.items():
        if not isinstance(path, str):
            raise SieveError(
                f"selected_experts has the key {shown(path)}, not the path of an experts module. {example}"
            )
        if isinstance(ids, str | Mapping) or not isinstance(ids, Iterable):
            raise must_be(f"selected_experts[{path!r}]", "a list of expert ids", ids)
        checked[path] = _checked_ids(path, list(ids))
    if not any(checked.values()) and not (may_be_empty and checked):
        raise SieveError(f"selected_experts does not name a single expert. {example}")
    return checked


def _checked_ids(path: str, ids: list[Any]) -> list[int]:
    for value in ids:
        # numpy and torch integers have __index__ too; bool does as well, but is not an id.
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise SieveError(
                f"selected_experts[{path!r}] must hold whole numbers, the ids of experts, got {shown(value)}."
            )
    numbers = sorted(value.__index__() for value in ids)
    if numbers and numbers[0] < 0:
        raise SieveError(f"selected_experts[{path!r}] holds the negative id {numbers[0]}.")
    repeated = sorted({n for n in numbers if numbers.count(n) > 1})
    if repeated:
        raise SieveError(f"selected_experts[{path!r}] holds {repeated} more than once.")
    return numbers


def _checked_shapes(value: Any) -> dict[str, list[int]] | None:
    if value is None:
        return None
    fine = isinstance(value, Mapping) and all(
        isinstance(sizes, list | tuple) and len(sizes) == 3 and all(type(n) is int and n > 0 for n in sizes)
        for sizes in value.values()
    )
    if not fine:
        kind = "experts-module path -> [num_experts, hidden_size, intermediate_size]"
        raise must_be("expert_shapes", kind, value, BY_HAND)
    return {path: list(sizes) for path, sizes in value.items()}
