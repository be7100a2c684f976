"""What the tuners of all methods do alike: refuse early, inject or leave no trace, load what fits or nothing."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.initialization import no_init_weights

from ...errors import SieveError
from ...hf.deletion import delete_adapter
from ...hf.injection import injecting, values_follow
from ...hf.trainers import wrap_trainer
from ...moe.topology import standing_modules
from ...moe.wrappers import compiled_in_place, plain_name, refuse_wrapped
from .bookkeeping import checked_by
from .loading import (
    by_own_keys,
    check_biases,
    check_bookkeeping,
    check_loaded,
    check_state_dict,
    check_whole,
    in_peft_model,
)
from .names import check_adapter_names, check_not_there
from .trained_whole import refuse_adapting, refuse_training_whole


class MethodTuner(BaseTuner):
    """The first base of a tuner of this package.

    A tuner says what its adapters cannot do by setting an attribute to a sentence that says why, and what to do
    instead.

    Attributes:
        no_merging, no_weighted_sum, no_mixed_batches: why; None where it can.
    """

    no_merging: ClassVar[str | None] = None
    no_weighted_sum: ClassVar[str | None] = None
    no_mixed_batches: ClassVar[str | None] = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Before PEFT enters the configuration in the place of another's.
        check_not_there(adapter_name, model)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; after an error, the model is as before.

        Raises:
            SieveError: the adapter's name would be mistaken for a part of a key, or the method's own reasons.
        """
        refuse_wrapped(model)
        with injecting(model, self, adapter_name):
            # Without words of wrappers in the names that a mask and saved weights go by.
            self.model = plain = compiled_in_place(model)
            if plain is not model:  # at which PEFT has looked for the name of the base model
                self.peft_config[adapter_name].base_model_name_or_path = vars(plain).get("name_or_path") or None
                model = plain
            check_adapter_names(model, self.peft_config)
            refuse_training_whole(model, self.peft_config, adapter_name)
            # PEFT's own layers, too, draw values that the saved ones replace.
            with no_init_weights() if values_follow() else nullcontext():
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            checked_by(model)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # The first hook of PEFT's after the targets are known.
        probe = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        paths = (path for path, _ in standing_modules(model) if path)
        refuse_adapting(model, (path for path in paths if check_target_module_exists(probe, path)))
        super()._prepare_model(peft_config, model)

    def _updated(self, layer: Any, adapter_name: str, *args: Any) -> Any:
        """A new layer with its first adapter, for which `update_layer` gets the other arguments."""
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, *args)
        if adapter_name not in self.active_adapters:
            # As PEFT: an additional adapter does not become trainable by being added.
            layer.requires_grad_(False)
        return layer

    # What is active, and taking out

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; an empty list is taken also where modules are trained whole.

        It comes to that when an adapter is added after the last one was deleted.
        """
        if not isinstance(adapter_name, str) and not adapter_name:
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper | self.tuner_layer_cls):
                    module.set_adapter([])
            self.active_adapter = []
        else:
            super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; which ones are active then, says `hf.deletion.delete_adapter`.

        Raises:
            ValueError: there is no such adapter, or it is merged; nothing was changed.
        """
        configs: dict[str, Any] = self.peft_config
        if adapter_name not in configs:
            super().delete_adapter(adapter_name)  # which says so
        active = delete_adapter(self.model, adapter_name, self.active_adapters, configs, self.tuner_layer_cls)
        del configs[adapter_name]
        self.active_adapter = active

    def unload(self) -> nn.Module:
        """The base model without adapters; modules that an adapter trained whole are the base's again."""
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.set_adapter([])  # PEFT leaves the active one in the model
        return super().unload()

    # Saving and loading

    def train(self, mode: bool = True) -> Any:
        """As PyTorch's. Trainers call it before every step, by when transformers' is there to be told what to save."""
        if mode:
            wrap_trainer()
        return super().train(mode)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: Mapping[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # Wrapped since the injection: PEFT would find nothing, or save names that no other model has.
        names = {plain_name(name): name for name in _names(model) if plain_name(name) != name}
        given = {names.get(plain_name(key), key): value for key, value in state_dict.items()}
        found = super()._get_adapter_state_dict(model, config, adapter_name, given, unwanted_adapter_names)
        return {plain_name(key): value for key, value in found.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        given = by_own_keys(model, adapter_name, state_dict, cls._remove_adapter_name_from_key)
        check_bookkeeping(model, adapter_name, given)
        with cls._fitted(model, config, adapter_name, given):
            check_state_dict(model, adapter_name, given, cls.prefix)
            if getattr(config, "bias", "none") != "none":
                biases = cls._get_learnable_bias_state_dict(model, model.state_dict(), config)
                check_biases(given, (cls._remove_adapter_name_from_key(key, adapter_name) for key in biases))
            prefixed = {in_peft_model(key): value for key, value in given.items()}
            mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, prefixed)
        if all(plain_name(name) == name for name in _names(model)):
            return mapped
        own = {cls._remove_adapter_name_from_key(plain_name(key), adapter_name): key for key in model.state_dict()}
        return {own.get(key, key): value for key, value in mapped.items()}

    @classmethod
    @contextmanager
    def _fitted(
        cls, model: nn.Module, config: Any, adapter_name: str, given: Mapping[str, torch.Tensor]
    ) -> Iterator[None]:
        """In the block, an adapter has the form of the weights that are to be loaded, if training can have come to it.

        After an exception in the block it has its own form again.

        Args:
            given: the weights, by keys of the base model without adapter names.
        """
        yield

    @classmethod
    def check_loaded(
        cls, model: nn.Module, adapter_name: str, missing: Iterable[str], unexpected: Iterable[str]
    ) -> None:
        """Refuse what a loader that assigns tensors without asking (transformers' `load_adapter`) has loaded.

        Raises:
            SieveError: tensors are missing or left over, or do not belong to the configuration.
        """
        check_loaded(model, adapter_name, missing, unexpected, cls.prefix)

    @classmethod
    def check_whole(cls, model: nn.Module, adapter_name: str, saved: Collection[str]) -> None:
        """Refuse a save that would leave tensors of an adapter out.

        Args:
            saved: the keys that would be in the file.

        Raises:
            SieveError: it would.
        """
        check_whole(model, adapter_name, saved)

    # What a method may not be able to do

    def _check_merge_allowed(self) -> None:
        refuse_if(self.no_merging)
        super()._check_merge_allowed()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """A weighted sum of adapters as a new one.

        Raises:
            SieveError: adapters of this method have none.
        """
        refuse_if(self.no_weighted_sum)
        super().add_weighted_adapter(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            refuse_if(self.no_mixed_batches)
        hooks = getattr(super(), "_enable_peft_forward_hooks", None)
        with nullcontext() if hooks is None else hooks(*args, **kwargs):
            yield


def _names(model: nn.Module) -> Iterator[str]:
    """The names of parameters and buffers."""
    yield from (name for name, _ in model.named_parameters(remove_duplicate=False))
    yield from (name for name, _ in model.named_buffers(remove_duplicate=False))


def refuse_if(reason: str | None) -> None:
    """Raise `SieveError` if there is a reason to."""
    if reason is not None:
        raise SieveError(reason)
