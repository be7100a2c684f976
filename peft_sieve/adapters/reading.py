"""An adapter opened to be read: its factors with their values, on a base model that needs none."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora.layer import LoraLayer
from peft.utils import load_peft_weights
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import SieveError
from ..hf.methods import method_of, methods
from ..moe.topology import MoELayer, find_moe_layers
from ..tuners.common.experts.layer import SieveExpertLayer, expert_layers
from ..tuners.sieve.config import SieveLoraConfig

# By PEFT's task type; the class that the base model is loaded with then.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter to read.

    Attributes:
        model: it on a base model; only the adapter's own tensors are sure to have values.
        name: what it is called there.
        base_name: name or path of the base model, "" if not known.
        new_skeleton: makes the base model without adapters, on the meta device.
    """

    model: PeftModel
    name: str
    base_name: str
    new_skeleton: Callable[[], PreTrainedModel]

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
        layers = expert_layers(self.base)
        return {path: layer for path, layer in layers if self.name in layer.plans}

    def other_layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """(path in the base model, layer) of PEFT's own layers that this adapter is in."""
        for path, module in self.base.named_modules():
            if not isinstance(module, LoraLayer) or isinstance(module, SieveExpertLayer):
                continue
            if self.name in module.lora_A or self.name in module.lora_embedding_A:
                yield path, module

    def moe_layers(self) -> list[MoELayer]:
        """All MoE layers of the base model."""
        return find_moe_layers(self.base)


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
        SieveError: no such adapter, or its base model is not to be found.
    """
    if isinstance(adapter, PeftModel):
        return _of_model(adapter, base_model, adapter_name, check)
    if not isinstance(adapter, str | os.PathLike):
        raise SieveError(
            f"received {type(adapter).__name__} as the adapter, expected a PeftModel, or the path or Hub id of a saved "
            "adapter: pass one of those"
        )
    if adapter_name is not None:
        raise SieveError(
            f"received adapter_name={adapter_name!r} for a saved adapter, expected it for a PeftModel only: pass the "
            "folder of that adapter"
        )
    return _saved(os.fspath(adapter), base_model, check)


def sieve_config(adapter: str) -> SieveLoraConfig:
    """The configuration of a saved sieve adapter.

    Raises:
        SieveError: there is none at that path or repository, or it belongs to another method.
    """
    config = _read_config(adapter)
    if not isinstance(config, SieveLoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        reason = ", since PERFT and LoRA experts are in no weight of the base model" if method_of(kind) else ""
        raise SieveError(
            f"{adapter} holds an adapter of type {kind}, expected "
            f"{' or '.join(m.name for m in methods() if issubclass(m.config, SieveLoraConfig))}{reason}: pass an "
            "adapter that was trained with a SieveLoraConfig or an EpngConfig"
        )
    return config


def _read_config(adapter: str) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(adapter)
    except SieveError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SieveError(
            f"no adapter can be read from {adapter!r} ({first_line(error)}), expected a folder or repository with "
            "adapter_config.json: pass one"
        ) from error


def skeleton_maker(base_model: Any, config: PeftConfig, paths: list[str]) -> tuple[Callable[[], PreTrainedModel], str]:
    """How to make the base model on the meta device, and its name.

    Args:
        base_model: the model, its path or Hub id, or None for what `config` names.
        config: of the adapter; says which class the base model was of.
        paths: modules that it must have.

    Raises:
        SieveError: the base model is not named, not found, or has no such modules.
    """
    if isinstance(base_model, nn.Module):
        model = base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model
        return _like(model), str(getattr(model, "name_or_path", "") or "")
    name = base_model if base_model is not None else config.base_model_name_or_path
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        raise SieveError(
            f"received {name!r} as the base model, and the adapter names none, expected a model, or its path or Hub "
            "id: pass base_model"
        )
    name = os.fspath(name)
    try:
        # No question on the terminal about code that comes with a checkpoint: it is an error that says what to pass.
        revision = config.revision if base_model is None else None
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=False, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise SieveError(
            f"the configuration of the base model {name!r} cannot be read ({first_line(error)}), expected a path or "
            "Hub id that AutoConfig can load: pass it, or the model itself, as base_model"
        ) from error
    tried = []
    for model_class in model_classes(hf_config, config):
        try:
            make = _maker(model_class, hf_config, name)
            modules = {path for path, _ in make().named_modules()}
        except ValueError:
            # An auto class that does not know this configuration.
            continue
        if modules.issuperset(paths):
            return make, name
        tried.append(model_class.__name__)
    missing = next(iter(paths), "")
    raise SieveError(
        f"the base model {name!r} ({', '.join(tried) or 'of no known class'}) has no module {missing!r}, expected the "
        "one that the adapter was trained on: pass it as base_model"
    )


def _of_model(
    model: PeftModel, base_model: Any, adapter_name: str | None, check: Callable[[SieveLoraConfig], None]
) -> OpenedAdapter:
    ours = [name for name, config in model.peft_config.items() if isinstance(config, SieveLoraConfig)]
    if adapter_name is None and len(ours) == 1:
        adapter_name = ours[0]
    if adapter_name not in ours:
        raise SieveError(
            f"received adapter_name={adapter_name!r}, expected one of the model's sieve adapters {ours}: pass one"
        )
    assert adapter_name is not None
    config = model.peft_config[adapter_name]
    assert isinstance(config, SieveLoraConfig)
    check(config)
    base = model.get_base_model()
    named = base_model if isinstance(base_model, str) else getattr(base, "name_or_path", "")
    return OpenedAdapter(model, adapter_name, str(named or ""), _like(base))


def _saved(path: str, base_model: Any, check: Callable[[SieveLoraConfig], None]) -> OpenedAdapter:
    config = sieve_config(path)
    check(config)
    mask = config.selected_experts or {}
    make, base_name = skeleton_maker(base_model, config, [p for p, ids in mask.items() if ids])
    config.inference_mode = True
    model = PeftModel(make(), config)
    assign(model, _weights(path))
    return OpenedAdapter(model, "default", base_name, make)


def assign(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Give the adapter "default" of a model on the meta device values, under the keys of a saved adapter.

    Raises:
        SieveError: they are not this adapter's.
    """
    config = model.peft_config["default"]
    tuner: Any = type(model.base_model)
    state = tuner._remap_adapter_state_dict_for_load(
        model=model, config=config, adapter_name="default", state_dict=tensors
    )
    # Assigned, not copied: the factors replace those without values, and the base stays on the meta device.
    result = model.load_state_dict(state, strict=False, assign=True)
    missing = [key for key in result.missing_keys if ".lora_" in key]
    if missing or result.unexpected_keys:
        kind, key = ("no", missing[0]) if missing else ("the unknown", result.unexpected_keys[0])
        raise SieveError(
            f"the weights hold {kind} {key}, expected those that the configuration describes: take both files from one "
            "save, and pass the base model that the adapter was trained on"
        )


def open_plain_lora(
    lora: Any, base_model: Any, check: Callable[[LoraConfig], None]
) -> tuple[PeftModel, Callable[[], PreTrainedModel], str]:
    """A plain LoRA with its values, on a base model that needs none.

    Args:
        lora: a `PeftModel` with one LoRA, or the path or Hub id of a saved one.
        base_model, check: as for `open_adapter`.

    Returns:
        The model (its adapter may have any name), how to make its base model on the meta device, and the name of that.

    Raises:
        SieveError: no LoRA can be read there.
    """
    if isinstance(lora, PeftModel):
        base = lora.get_base_model()
        check(_required_plain(lora.peft_config[lora.active_adapter], "the model"))
        return lora, _like(base), str(getattr(base, "name_or_path", "") or "")
    if not isinstance(lora, str | os.PathLike):
        raise SieveError(
            f"received {type(lora).__name__} as the LoRA, expected a PeftModel, or the path or Hub id of a saved one: "
            "pass one of those"
        )
    path = os.fspath(lora)
    config = _required_plain(_read_config(path), path)
    check(config)
    make, base_name = skeleton_maker(base_model, config, [])
    config.inference_mode = True
    try:
        model = PeftModel(make(), config)
    except ValueError as error:
        raise SieveError(
            f"the LoRA {path!r} does not fit {base_name!r} ({first_line(error)}), expected the base model that it was "
            "trained on: pass that as base_model"
        ) from error
    # Files with a pair of factors per expert and projection become those of PEFT's parameters, as in its own loading.
    assign(model, convert_peft_adapter_state_dict_for_transformers(model, config, _weights(path)))
    return model, make, base_name


def _required_plain(config: PeftConfig, where: str) -> LoraConfig:
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        raise SieveError(
            f"{where} holds an adapter of type {getattr(config.peft_type, 'value', config.peft_type)}, expected LORA: "
            "pass an ordinary LoRA with factors for all experts"
        )
    return config


def _weights(path: str) -> dict[str, torch.Tensor]:
    try:
        return load_peft_weights(path, device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise SieveError(
            f"the weights of {path!r} cannot be read ({first_line(error)}), expected adapter_model.safetensors beside "
            "adapter_config.json: save or download the adapter again"
        ) from error


def _like(model: nn.Module) -> Callable[[], PreTrainedModel]:
    if not isinstance(model, PreTrainedModel):
        raise SieveError(
            f"the base model is a {type(model).__name__}, expected a model of transformers, since its configuration "
            "says how its checkpoint names weights: pass one"
        )
    return _maker(type(model), model.config, str(getattr(model, "name_or_path", "") or ""))


def _maker(model_class: Any, config: PreTrainedConfig, name: str) -> Callable[[], PreTrainedModel]:
    # A configuration of quantised weights would ask for its quantiser, and there are no weights here.
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config

    def make() -> PreTrainedModel:
        build = getattr(model_class, "_from_config", None) or model_class.from_config
        with torch.device("meta"):
            model: PreTrainedModel = build(copy.deepcopy(config))
        model.name_or_path = name
        return model.eval()

    return make


def model_classes(hf_config: PreTrainedConfig, config: PeftConfig) -> list[Any]:
    """What the base model may be an instance of, the likeliest first."""
    names = [(transformers, _AUTO_CLASSES[config.task_type])] if config.task_type in _AUTO_CLASSES else []
    mapping = config.auto_mapping or {}
    if str(mapping.get("parent_library", "")).split(".")[0] == "transformers":
        names.append((importlib.import_module(mapping["parent_library"]), mapping["base_model_class"]))
    names += [(transformers, name) for name in getattr(hf_config, "architectures", None) or ()]
    names += [(transformers, "AutoModelForCausalLM")]
    found = [getattr(module, name, None) for module, name in names]
    return [model_class for model_class in dict.fromkeys(found) if _takes(model_class, hf_config)]


def _takes(model_class: Any, hf_config: PreTrainedConfig) -> bool:
    """An auto class has no configuration of its own, and says itself when it does not know one."""
    config_class = getattr(model_class, "config_class", None)
    return model_class is not None and (config_class is None or isinstance(hf_config, config_class))


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
