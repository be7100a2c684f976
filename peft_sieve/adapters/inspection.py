"""What a saved adapter holds, from its configuration and the header of its weights; no model is loaded."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..checks import must_be
from ..errors import SieveError
from ..hf.adapter_files import broken_weights
from ..moe.families.family import PROJECTIONS
from ..tuners.common.experts.factors import BOOKKEEPING_KEY, OUTER_FACTORS
from ..tuners.common.loading import in_base_model
from ..tuners.epng.config import EpngConfig
from ..tuners.sieve.config import SieveLoraConfig
from .reading import sieve_config
from .summary import AdapterSummary, LayerSummary, ModuleSummary

_EXPERTS_KEY = re.compile(r"^(?P<path>.+)\.(?P<factor>lora_(?:gate_up|down)_(?:[AB]|delta))\.weight$")
_LORA_KEY = re.compile(r"^(?P<path>.+)\.lora_(embedding_)?(?P<side>[AB])(\.weight)?$")


def inspect_adapter(adapter: str | os.PathLike[str]) -> AdapterSummary:
    """Read what a saved sieve adapter holds: mask, coverage, ranks, sizes, provenance.

    Args:
        adapter: path or Hub id. Of the weights only the header is read.

    Raises:
        SieveError: there is no sieve adapter, or its weights cannot be read or do not belong to its mask.
    """
    if not isinstance(adapter, str | os.PathLike):
        raise must_be("adapter", "the path or Hub id of a saved adapter", adapter)
    adapter = os.fspath(adapter)
    config = sieve_config(adapter)
    weights = _weights_file(adapter)
    try:
        with safe_open(weights, "pt") as file:
            keys = [key for key in file.keys() if BOOKKEEPING_KEY not in key]  # noqa: SIM118 (not a mapping)
            shapes = {in_base_model(key): tuple(file.get_slice(key).get_shape()) for key in keys}
            dtypes = tuple(sorted({file.get_slice(key).get_dtype() for key in keys}))
    except SafetensorError as error:
        raise broken_weights(weights, error) from error
    layers = _layers(config, shapes)
    modules = _modules(shapes)
    total = sum(map(math.prod, shapes.values()))
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
        cold_experts=config.cold_experts,
        share_outer=config.share_outer,
    )


def _weights_file(adapter: str) -> Path:
    path = Path(adapter, SAFETENSORS_WEIGHTS_NAME)
    if path.is_file():
        return path
    if not os.path.isdir(adapter):
        with suppress(HfHubHTTPError, LocalEntryNotFoundError):
            return Path(hf_hub_download(adapter, SAFETENSORS_WEIGHTS_NAME))
    raise SieveError(
        f"{adapter!r} does not have a readable {SAFETENSORS_WEIGHTS_NAME} beside adapter_config.json. Save or download "
        "the adapter again."
    )


def _layers(config: SieveLoraConfig, shapes: dict[str, tuple[int, ...]]) -> tuple[LayerSummary, ...]:
    packed: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if match := _EXPERTS_KEY.match(key):
            packed.setdefault(match["path"], {})[match["factor"]] = shape
    masks = {path: ids for path, ids in (config.selected_experts or {}).items() if config.adapts(ids)}
    return tuple(_layer(config, path, ids, packed.get(path, {})) for path, ids in masks.items())


def _layer(config: SieveLoraConfig, path: str, ids: list[int], factors: dict[str, tuple[int, ...]]) -> LayerSummary:
    num_experts = (config.expert_shapes or {}).get(path, [None])[0]
    # Without ranks that differ, each expert has one block: all of its rank.
    blocks, slots = [1], len(ids) + (config.cold_experts == "shared" and len(ids) != num_experts)
    if isinstance(config, EpngConfig):
        blocks = config.blocks_in(path)
        slots = sum(blocks) // config.first_blocks
    block_ranks = {
        factor.removeprefix("lora_").rpartition("_")[0]: shape[1] if len(shape) == 3 else shape[0] // sum(blocks)
        for factor, shape in factors.items()
    }
    return LayerSummary(
        path=path,
        experts=tuple(ids),
        num_experts=num_experts,
        coverage=((config.calibration or {}).get("coverage") or {}).get(path),
        ranks={group: max(blocks) * rank for group, rank in block_ranks.items()},
        num_parameters=sum(map(math.prod, factors.values())),
        lowest_ranks={group: min(blocks) * rank for group, rank in block_ranks.items()},
        all_experts_parameters=None if num_experts is None else _of_all(config, factors, slots, num_experts),
    )


def _of_all(config: SieveLoraConfig, factors: dict[str, tuple[int, ...]], slots: int, num_experts: int) -> int:
    """Numbers in the factors if all experts had some of their own."""
    shared = OUTER_FACTORS if config.share_outer else ()
    sizes = {factor: math.prod(shape) for factor, shape in factors.items()}
    return sum(size if factor in shared else size // slots * num_experts for factor, size in sizes.items())


def _modules(shapes: dict[str, tuple[int, ...]]) -> tuple[ModuleSummary, ...]:
    paths: dict[str, set[str]] = {}
    ranks: dict[str, set[int]] = {}
    counts: dict[str, int] = {}
    for key, shape in shapes.items():
        match = _LORA_KEY.match(key)
        if match is None or _EXPERTS_KEY.match(key):
            continue
        name = re.sub(r"^.*\.\d+\.", "", match["path"])
        paths.setdefault(name, set()).add(match["path"])
        counts[name] = counts.get(name, 0) + math.prod(shape)
        if match["side"] == "A":
            ranks.setdefault(name, set()).add(shape[0])
    return tuple(
        ModuleSummary(name, len(paths[name]), tuple(sorted(ranks.get(name, ()))), counts[name]) for name in paths
    )
