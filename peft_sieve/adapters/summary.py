"""What a saved adapter holds, from its configuration and the header of its weights; no model is loaded."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..errors import SieveError
from ..hf.adapter_files import broken_weights
from ..moe.families.family import PROJECTIONS
from ..table import UNKNOWN, Table
from ..tuners.common.experts.factors import BOOKKEEPING_KEY
from ..tuners.epng.config import EpngConfig
from ..tuners.sieve.config import SieveLoraConfig
from .reading import sieve_config

_PREFIX = "base_model.model."
_PACKED = re.compile(r"^(?P<path>.+)\.lora_(?P<group>gate_up|down)_(?P<side>[AB]|delta)\.weight$")
_PLAIN = re.compile(r"^(?P<path>.+)\.lora_(embedding_)?(?P<side>[AB])(\.weight)?$")


@dataclass(frozen=True)
class LayerSummary:
    """The adapted experts of one layer.

    Attributes:
        path: the experts module.
        experts: adapted ids, ascending.
        num_experts: how many there are, None if not recorded.
        coverage: share of the layer's score that they received at calibration, None if not recorded.
        ranks: "gate_up" (both together) and "down" -> rank, those that are adapted; the highest where experts differ,
            and the output width where they are fully tuned.
        num_parameters: numbers in the factors, or in the differences of full size.
        lowest_ranks: as `ranks`, the lowest.
        all_experts_parameters: numbers in the factors if all experts had some; None if their number is not recorded.
    """

    path: str
    experts: tuple[int, ...]
    num_experts: int | None
    coverage: float | None
    ranks: dict[str, int]
    num_parameters: int
    lowest_ranks: dict[str, int]
    all_experts_parameters: int | None


@dataclass(frozen=True)
class ModuleSummary:
    """Plain LoRA on modules of one name (attention, router, shared experts).

    Attributes:
        name: what follows the index of the block.
        count: blocks that have it.
        ranks: the ranks that occur.
        num_parameters: numbers in all of them.
    """

    name: str
    count: int
    ranks: tuple[int, ...]
    num_parameters: int


@dataclass(frozen=True)
class AdapterSummary:
    """What a saved sieve adapter holds.

    Attributes:
        adapter: its path or Hub id.
        base_model, revision, task_type: of the model that it was trained on.
        r, lora_alpha, use_rslora, lora_dropout, rank_pattern, alpha_pattern, expert_projections: LoRA's settings.
        layers: the adapted experts, a layer each.
        modules: the rest, by name.
        other_tensors: numbers in tensors that are no factors (`modules_to_save` and the like).
        num_parameters: numbers in all tensors.
        num_bytes: size of the weights file.
        dtypes: the types of the tensors.
        all_experts_parameters: numbers in the experts' factors if all experts of these layers had one; None if the
            number of experts is not recorded.
        calibration: where the mask came from, {} if not recorded.
        update_steps: the optimizer steps at which training moved ranks from expert to expert (EPnG).
    """

    adapter: str
    base_model: str | None
    revision: str | None
    task_type: str | None
    r: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    expert_projections: tuple[str, ...]
    layers: tuple[LayerSummary, ...]
    modules: tuple[ModuleSummary, ...]
    other_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    all_experts_parameters: int | None
    calibration: dict[str, Any]
    update_steps: tuple[int, ...] = ()

    @property
    def expert_parameters(self) -> int:
        """Numbers in the experts' factors."""
        return sum(layer.num_parameters for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {**asdict(self), "expert_parameters": self.expert_parameters}

    def to_tables(self) -> tuple[Table, ...]:
        """Facts by name; one row a layer of adapted experts; one row a kind of other modules, if there are any."""
        facts = Table(("adapter", self.adapter), list(self._facts().items()), wrapped=(1,))
        layers = [
            (
                layer.path,
                f"{len(layer.experts)} of {'?' if layer.num_experts is None else layer.num_experts}",
                UNKNOWN if layer.coverage is None else f"{layer.coverage:.1%}",
                ", ".join(f"{group} {_range(layer.lowest_ranks[group], rank)}" for group, rank in layer.ranks.items()),
                f"{layer.num_parameters:,}",
                " ".join(map(str, layer.experts)),
            )
            for layer in self.layers
        ]
        tables = [facts, Table(("layer", "experts", "coverage", "ranks", "parameters", "ids"), layers, wrapped=(5,))]
        if self.modules:
            modules = [
                (m.name, str(m.count), ", ".join(map(str, m.ranks)), f"{m.num_parameters:,}") for m in self.modules
            ]
            tables.append(Table(("module", "layers", "rank", "parameters"), modules))
        return tuple(tables)

    def _repr_html_(self) -> str:
        return "\n".join(table.to_html() for table in self.to_tables())

    def _facts(self) -> dict[str, str]:
        scaling = f"alpha {self.lora_alpha}, dropout {self.lora_dropout}" + (", rslora" if self.use_rslora else "")
        facts = {
            "base model": self.base_model or "not recorded",
            "revision": self.revision,
            "task": self.task_type,
            "LoRA": f"rank {self.r}, {scaling}",
            "ranks moved": f"at steps {', '.join(map(str, self.update_steps))}" if self.update_steps else None,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "projections": ", ".join(self.expert_projections),
            "parameters": f"{self.num_parameters:,} ({', '.join(self.dtypes)}), {self.num_bytes / 1e6:.1f} MB",
            "in experts": self._share_text(),
            "in other tensors": f"{self.other_tensors:,}" if self.other_tensors else None,
        }
        # The layers' coverage is in their table.
        facts |= {name.replace("_", " "): value for name, value in self.calibration.items() if name != "coverage"}
        if stability := self.calibration.get("stability"):
            lowest = min(stability, key=stability.get)
            facts["stability"] = f"{stability[lowest]:.2f} or more in each layer, least in {lowest}"
        if not self.calibration:
            facts["mask"] = "given by hand: no calibration recorded"
        return {name: str(value) for name, value in facts.items() if value not in (None, {}, "")}

    def _share_text(self) -> str:
        text = f"{self.expert_parameters:,}"
        if self.all_experts_parameters:
            share = self.expert_parameters / self.all_experts_parameters
            text += f" ({share:.1%} of the {self.all_experts_parameters:,} of all experts)"
        return text


def inspect_adapter(adapter: str | os.PathLike[str]) -> AdapterSummary:
    """Read what a saved sieve adapter holds: mask, coverage, ranks, sizes, provenance.

    Args:
        adapter: path or Hub id. Of the weights only the header is read.

    Raises:
        SieveError: there is no sieve adapter, or its weights cannot be read or do not belong to its mask.
    """
    if not isinstance(adapter, str | os.PathLike):
        raise SieveError(
            f"received {type(adapter).__name__} as the adapter, expected the path or Hub id of a saved one: pass that"
        )
    adapter = os.fspath(adapter)
    config = sieve_config(adapter)
    weights = _weights_file(adapter)
    try:
        with safe_open(weights, "pt") as file:
            tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {key.removeprefix(_PREFIX): tuple(t.get_shape()) for key, t in tensors.items()}
            dtypes = tuple(sorted({t.get_dtype() for key, t in tensors.items() if BOOKKEEPING_KEY not in key}))
    except SafetensorError as error:
        raise broken_weights(weights, error) from error
    shapes = {key: shape for key, shape in shapes.items() if BOOKKEEPING_KEY not in key}
    layers = _layers(config, shapes)
    modules = _modules(shapes)
    total = sum(map(_numel, shapes.values()))
    all_experts = [x.all_experts_parameters for x in layers if x.all_experts_parameters is not None]
    return AdapterSummary(
        adapter=adapter,
        base_model=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type and str(getattr(config.task_type, "value", config.task_type)),
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        lora_dropout=config.lora_dropout,
        rank_pattern=dict(config.rank_pattern or {}),
        alpha_pattern=dict(config.alpha_pattern or {}),
        expert_projections=tuple(config.expert_projections or PROJECTIONS),
        layers=layers,
        modules=modules,
        other_tensors=total - sum(x.num_parameters for x in layers) - sum(x.num_parameters for x in modules),
        num_parameters=total,
        num_bytes=weights.stat().st_size,
        dtypes=dtypes,
        all_experts_parameters=sum(all_experts) if len(all_experts) == len(layers) else None,
        calibration=config.calibration or {},
        update_steps=tuple(config.update_steps) if isinstance(config, EpngConfig) else (),
    )


def _weights_file(adapter: str) -> Path:
    if os.path.isdir(adapter):
        path = Path(adapter, SAFETENSORS_WEIGHTS_NAME)
        if path.is_file():
            return path
        raise SieveError(
            f"{adapter} holds no {SAFETENSORS_WEIGHTS_NAME}, expected it beside adapter_config.json: save or download "
            "the adapter again"
        )
    try:
        return Path(hf_hub_download(adapter, SAFETENSORS_WEIGHTS_NAME))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise SieveError(
            f"the repository {adapter!r} holds no {SAFETENSORS_WEIGHTS_NAME} that can be read, expected it beside "
            "adapter_config.json: push the adapter again"
        ) from error


def _layers(config: SieveLoraConfig, shapes: dict[str, tuple[int, ...]]) -> tuple[LayerSummary, ...]:
    packed: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for key, shape in shapes.items():
        if match := _PACKED.match(key):
            packed.setdefault(match["path"], []).append((match["group"], shape))
    masks = {path: ids for path, ids in (config.selected_experts or {}).items() if ids}
    return tuple(_layer(config, path, ids, packed.get(path, [])) for path, ids in masks.items())


def _layer(
    config: SieveLoraConfig, path: str, ids: list[int], factors: list[tuple[str, tuple[int, ...]]]
) -> LayerSummary:
    # Without ranks that differ, each expert has one block: all of its rank.
    blocks, first_experts = [1] * len(ids), len(ids)
    if isinstance(config, EpngConfig):
        blocks = config.blocks_in(path)
        first_experts = sum(blocks) // config.first_blocks
    rows = {group: shape[0] * shape[1] if len(shape) == 3 else shape[0] for group, shape in factors}
    block_ranks = {group: number // sum(blocks) for group, number in rows.items()}
    num_parameters = sum(_numel(shape) for _, shape in factors)
    num_experts = (config.expert_shapes or {}).get(path, [None])[0]
    return LayerSummary(
        path=path,
        experts=tuple(ids),
        num_experts=num_experts,
        coverage=((config.calibration or {}).get("coverage") or {}).get(path),
        ranks={group: max(blocks) * rank for group, rank in block_ranks.items()},
        num_parameters=num_parameters,
        lowest_ranks={group: min(blocks) * rank for group, rank in block_ranks.items()},
        all_experts_parameters=None if num_experts is None else num_parameters // first_experts * num_experts,
    )


def _range(lowest: int, highest: int) -> str:
    return str(highest) if lowest == highest else f"{lowest} to {highest}"


def _modules(shapes: dict[str, tuple[int, ...]]) -> tuple[ModuleSummary, ...]:
    paths: dict[str, set[str]] = {}
    ranks: dict[str, set[int]] = {}
    counts: dict[str, int] = {}
    for key, shape in shapes.items():
        match = _PLAIN.match(key)
        if match is None or _PACKED.match(key):
            continue
        name = re.sub(r"^.*\.\d+\.", "", match["path"])
        paths.setdefault(name, set()).add(match["path"])
        counts[name] = counts.get(name, 0) + _numel(shape)
        if match["side"] == "A":
            ranks.setdefault(name, set()).add(shape[0])
    return tuple(
        ModuleSummary(name, len(paths[name]), tuple(sorted(ranks.get(name, ()))), counts[name]) for name in paths
    )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
