"""An adapter opened to be read: its factors with their values, on a base model that needs none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import CONFIG_NAME, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..checks import first_line, must_be, shown
from ..errors import SieveError
from ..hf.methods import method_of, methods
from ..moe.topology import MoELayer, find_moe_layers
from ..tuners.common.experts.layer import SieveExpertLayer, expert_layers
from ..tuners.sieve.config import SieveLoraConfig
from .skeleton import Maker, maker_like, skeleton_maker
from .vocabulary import Embeddings, live_embeddings, saved_embeddings, with_vocabulary_of

# What PEFT puts before the base model's names in the keys of an adapter's tensors.
KEY_PREFIX = "base_model.model."


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter to read.

    Attributes:
        model: it on a base model; only the adapter's own tensors are sure to have values.
        name: what it is called there.
        base_name: name or path of the base model, "" if not known.
        new_skeleton: makes the base model without adapters, on the meta device.
        embeddings: weights of the base model that the adapter has values of its own for, by paths of modules.
    """

    model: PeftModel
    name: str
    base_name: str
    new_skeleton: Maker
    embeddings: Embeddings = field(default_factory=dict)

    @property
    def base(self) -> PreTrainedModel:
        """The base model, with the adapter in it."""
        base = self.model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        return base

    @property
    def config(self) -> SieveLoraConfig:
        config = self.model.peft_config[self.name]
        assert isinstance(config, SieveLoraConfig)
        return config

    def expert_layers(self) -> dict[str, SieveExpertLayer]:
        """Experts-module path -> its adapter layer, of the layers that this adapter is in."""
        return {path: layer for path, layer in expert_layers(self.base) if self.name in layer.plans}

    def other_layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """(path in the base model, layer) of PEFT's own layers that this adapter is in."""
        for path, layer in lora_layers(self.base, self.name):
            if not isinstance(layer, SieveExpertLayer):
                yield path, layer

    def moe_layers(self) -> list[MoELayer]:
        """All MoE layers of the base model."""
        return find_moe_layers(self.base)


def lora_layers(base: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """(path, layer) of the layers with factors of PEFT's own of an adapter."""
    for path, module in base.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in {**module.lora_A, **module.lora_embedding_A}:
            yield path, module


def lora_factors(layer: LoraLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a layer of PEFT's own."""
    if adapter_name in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    else:
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return a.detach(), b.detach()


def open_adapter(
    adapter: Any,
    base_model: Any = None,
    adapter_name: str | None = None,
    check: Callable[[SieveLoraConfig], None] = lambda config: None,
) -> OpenedAdapter:
    """Open an adapter of a model, or a saved one; no base weights are read.

    Args:
        adapter: a `PeftModel`, or the path or Hub id of a saved adapter.
        base_model: for a saved one: the base model itself, or its path or Hub id, of which the configuration is read;
            None takes what the adapter's configuration names.
        adapter_name: which adapter of the model; needed if it holds several.
        check: raises for a configuration that the caller has no use for.

    Raises:
        SieveError: there is no such adapter, or its base model is not found.
    """
    if isinstance(adapter, PeftModel):
        name = _name_in(adapter, adapter_name)
        make, base_name = maker_like(adapter.get_base_model())
        if isinstance(base_model, str | os.PathLike):
            base_name = os.fspath(base_model)
        opened = OpenedAdapter(adapter, name, base_name, make)
        check(opened.config)
        return replace(opened, embeddings=live_embeddings(opened.base, base_name))
    if not isinstance(adapter, str | os.PathLike):
        raise must_be("adapter", "a PeftModel, or the path or Hub id of a saved adapter", adapter)
    if adapter_name is not None:
        raise SieveError(f"adapter_name={adapter_name!r} goes with a PeftModel only. Pass the folder of that adapter.")
    config = sieve_config(os.fspath(adapter))
    check(config)
    mask = config.selected_experts or {}
    make, base_name = skeleton_maker(base_model, config, [path for path, ids in mask.items() if config.adapts(ids)])
    tensors = saved_weights(os.fspath(adapter))
    make = with_vocabulary_of(make, tensors, KEY_PREFIX)
    config.inference_mode = True
    model = PeftModel(make(), config)
    return OpenedAdapter(model, "default", base_name, make, assign(model, tensors))


def sieve_config(adapter: str) -> SieveLoraConfig:
    """The configuration of a saved sieve adapter.

    Raises:
        SieveError: there is none at that path or repository, or it belongs to another method.
    """
    config = saved_config(adapter)
    if not isinstance(config, SieveLoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        reason = ": PERFT and LoRA experts are in no weight of the base model" if method_of(kind) else ""
        ours = " or ".join(method.name for method in methods() if issubclass(method.config, SieveLoraConfig))
        raise SieveError(
            f"{adapter} holds an adapter of type {kind}, not {ours}. Pass one that was trained "
            f"with a SieveLoraConfig or an EpngConfig{reason}."
        )
    return config


def saved_config(adapter: str) -> PeftConfig:
    """The configuration of a saved adapter of any method.

    Raises:
        SieveError: there is none at that path or repository.
    """
    try:
        return PeftConfig.from_pretrained(adapter)
    except SieveError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SieveError(
            f"No adapter can be read from {adapter!r} ({first_line(error)}). Pass a folder or repository with "
            "adapter_config.json."
        ) from error


def saved_settings(adapter: str) -> dict[str, Any]:
    """All that is in the configuration of a saved adapter, also what PEFT does not know."""
    path = os.path.join(adapter, CONFIG_NAME)
    if not os.path.isfile(path):
        path = hf_hub_download(adapter, CONFIG_NAME)
    settings: dict[str, Any] = json.loads(Path(path).read_text())
    return settings


def saved_weights(adapter: str) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter, on the CPU, by keys with PEFT's prefix, which files may lack.

    Raises:
        SieveError: they cannot be read, or one is there with and without the prefix.
    """
    try:
        tensors = load_peft_weights(adapter, device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise SieveError(
            f"The weights of {adapter!r} cannot be read ({first_line(error)}). Save or download the adapter again."
        ) from error
    prefixed = {KEY_PREFIX + key.removeprefix(KEY_PREFIX): value for key, value in tensors.items()}
    if len(prefixed) < len(tensors):
        raise SieveError(
            f"The weights of {adapter!r} have a tensor twice, with and without the prefix {KEY_PREFIX!r}. Save or "
            "download the adapter again."
        )
    return prefixed


def assign(model: PeftModel, tensors: dict[str, torch.Tensor]) -> Embeddings:
    """Give the adapter "default" of a model on the meta device values, under the keys of a saved adapter.

    Returns:
        The embeddings that came with it.

    Raises:
        SieveError: they are not this adapter's, or it has tensors that are neither its own nor embeddings.
    """
    config = model.peft_config["default"]
    tuner: Any = type(model.base_model)
    state = tuner._remap_adapter_state_dict_for_load(
        model=model, config=config, adapter_name="default", state_dict=tensors
    )
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    lacking = next((key for key in own if ".lora_" in key and key not in state), None)
    unknown = next((key for key in state if key not in own), None)
    if lacking or unknown:
        raise _mixed(f"lack {lacking}" if lacking else f"have {unknown}")
    for key, value in state.items():
        if tuple(value.shape) != own[key]:
            raise _mixed(f"have {key} of shape {tuple(value.shape)}, where the model has {own[key]}")
    # Assigned, not copied: the factors replace those without values, and the base stays on the meta device.
    model.load_state_dict(state, strict=False, assign=True)
    foreign = {key.removeprefix(KEY_PREFIX): value for key, value in state.items() if ".lora_" not in key}
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return saved_embeddings(base, foreign)


def _mixed(wrong: str) -> SieveError:
    return SieveError(
        f"The weights {wrong}, unlike what the configuration describes. Take both files from one save, and pass the "
        "base model that the adapter was trained on."
    )


def refuse_settings(config: PeftConfig, names: Iterable[str], problem: str) -> None:
    """Refuse an adapter that has more than low-rank factors.

    Args:
        names: settings that would give it more.
        problem: what the error says of such an adapter, and what to do.

    Raises:
        SieveError: one of the settings is on.
    """
    for name in names:
        value = getattr(config, name, None)
        if value and value not in ("none", "lora"):  # how `bias` and `expert_tuning` are off
            raise SieveError(f"The adapter has {name}={shown(value)}, {problem}")


def _name_in(model: PeftModel, adapter_name: str | None) -> str:
    """The name of the adapter to open."""
    ours = [name for name, config in model.peft_config.items() if isinstance(config, SieveLoraConfig)]
    if adapter_name is None and len(ours) == 1:
        return ours[0]
    if adapter_name is None or adapter_name not in ours:
        raise must_be("adapter_name", f"one of the model's sieve adapters {ours}", adapter_name)
    return adapter_name
