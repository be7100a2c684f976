"""The balance loss of the adapters' routers: made from a whole forward of the model, and added to its loss.

The models of transformers do the same for their own routers: logits of all layers are collected during the forward, and
the head adds the loss times its coefficient to `outputs.loss`. Here hooks on the model do it, so that it reaches
whatever reads that loss. A loss made by hand from logits adds `auxiliary_loss(model)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import SieveError
from ...routing.counting import token_mask
from ...routing.encoder_decoder import decoder_layers, decoder_mask
from ..common.forwards import arguments, share_of_step
from .mixture import wide_softmax


@dataclass(frozen=True)
class _Routed:
    """What one router said in one forward."""

    adapter_name: str
    coef: float
    top_k: int
    path: str
    logits: torch.Tensor  # (tokens, adapters)
    trainable: bool


@dataclass
class _Auxiliary:
    """The balance loss of a model's last training forward, times its coefficient, and whether anybody got it."""

    loss: torch.Tensor
    used: bool = False


# What routers report during a training forward; None outside of one, as while checkpointed layers run again.
_collected: ContextVar[list[_Routed] | None] = ContextVar("_collected", default=None)
# The model, or the backbone that was called alone, whose forward is running.
_running: ContextVar[nn.Module | None] = ContextVar("_running", default=None)
_added_by_trainer: ContextVar[bool] = ContextVar("_added_by_trainer", default=False)
# By backbone, and beside the models: tensors of a graph could neither be copied nor pickled with them.
_last: WeakKeyDictionary[nn.Module, _Auxiliary] = WeakKeyDictionary()


def balance_loss(logits: torch.Tensor, top_k: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """How unevenly a router spreads tokens (Switch Transformer, equations 4 to 6, for the `top_k` of a token).

    Args:
        logits: (tokens, adapters).
        real: (tokens,), which of them are no padding; None if all are.

    Returns:
        adapters * sum over adapters of (share of tokens sent there) * (mean probability): `top_k` when even, more
        otherwise. A scalar; its gradient comes from the probabilities.
    """
    probabilities = wide_softmax(logits)
    chosen = probabilities.topk(top_k, dim=-1).indices
    sent = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
    if real is None:
        shares, means = sent.mean(0), probabilities.mean(0)
    else:
        weights = real.to(probabilities).unsqueeze(-1) / real.sum().clamp(min=1)
        shares, means = (sent * weights).sum(0), (probabilities * weights).sum(0)
    return logits.shape[-1] * (shares * means).sum()


def report(adapter_name: str, coef: float, top_k: int, path: str, logits: torch.Tensor, trainable: bool) -> None:
    """Called by every router in every forward."""
    collected = _collected.get()
    if collected is not None and coef:
        collected.append(_Routed(adapter_name, coef, top_k, path, logits, trainable))


def auxiliary_loss(model: nn.Module) -> torch.Tensor:
    """The balance loss of the last training forward of `model` (the base model), times its coefficient: a scalar.

    Zero if no active adapter has a balance loss.

    Raises:
        SieveError: there was no forward in training mode with gradients.
    """
    auxiliary = _last.get(_backbone(model))
    if auxiliary is None:
        raise SieveError(
            "auxiliary_loss was asked for before a forward in training mode with gradients, expected one, since the "
            "balance loss is that of its tokens: call train() and the model first"
        )
    auxiliary.used = True
    return auxiliary.loss


def collected_by(model: nn.Module) -> bool:
    """Whether the last training forward of `model` gave a balance loss that is worth adding."""
    last = _last.get(_backbone(model))
    return last is not None and last.loss.requires_grad


@contextmanager
def added_by_trainer() -> Iterator[None]:
    """In the block, losses of outputs are left alone: the caller adds `auxiliary_loss` to the loss that it makes."""
    token = _added_by_trainer.set(True)
    try:
        yield
    finally:
        _added_by_trainer.reset(token)


def start_adding(model: nn.Module) -> None:
    """Hook up the base model, and its backbone, which some losses call alone; once is enough."""
    if "_perft_handles" not in vars(model):
        vars(model)["_perft_handles"] = [
            handle
            for module in {id(m): m for m in (model, _backbone(model))}.values()
            for handle in (
                module.register_forward_pre_hook(_begin),
                module.register_forward_hook(_end, with_kwargs=True, always_call=True),
            )
        ]


def stop_adding(model: nn.Module) -> None:
    """Take the hooks away."""
    for handle in vars(model).pop("_perft_handles", ()):
        handle.remove()
    _last.pop(_backbone(model), None)


def _backbone(model: nn.Module) -> nn.Module:
    return model.base_model if isinstance(model, PreTrainedModel) else model


def _begin(model: nn.Module, args: tuple[Any, ...]) -> None:
    if _running.get() is not None:
        return
    _running.set(model)
    training = model.training and torch.is_grad_enabled()
    last = _last.get(_backbone(model))
    if training and last is not None and not last.used and last.loss.requires_grad:
        warnings.warn(
            "The balance loss of the PERFT adapters' router was not used: the model gave no loss that it could be "
            "added to. Add model.auxiliary_loss() to yours, or set aux_loss_coef=0."
        )
    _collected.set([] if training else None)


def _end(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if _running.get() is not model:
        return None
    _running.set(None)
    routed = _collected.get()
    _collected.set(None)
    if routed is None or output is None:  # None after an exception
        return None
    given = arguments(model, args, kwargs)
    auxiliary = _last[_backbone(model)] = _Auxiliary(_weighted(model, routed, given))
    if not routed or _added_by_trainer.get():
        return None
    return _with_added(output, auxiliary, given, model)


def _weighted(model: nn.Module, routed: list[_Routed], given: dict[str, Any]) -> torch.Tensor:
    """For each adapter its coefficient times the mean over layers, all added up."""
    if not routed:
        return torch.zeros(())
    decoding = decoder_layers(model, {one.path for one in routed})
    masks = {False: token_mask(given.get("attention_mask")), True: token_mask(decoder_mask(given))}
    by_adapter: dict[str, list[torch.Tensor]] = {}
    device = routed[0].logits.device
    for one in routed:
        if one.trainable and not one.logits.requires_grad:
            raise SieveError(
                "the router of PERFT adapters ran without gradients (gradient checkpointing with use_reentrant=True), "
                "expected them, since its balance loss would train nothing: pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or set aux_loss_coef=0"
            )
        real = masks[one.path in decoding]
        if real is not None and real.numel() != one.logits.shape[0]:
            real = None
        loss = balance_loss(one.logits, one.top_k, None if real is None else real.to(one.logits.device))
        by_adapter.setdefault(one.adapter_name, []).append(one.coef * loss.to(device))
    return torch.stack([torch.stack(losses).mean() for losses in by_adapter.values()]).sum()


def _with_added(output: Any, auxiliary: _Auxiliary, given: dict[str, Any], model: nn.Module) -> Any:
    """The output with the balance loss in its loss; None (keep it as it is) if it has no loss."""
    if isinstance(output, tuple):
        if given.get("labels") is None:
            return None
        loss, rest = output[0], output[1:]
    else:
        loss, rest = getattr(output, "loss", None), None
    if loss is None:
        return None
    # Some of TRL's trainers have their model compute log-probabilities, and take those, not this loss.
    auxiliary.used = getattr(output, "log_probs", None) is None
    total = loss + (auxiliary.loss * share_of_step(model, given)).to(loss)
    if rest is not None:
        return (total, *rest)
    output.loss = total
    return output
