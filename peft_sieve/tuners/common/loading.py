"""Saved weights against the mask they are loaded under, so that none lands on another expert in silence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ...errors import SieveError
from ...files import finish_interrupted_save
from ...hf.patches import PEFT_TYPES, SIEVE_TYPES
from .experts.layer import SieveExpertLayer

BOOKKEEPING_KEY = ".lora_experts."  # in the keys of tensors that are no factors, but say whose those are
SLOTS_KEY = f"{BOOKKEEPING_KEY}slots"
_OURS = (SLOTS_KEY, ".perft_", ".lora_usage.")  # in the keys of each method of this package
# Methods of this package that look after their experts themselves.
OTHER_TYPES = tuple(name for name in PEFT_TYPES if name not in SIEVE_TYPES)
_WEIGHTS_NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
_weights_follow: ContextVar[bool] = ContextVar("_weights_follow", default=False)


@contextmanager
def with_weights_to_follow() -> Iterator[None]:
    """Adapters injected in the block get saved values before anybody uses them, all of them or an error."""
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


def weights_follow() -> bool:
    """Whether drawing initial values would be in vain."""
    return _weights_follow.get()


def read_config_file(path: str) -> dict[str, Any] | None:
    """What precedes PEFT's reading of an `adapter_config.json`: finish an interrupted save, then look at the file.

    Returns:
        The content if it is a sieve adapter's, None if it is some other method's (PEFT goes on alone then).

    Raises:
        SieveError: it is a sieve adapter's, but cut short or changed, or the weights beside it do not belong to it.
    """
    folder = Path(path).parent
    finish_interrupted_saves(folder)
    text = Path(path).read_text(errors="replace")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if any(f'"{name}' in text for name in PEFT_TYPES) or "selected_experts" in text or _holds(folder, _OURS):
            raise SieveError(
                f"{path} is not JSON ({error}), expected the whole file that save_pretrained wrote: save or download "
                "the adapter again"
            ) from error
        return None
    if not isinstance(content, dict):
        if _holds(folder, _OURS):
            raise SieveError(
                f"{path} holds no mapping, expected the settings that save_pretrained wrote: save or download the "
                "adapter again"
            )
        return None
    if content.get("peft_type") in OTHER_TYPES:
        _tensors_in(folder)
        return None
    if content.get("peft_type") not in SIEVE_TYPES:
        if "selected_experts" not in content and not _holds(folder, (SLOTS_KEY,)):
            return None
        raise SieveError(
            f"{path} has peft_type {content.get('peft_type')!r}, expected {' or '.join(map(repr, SIEVE_TYPES))}, since "
            "it belongs to selected experts: save or download the adapter again"
        )
    _check_weights_file(content, folder)
    return content


def finish_interrupted_saves(folder: str | os.PathLike[str]) -> None:
    """Finish a save of the adapter in `folder`, or of all adapters of a model, which are saved as one."""
    # An adapter with a name is saved into a folder of the model's, so a crash leaves its files one level up.
    for place in (Path(folder).parent, Path(folder)):
        finish_interrupted_save(place)


def _holds(folder: Path, parts: Iterable[str]) -> bool:
    """Whether the weights there have one of these in their keys."""
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
            return any(part in key for key in file.keys() for part in parts)  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError):
        return False


def _tensors_in(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """What says whose the weights beside a configuration are, and the types of the others; by name.

    None if the file is not there yet: the Hub's client brings one at a time.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists():
        if (folder / WEIGHTS_NAME).exists():
            raise SieveError(
                f"{folder} holds {WEIGHTS_NAME}, a pickled file, expected {SAFETENSORS_WEIGHTS_NAME}: save the adapter "
                "with save_pretrained of this package, or download it again"
            )
        return None
    try:
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
            slots = {name: file.get_tensor(name) for name in names if name.endswith(SLOTS_KEY)}
            return slots, {name: file.get_slice(name).get_dtype() for name in names if BOOKKEEPING_KEY not in name}
    except SafetensorError as error:
        raise broken_weights(weights, error) from error


def _check_weights_file(content: dict[str, Any], folder: Path) -> None:
    found_there = _tensors_in(folder)
    if found_there is None:
        return
    slots, types = found_there
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    for name, dtype in types.items():
        if ".lora_" in name and not dtype.startswith(("F", "BF")):
            raise _wrong_type(name, dtype)
    mask = content.get("selected_experts")
    if not isinstance(mask, Mapping):
        return
    found = {in_base_model(name.removesuffix(SLOTS_KEY)): _ids(value) for name, value in slots.items()}
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
    given = {in_base_model(key): value for key, value in state_dict.items()}
    for path, layer in sieve_layers(model):
        if adapter_name in layer.plans:
            _check_slots(given.get(path + SLOTS_KEY), path, layer, adapter_name)
            _check_kept(given, path, layer, adapter_name)
            layer.slots_module(adapter_name).check(saved_bookkeeping(given, path), adapter_name, path)
        elif path + SLOTS_KEY in given:
            raise SieveError(
                f"the weights hold experts of {path}, and adapter '{adapter_name}' selects none there, expected the "
                "same mask: load them under the configuration they were saved with"
            )
    expected = dict(_adapter_tensors(model, adapter_name))
    for key, shape in expected.items():
        found = tuple(given[key].shape) if key in given else None
        if found is None or shape not in (None, found):
            raise SieveError(
                f"the weights hold {key} with shape {found}, expected {shape}: load them under the configuration and "
                "the base model they were saved with"
            )
        if not given[key].is_floating_point():
            raise _wrong_type(key, str(given[key].dtype))
    foreign = [key for key in given if ".lora_" in key and key not in expected and BOOKKEEPING_KEY not in key]
    if foreign:
        raise SieveError(
            f"the weights hold {foreign[0]}, which adapter '{adapter_name}' has not ({len(foreign)} in all), expected "
            "its own only: load them under the configuration they were saved with"
        )


def check_hotswap(model: nn.Module, adapter_name: str, config: Any, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse to put weights in the place of an adapter's when they have other experts, sizes or modules.

    Args:
        config: of the weights.
        state_dict: the weights, keys with adapter names.

    Raises:
        SieveError: and nothing was swapped.
    """
    configs: Any = model.peft_config
    held = configs[adapter_name]
    if any(c.expert_tuning != "lora" or c.hellori_density is not None for c in (config, held)):
        raise SieveError(
            "one of the adapters to swap has expert_tuning='full' or a hellori_density, expected low-rank factors that "
            "are trained whole, since only those are swapped: use load_adapter and set_adapter instead"
        )
    if config.rank_pattern or config.alpha_pattern:
        raise SieveError(
            "the adapter to swap in has a rank_pattern or an alpha_pattern, expected one rank and one alpha, since "
            "hot-swapping sets one scaling everywhere: use load_adapter and set_adapter instead"
        )
    inserted = re.compile(rf"(\.lora_\w+)\.{re.escape(adapter_name)}(?=\.|$)")
    given = {inserted.sub(r"\1", key): value for key, value in state_dict.items()}
    try:
        check_state_dict(model, adapter_name, given)
    except SieveError as error:
        raise SieveError(
            f"the weights to swap in have other experts, ranks or modules than adapter '{adapter_name}', expected the "
            "same: use load_adapter and set_adapter instead"
        ) from error


def _check_slots(slots: torch.Tensor | None, path: str, layer: SieveExpertLayer, adapter_name: str) -> None:
    if slots is None:
        raise SieveError(
            f"the weights hold no {path}{SLOTS_KEY}, expected it beside the factors, since it says whose they are: "
            "save or download the adapter again"
        )
    expected = list(layer.plans[adapter_name].experts)
    if slots.numel() != layer.shape.num_experts or _ids(slots) != expected:
        raise SieveError(
            f"the weights belong to experts {_ids(slots)} of {slots.numel()} in {path}, and adapter "
            f"'{adapter_name}' selects {expected} of {layer.shape.num_experts}, expected the same mask: resume with "
            "the configuration of the checkpoint (its adapter_config.json), or start a new run"
        )


def _check_kept(given: Mapping[str, torch.Tensor], path: str, layer: SieveExpertLayer, adapter_name: str) -> None:
    """What the adapter does not use of a factor must be zero in the weights (HELLoRI)."""
    for name in layer.adapter_layer_names:
        held, key = getattr(layer, name), f"{path}.{name}.weight"
        kept = held[adapter_name].kept if adapter_name in held else None
        if kept is None or key not in given or given[key].shape != kept.shape:
            continue
        if bool(given[key].cpu()[~kept.cpu()].any()):
            raise SieveError(
                f"the weights hold values in {key} outside the share that hellori_density and hellori_seed of adapter "
                f"'{adapter_name}' leave, expected zeros there: load them under the configuration they were saved with"
            )


def saved_bookkeeping(state_dict: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """What saved weights say of one layer's experts, by the names that the layer has for it.

    Args:
        state_dict: keys of the base model.
        path: of the layer.
    """
    prefix = path + BOOKKEEPING_KEY
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _adapter_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """(checkpoint key, shape) of an adapter's factors; no shape where a layer's are spread over processes."""
    for path, layer in model.named_modules():
        # Trained tokens and saved modules have keys of their own, which PEFT compares.
        if not isinstance(layer, LoraLayer):
            continue
        spread = getattr(layer.get_base_layer(), "_hf_tp_plan", None) is not None
        for name in layer.adapter_layer_names:
            held = getattr(layer, name)
            if adapter_name not in held:
                continue
            factor = held[adapter_name]
            parameters = factor.named_parameters() if isinstance(factor, nn.Module) else [("", factor)]
            for parameter_name, parameter in parameters:
                key = ".".join(filter(None, (path, name, parameter_name)))
                yield in_base_model(key), None if spread else tuple(getattr(parameter, "ds_shape", parameter.shape))


def unmap(model: nn.Module, adapter_name: str) -> None:
    """Give an adapter that was mapped from its file memory of its own.

    Mapped memory may be unaligned, where products round differently, and changes when the file does.
    """
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for held in (getattr(layer, name) for name in layer.adapter_layer_names):
                if adapter_name in held:
                    factor = held[adapter_name]  # a bare parameter where embeddings are adapted
                    for parameter in factor.parameters() if isinstance(factor, nn.Module) else [factor]:
                        parameter.data = parameter.data.clone()
    for _, expert_layer in sieve_layers(model):
        if adapter_name in expert_layer.plans:
            mapping = expert_layer.slots_module(adapter_name)
            for name, buffer in mapping.named_buffers():
                setattr(mapping, name, buffer.clone())


def check_loaded(model: nn.Module, adapter_name: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse what transformers' `load_adapter`, which assigns tensors without asking, has loaded."""
    keys = [key for key in (*missing, *unexpected) if ".lora_" in key]
    if keys:
        raise SieveError(
            f"the weights and adapter '{adapter_name}' do not have {keys[0]} in common ({len(keys)} such in all), "
            "expected the same tensors: load them under the configuration they were saved with"
        )
    for _, layer in sieve_layers(model):
        if adapter_name in layer.plans:
            layer.verify_slots(adapter_name)


def explained(error: Exception, path: str | os.PathLike[str]) -> Exception:
    """The error to raise for `error`, which came up while the weights in a folder or repository were loaded."""
    if isinstance(error, SafetensorError):
        return broken_weights(path, error)
    if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, n)) for n in _WEIGHTS_NAMES):
        return SieveError(
            f"{path} holds no {SAFETENSORS_WEIGHTS_NAME}, expected it beside {CONFIG_NAME}: save or download the "
            "adapter again"
        )
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return SieveError(
            f"the weights in {path} have other shapes than the adapter (the report above lists them), expected the "
            "same: load them under the configuration and the base model they were saved with"
        )
    return error


def _wrong_type(key: str, dtype: str) -> SieveError:
    return SieveError(
        f"the weights hold {key} as {dtype}, expected a floating-point type: save or download the adapter again"
    )


def in_base_model(key: str) -> str:
    """The key of an adapter's tensor without what PEFT's wrappers put before it."""
    return key.removeprefix("base_model.model.")


def sieve_layers(model: nn.Module) -> list[tuple[str, SieveExpertLayer]]:
    """(path in the base model, layer) of every expert adapter layer in `model`."""
    return [(module.path, module) for module in model.modules() if isinstance(module, SieveExpertLayer)]


def _ids(slots: torch.Tensor) -> list[int]:
    """Expert ids by slot; none if the slots are not numbered from 0 on."""
    used = slots[slots >= 0]
    order = used.argsort()
    if slots.dim() != 1 or used[order].tolist() != list(range(used.numel())):
        return []
    return (slots >= 0).nonzero().squeeze(-1)[order].tolist()
