"""One way to watch the forwards that train a model, whoever needs to know of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ...routing.encoder_decoder import IGNORED
from .hooks import hang, take_down


class TrainingForwards:
    """Is told of the forwards of a model in training mode and with gradients, once each: derive from it.

    Not of evaluation, generation, or a reference model's forward; and not of what gradient checkpointing computes
    again, which happens in the backward, outside of any forward of the model.

    Attributes:
        running: whether such a forward is running.
    """

    def __init__(self) -> None:
        self.running = False
        self._depth = 0

    def hang_on(self, model: nn.Module, name: str) -> None:
        """Watch from now on, in the place of what hung there under this name."""
        for module in called_modules(model):
            before = module.register_forward_pre_hook(self._begin, with_kwargs=True)
            after = module.register_forward_hook(self._end, with_kwargs=True, always_call=True)
            hang(module, name, before, after)

    def take_off(self, model: nn.Module, name: str) -> None:
        """Watch no more."""
        for module in called_modules(model):
            take_down(module, name)

    # To be overridden

    def begin(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        """A forward begins.

        Args:
            model: the model, or its backbone if that was called alone.
            given: the arguments by name.
        """

    def inside(self, given: Mapping[str, Any]) -> None:
        """The backbone is called by the model."""

    def end(self, model: nn.Module, given: Mapping[str, Any], output: Any) -> Any:
        """A forward is over: what to return in place of its output, None for the output itself.

        Args:
            output: None after an exception.
        """
        return None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth == 1:
            self.running = module.training and torch.is_grad_enabled()
            if self.running:
                self.begin(module, _arguments(module, args, kwargs))
        elif self.running:
            self.inside(_arguments(module, args, kwargs))

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._depth = max(0, self._depth - 1)
        if self._depth or not self.running:
            return None
        self.running = False
        return self.end(module, _arguments(module, args, kwargs), output)


def called_modules(model: nn.Module) -> list[nn.Module]:
    """A base model and its backbone, which losses that never make logits call alone."""
    backbone = getattr(model, "base_model", model)
    return [model] if backbone is model or not isinstance(backbone, nn.Module) else [model, backbone]


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def share_of_step(model: nn.Module, given: Mapping[str, Any]) -> torch.Tensor | float:
    """The part of the labels of an optimizer step that a forward has: of all its batches together 1.

    transformers' Trainer passes `num_items_in_batch`, the labels of all batches, for losses that are to be added up
    over them. Without it a loss is a mean, and the share is 1.

    Args:
        given: the arguments of the forward by name.
    """
    total, labels = given.get("num_items_in_batch"), given.get("shift_labels")
    if labels is None:
        labels = given.get("labels")
        if isinstance(labels, torch.Tensor) and _shifts_labels(model):
            labels = labels[..., 1:]
    if total is None or not isinstance(labels, torch.Tensor):
        return 1.0
    return labels.ne(IGNORED).sum() / torch.as_tensor(total, device=labels.device).clamp(min=1)


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the first label of a sequence has no loss, by the Trainer's rule, which counts the others only."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
