"""Saved weights against the mask they are loaded under, so that none lands on another expert in silence."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ...errors import SieveError
from ...files import finish_interrupted_save
from .layer import SieveExpertLayer

SLOTS_KEY = ".lora_experts.slots"


def read_config_file(path: str) -> dict[str, Any] | None:
    """What precedes PEFT's reading of an `adapter_config.json`: finish an interrupted save, then look at the file.

    Returns:
        The content if it is a sieve adapter's, None if it is some other method's (PEFT goes on alone then).

    Raises:
        SieveError: it is a sieve adapter's, but cut short or changed, or the weights beside it do not belong to it.
    """
    folder = Path(path).parent
    finish_interrupted_save(folder)
    text = Path(path).read_text(errors="replace")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if "SIEVE_LORA" in text or "selected_experts" in text or _has_slots(folder):
            raise SieveError(
                f"{path} is not JSON ({error}), expected the whole file that save_pretrained wrote: save or download "
                "the adapter again"
            ) from error
        return None
    if not isinstance(content, dict):
        return None
    if content.get("peft_type") != "SIEVE_LORA":
        if "selected_experts" not in content:
            return None
        raise SieveError(
            f"{path} has peft_type {content.get('peft_type')!r}, expected 'SIEVE_LORA', since it holds "
            "selected_experts: save or download the adapter again"
        )
    _check_weights_file(content, folder)
    return content


def _has_slots(folder: Path) -> bool:
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
            return any(key.endswith(SLOTS_KEY) for key in file.keys())  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError):
        return False


def _check_weights_file(content: dict[str, Any], folder: Path) -> None:
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists():
        # The Hub's client brings one file at a time.
        return
    try:
        with safe_open(weights, "pt") as file:
            saved = {k: file.get_tensor(k) for k in file.keys() if k.endswith(SLOTS_KEY)}  # noqa: SIM118
    except SafetensorError as error:
        raise broken_weights(weights, error) from error
    mask = content.get("selected_experts")
    if not isinstance(mask, Mapping):
        return
    found = {key.removesuffix(SLOTS_KEY).removeprefix("base_model.model."): _ids(slots) for key, slots in saved.items()}
    expected = {path: ids for path, ids in mask.items() if ids}
    for path in {**expected, **found}:
        if found.get(path) != expected.get(path):
            raise SieveError(
                f"{weights} holds weights of experts {found.get(path, [])} for {path}, and {CONFIG_NAME} beside it "
                f"selects {expected.get(path, [])}, expected the same: take both files from one save"
            )


def broken_weights(path: str | os.PathLike[str], error: Exception) -> SieveError:
    """The error for a weights file that cannot be read."""
    return SieveError(
        f"{path} cannot be read as safetensors ({error}), expected the whole file that save_pretrained wrote: save or "
        "download the adapter again"
    )


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that belong to other experts, other sizes or another set of modules than the adapter's.

    Args:
        model: has the adapter injected already.
        state_dict: checkpoint keys, without adapter names.

    Raises:
        SieveError: and nothing was loaded.
    """
    given = {key.removeprefix("base_model.model."): value for key, value in state_dict.items()}
    for path, layer in sieve_layers(model):
        if adapter_name not in layer.plans:
            if _belongs(given, path):
                raise SieveError(
                    f"the weights hold experts of {path}, and adapter '{adapter_name}' selects none there, expected "
                    "the same mask: load them under the configuration they were saved with"
                )
            continue
        slots = given.get(path + SLOTS_KEY)
        if slots is None:
            raise SieveError(
                f"the weights hold no {path}{SLOTS_KEY}, expected it beside the factors, since it says whose they are: "
                "save or download the adapter again"
            )
        expected = list(layer.plans[adapter_name].experts)
        if slots.numel() != layer.shape.num_experts or _ids(slots) != expected:
            raise SieveError(
                f"the weights belong to experts {_ids(slots)} of {slots.numel()} in {path}, and adapter "
                f"'{adapter_name}' selects {expected} of {layer.shape.num_experts}, expected the same mask: resume "
                "with the configuration of the checkpoint (its adapter_config.json), or start a new run"
            )
        _check_factors(given, path, layer, adapter_name)


def _check_factors(given: Mapping[str, torch.Tensor], path: str, layer: SieveExpertLayer, adapter_name: str) -> None:
    for name in layer.adapter_layer_names:
        modules = getattr(layer, name)
        if adapter_name not in modules:
            continue
        key, shape = f"{path}.{name}.weight", tuple(modules[adapter_name].weight.shape)
        found = tuple(given[key].shape) if key in given else None
        if found != shape:
            raise SieveError(
                f"the weights hold {key} with shape {found}, expected {shape}: load them under the configuration and "
                "the base model they were saved with"
            )


def sieve_layers(model: nn.Module) -> list[tuple[str, SieveExpertLayer]]:
    """(path in the base model, layer) of every expert adapter layer in `model`."""
    return [(module.path, module) for module in model.modules() if isinstance(module, SieveExpertLayer)]


def _belongs(given: Mapping[str, torch.Tensor], path: str) -> bool:
    return path + SLOTS_KEY in given


def _ids(slots: torch.Tensor) -> list[int]:
    """Expert ids by slot."""
    order = slots[slots >= 0].argsort()
    return (slots >= 0).nonzero().squeeze(-1)[order].tolist()
