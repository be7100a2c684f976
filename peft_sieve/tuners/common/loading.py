"""Saved weights against the adapter they are loaded into, so that none lands where it was not trained.

One check for all methods: the tensors of an adapter are those that its layers hold under its name. What a tensor means,
such as which experts have an adapter, a layer checks itself in `check_saved`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...errors import SieveError
from ...hf.adapter_files import wrong_type
from ...moe.wrappers import plain_name
from .bookkeeping import Bookkeeping, settled

_PREFIX = "base_model.model."
_AGAIN = "Save or download it again."
# In the keys of what is trained whole.
_WHOLE = re.compile(r"\.(modules_to_save|trainable_tokens_delta)\.")
_ADVICE = "Load weights under the configuration and the base model that they were saved with."


def in_base_model(key: str) -> str:
    """The key of an adapter's tensor without what wrappers put before and into it."""
    return plain_name(key.removeprefix(_PREFIX))


def in_peft_model(key: str) -> str:
    """The key of a tensor of the base model in a `PeftModel`, and in the files of an adapter."""
    return _PREFIX + key


def by_own_keys(
    model: nn.Module,
    adapter_name: str,
    given: Mapping[str, torch.Tensor],
    without_name: Callable[[str, str], str],
) -> dict[str, torch.Tensor]:
    """Weights by the keys of the base model that an adapter's tensors are saved under, its integers as it has them.

    As for PEFT's LoRA, the keys may lack the prefix of a `PeftModel`, and may have the adapter's name in them.

    Args:
        model: has the adapter injected already.
        without_name: (key of a model, adapter name) -> that of a file.

    Raises:
        SieveError: none of the weights is of the adapter, or one is there twice.
    """
    layers = dict(adapter_layers(model, adapter_name))
    own = {path: {f"{path}.{name}" for name, _ in tensors_in(layer, adapter_name)} for path, layer in layers.items()}
    known = {key for keys in own.values() for key in keys}
    found: dict[str, torch.Tensor] = {}
    for key, value in given.items():
        bare = in_base_model(key)
        nameless = without_name(bare, adapter_name)
        bare = nameless if nameless in known else bare
        if bare in found:
            raise SieveError(f"The checkpoint has {bare} twice, with and without a prefix. {_ADVICE}")
        found[bare] = value
    if known and not known & found.keys():
        first = f" It has {next(iter(given))}, and the adapter {in_peft_model(min(known))}." if given else ""
        raise SieveError(f"The checkpoint has no tensor of adapter '{adapter_name}'.{first} {_ADVICE}")
    for path, layer in layers.items():
        saved = settled(saved_in(found, path, own[path]), integers_in(layer, adapter_name))
        found.update({f"{path}.{name}": value for name, value in saved.items()})
    return found


def adapter_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """(path in the base model, layer) of the layers that hold an adapter."""
    for path, layer in _outside_wrappers(model):
        if isinstance(layer, BaseTunerLayer) and any(True for _ in tensors_in(layer, adapter_name)):
            yield in_base_model(path), layer


def layers_for(model: nn.Module, adapter_name: str, given: Collection[str]) -> dict[str, Any]:
    """As `adapter_layers`, for weights of a file: a layer that is in several places has the first, which files keep,
    and those that the weights name.

    Args:
        given: the keys of the weights in the base model.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for path, layer in adapter_layers(model, adapter_name):
        if id(layer) not in seen or any(f"{path}.{name}" in given for name, _ in tensors_in(layer, adapter_name)):
            found[path] = layer
        seen.add(id(layer))
    return found


def _outside_wrappers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, without what PEFT trains whole: that has keys of its own, which PEFT compares."""
    yield path, module
    for name, child in module.named_children():
        if not isinstance(child, AuxiliaryTrainingWrapper):
            yield from _outside_wrappers(child, f"{path}.{name}" if path else name)


def tensors_in(layer: Any, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(attribute and key, tensor) of what a layer saves of an adapter, its factors first."""
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        held = getattr(layer, name, None)
        if not isinstance(held, nn.Module) or adapter_name not in held:  # type: ignore[operator]
            continue
        part = held[adapter_name]  # type: ignore[index]
        if isinstance(part, nn.Module):
            for key, value in (*part.named_parameters(), *part.named_buffers()):
                yield f"{name}.{key}", value
        elif isinstance(part, torch.Tensor):  # embeddings have bare parameters
            yield name, part


def integers_in(layer: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    """Attribute and key -> what an adapter's bookkeeping in a layer should hold."""
    return {
        f"{name}.{key}": value
        for name, part in _bookkeeping_in(layer, adapter_name)
        for key, value in part.integers().items()
    }


def _bookkeeping_in(layer: Any, adapter_name: str) -> Iterator[tuple[str, Bookkeeping]]:
    for name in layer.other_param_names:
        held = getattr(layer, name, None)
        part = held[adapter_name] if isinstance(held, nn.ModuleDict) and adapter_name in held else None
        if isinstance(part, Bookkeeping):
            yield name, part


def check_state_dict(model: nn.Module, adapter_name: str, given: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Refuse weights that belong to other sizes, another set of layers, or other experts than the adapter's.

    Args:
        model: has the adapter injected already.
        given: checkpoint keys of the base model, without adapter names.
        prefix: of the method, as PEFT has it.

    Raises:
        SieveError: and nothing was loaded.
    """
    layers = layers_for(model, adapter_name, given)
    expected: set[str] = set()
    for path, layer in layers.items():
        own = {f"{path}.{name}": value for name, value in tensors_in(layer, adapter_name)}
        expected |= own.keys()
        if hasattr(layer, "check_saved"):
            layer.check_saved(adapter_name, saved_in(given, path, own))
        for key, value in own.items():
            _check_tensor(key, value, given, layer, adapter_name)
    refuse_foreign(given, expected, adapter_name, prefix)


def check_bookkeeping(model: nn.Module, adapter_name: str, given: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors in the place of whole numbers that cannot be read as those, before anything reads them.

    Args:
        model, adapter_name, given: as for `check_state_dict`.

    Raises:
        SieveError: one has another number of dimensions, or a type that does not count.
    """
    for path, layer in adapter_layers(model, adapter_name):
        for name, own in tensors_in(layer, adapter_name):
            saved = given.get(f"{path}.{name}")
            if saved is None or own.is_floating_point():
                continue
            if saved.dim() != own.dim() or saved.is_complex() or (saved.is_floating_point() and saved.itemsize < 2):
                raise SieveError(
                    f"The checkpoint has {path}.{name} of shape {tuple(saved.shape)} as {saved.dtype}, and adapter "
                    f"'{adapter_name}' has it of shape {tuple(own.shape)} as {own.dtype}. {_AGAIN}"
                )


def check_biases(given: Mapping[str, torch.Tensor], expected: Iterable[str]) -> None:
    """Refuse weights without a bias that was trained.

    Args:
        given: by keys of the base model.
        expected: keys of biases that a save would hold.

    Raises:
        SieveError: one is not there.
    """
    missing = [key for key in expected if in_base_model(key) not in given]
    if missing:
        raise SieveError(f"The checkpoint has no {missing[0]}, a bias that the adapter trains. {_ADVICE}")


def saved_in(given: Mapping[str, torch.Tensor], path: str, own: Iterable[str]) -> dict[str, torch.Tensor]:
    """Of saved weights those of one layer, by attribute and key.

    Args:
        path: of the layer in the base model.
        own: the keys that the layer has.
    """
    return {key.removeprefix(f"{path}."): given[key] for key in own if key in given}


def refuse_foreign(given: Mapping[str, torch.Tensor], expected: Iterable[str], adapter_name: str, prefix: str) -> None:
    """Refuse weights with tensors of an adapter's kind that the adapter does not have.

    Raises:
        SieveError: there are some.
    """
    known = set(expected)
    foreign = [key for key in given if _is_adapter_key(key, prefix) and key not in known]
    if foreign:
        raise SieveError(
            f"The checkpoint has {len(foreign)} unexpected tensors for adapter '{adapter_name}', e.g. {foreign[0]}. "
            f"{_ADVICE}"
        )


def check_loaded(
    model: nn.Module, adapter_name: str, missing: Iterable[str], unexpected: Iterable[str], prefix: str
) -> None:
    """Refuse what was loaded without asking; see `MethodTuner.check_loaded`."""
    missing = _loaded_nowhere(model, set(missing))
    whole = [key for key in missing if _WHOLE.search(key)]
    keys = [*whole, *(key for key in (*missing, *unexpected) if _is_adapter_key(key, prefix))]
    if keys:
        raise SieveError(
            f"The checkpoint and adapter '{adapter_name}' do not have {keys[0]} in common ({len(keys)} such tensors in "
            f"all). {_ADVICE}"
        )
    for _, layer in adapter_layers(model, adapter_name):
        if hasattr(layer, "check_saved"):
            held = dict(tensors_in(layer, adapter_name))
            layer.check_saved(adapter_name, settled(held, integers_in(layer, adapter_name)))
        for _, part in _bookkeeping_in(layer, adapter_name):
            part.restore()


def check_whole(model: nn.Module, adapter_name: str, saved: Collection[str]) -> None:
    """Refuse a save that would leave tensors out; see `MethodTuner.check_whole`."""
    kept = {in_base_model(key) for key in saved}
    layers = layers_for(model, adapter_name, kept)
    expected = {f"{path}.{name}" for path, layer in layers.items() for name, _ in tensors_in(layer, adapter_name)}
    missing = sorted(expected - kept)
    if missing:
        raise SieveError(
            f"The state dict lacks {len(missing)} of the {len(expected)} tensors of adapter '{adapter_name}', e.g. "
            f"{in_peft_model(missing[0])}, so nothing was saved. Gather all of it, for example with "
            "accelerator.get_state_dict(model), and pass it as state_dict."
        )


def _loaded_nowhere(model: nn.Module, missing: Collection[str]) -> list[str]:
    """Of missing keys those whose tensor was not loaded by another name either, as that of a layer in two places is."""
    if not missing:
        return []
    tensors = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    return sorted(key for key in missing if id(tensors.get(key)) not in loaded)


def _is_adapter_key(key: str, prefix: str) -> bool:
    return f".{prefix}" in key or ".lora_" in key


def _check_tensor(
    key: str, own: torch.Tensor, given: Mapping[str, torch.Tensor], layer: Any, adapter_name: str
) -> None:
    if key not in given:
        raise SieveError(f"The checkpoint has no {key} for adapter '{adapter_name}'. {_ADVICE}")
    saved = given[key]
    if not own.is_floating_point():
        return
    # No shape where a layer's tensors are spread over processes.
    spread = getattr(layer.get_base_layer(), "_hf_tp_plan", None) is not None if hasattr(layer, "base_layer") else False
    shape = tuple(getattr(own, "ds_shape", own.shape))
    if not spread and tuple(saved.shape) != shape:
        raise SieveError(
            f"The checkpoint has {key} of shape {tuple(saved.shape)}, and adapter '{adapter_name}' has it of shape "
            f"{shape}. {_ADVICE}"
        )
    if not saved.is_floating_point():
        raise wrong_type(key, str(saved.dtype))
