"""Fill in a configuration's mask: profile, select, and note where it came from."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from ...errors import SieveError
from ...moe.topology import MoELayer
from ...routing.data.batches import CalibrationData, calibration_batches
from ...routing.distributed import gathered, on_every_rank, rank_and_world, summed
from ...routing.model_inputs import find_tokenizer
from ...routing.profiling import check_reached, profile_batches, profile_until_stable
from ...routing.selection import select_experts
from ...routing.until_stable import StabilityRule
from .config import RUNTIME_ONLY
from .provenance import provenance


def calibrate(config: Any, model: nn.Module, layers: list[MoELayer]) -> None:
    """Set `selected_experts` and `calibration` of `config`.

    Under several processes each profiles its share of the samples and the counts are added up, so that all of them
    come to the same mask, whatever each one's data.

    Raises:
        SieveError: there is no data, it cannot be read, or it reaches no layer; `config` is unchanged then.
    """
    options = config.selection_options()
    calibration = on_every_rank(lambda: _read(config, model))
    found: dict[str, Any] = {}
    if config.calib_stability is None:
        profile = on_every_rank(lambda: profile_batches(model, layers, calibration))
    else:
        rule = StabilityRule(config.calib_stability, options, config.calib_seed)
        stopped = profile_until_stable(model, layers, calibration, rule, together=True)
        profile, calibration = stopped.profile, stopped.data
        found = {"stability": stopped.stability, "stability_threshold": config.calib_stability}
    total = summed(profile)
    check_reached(total)
    selection = select_experts(total, **options)
    mask = config.selected_experts = {path: ids for path, ids in selection.to_dict().items() if config.adapts(ids)}
    if found:
        found["stability"] = {path: round(found["stability"][path], 4) for path in mask}
    config.calibration = provenance(
        selection,
        total,
        config,
        dataset=", ".join(dict.fromkeys(gathered(calibration.name))),
        fingerprint=_common_fingerprint(gathered(calibration.fingerprint)),
        samples=sum(gathered(calibration.num_samples)),
        tokens=total.num_tokens,
        max_length=config.calib_max_length,
        seed=config.calib_seed,
        **({} if config.top_p is None else {"top_p": config.top_p}),
        **found,
    )


def _common_fingerprint(fingerprints: list[str]) -> str:
    """The processes' fingerprint; where each had data of its own, one over all of theirs."""
    if len(set(fingerprints)) == 1:
        return fingerprints[0]
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()


def _read(config: Any, model: nn.Module) -> CalibrationData:
    """This process's share of the calibration data."""
    data, tokenizer, formatting_func = (vars(config)[name] for name in RUNTIME_ONLY)
    if data is None:
        raise SieveError(
            "The configuration has neither calib_dataset nor selected_experts, which say which experts to adapt. Pass "
            "SieveLoraConfig(calib_dataset=...), or the mask of an earlier calibration."
        )
    _refuse_sharded_model(model)
    return calibration_batches(
        data,
        tokenizer=find_tokenizer(model, tokenizer),
        formatting_func=formatting_func,
        split=config.calib_split,
        max_samples=config.calib_samples,
        max_length=config.calib_max_length,
        batch_size=config.calib_batch_size,
        seed=config.calib_seed,
        shard=rank_and_world(),
        image_dtype=getattr(model, "dtype", None),
    )


def _refuse_sharded_model(model: nn.Module) -> None:
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise SieveError(
            "The model's parameters are sharded by DeepSpeed ZeRO-3, where nothing is profiled. Calibrate once without "
            "it (select_experts(profile_routing(...)).to_dict()), and pass the result as selected_experts."
        )
