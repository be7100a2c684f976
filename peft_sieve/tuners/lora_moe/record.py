"""What the routers of the adapters did in a training forward: tokens by expert, and the balance loss.

Layers report while the forward of the model runs, and only then: what gradient checkpointing computes again, in the
backward, is not reported a second time.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import SieveError
from ...routing.counting import token_mask
from ..common.forwards import arguments, share_of_step

if TYPE_CHECKING:
    from .layer import LoraMoeLayer


@dataclass(frozen=True)
class _Seen:
    layer: LoraMoeLayer
    adapter_name: str
    probabilities: torch.Tensor  # (tokens, experts)
    expert_ids: torch.Tensor  # (tokens, top_k)


class RoutingRecord:
    """Shared by all adapted layers of a model.

    Attributes:
        collecting: whether a forward in training is running.
        adds_to_outputs: whether the balance loss is added to `outputs.loss`, where there is one.
    """

    def __init__(self) -> None:
        self.collecting = False
        self.adds_to_outputs = True
        self._depth = 0
        self._seen: list[_Seen] = []
        self._mask: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None
        self._claimed = True
        self._warned = False
        self._handles: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        """Watch the forwards of `model`, and of its backbone, which some losses call alone."""
        backbone = model.base_model if isinstance(model, PreTrainedModel) else model
        for module in {id(m): m for m in (model, backbone)}.values():
            self._handles += [
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                module.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            ]

    def detach(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def see(
        self, layer: LoraMoeLayer, adapter_name: str, probabilities: torch.Tensor, expert_ids: torch.Tensor
    ) -> None:
        """Take note of what one router did: (tokens, experts) and (tokens, top_k)."""
        self._seen.append(_Seen(layer, adapter_name, probabilities, expert_ids))

    def auxiliary_loss(self) -> torch.Tensor:
        """The balance loss of the last training forward, coefficient included: a scalar, zero if there was none."""
        self._claimed = True
        return torch.zeros(()) if self._loss is None else self._loss

    # Hooks

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._seen, self._mask = [], None
        self.collecting = module.training and torch.is_grad_enabled()
        if not self.collecting:
            return
        if not self._claimed and not self._warned:
            self._warned = True
            warnings.warn(
                "the balance loss of the forward before has reached no loss, since that is made outside the model: add "
                "model.auxiliary_loss() to it (in a Trainer, trainer.add_callback(ExpertPruningCallback(trainer)) does "
                "so), or set balance_loss_coef=0",
                UserWarning,
            )
        self._loss = None
        is_two = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        # Of two sequences of one length, which of the masks holds would be a guess.
        self._mask = None if is_two else token_mask(arguments(module, args, kwargs).get("attention_mask"))

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        self._depth -= 1
        if self._depth > 0:
            return None
        seen, self._seen = self._seen, []
        was_collecting, self.collecting = self.collecting, False
        if outputs is None or not was_collecting or not seen:  # None after an exception
            return None
        self._loss = self._counted(seen)
        if self._loss is None:
            return None
        given = arguments(module, args, kwargs)
        loss = _loss_of(outputs, given)
        self._claimed = self.adds_to_outputs and loss is not None
        if loss is None or not self.adds_to_outputs:
            return None
        return _with_loss(outputs, loss + self._loss.to(loss.device) * share_of_step(module, given))

    def _counted(self, seen: list[_Seen]) -> torch.Tensor | None:
        """Add to the layers' counters; the balance loss, None if nobody wants one.

        Per layer it is `experts * sum(share of the selections * mean probability)` over the experts, which is 1 when
        all are used alike; these are averaged (Switch Transformers, arXiv 2101.03961, eq. 4).
        """
        coefs = [s.layer.plans[s.adapter_name].balance_loss_coef for s in seen]
        if any(coef and not s.probabilities.requires_grad for coef, s in zip(coefs, seen, strict=True)):
            raise SieveError(
                "the routers of the LoRA experts run without gradients in training, expected gradients for the balance "
                "loss: call gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}), or "
                "set balance_loss_coef=0"
            )
        losses = []
        for coef, s in zip(coefs, seen, strict=True):
            tokens, experts = s.probabilities.shape
            top_k = s.expert_ids.shape[-1]
            real = self._mask
            if real is None or real.numel() != tokens:
                real = torch.ones(tokens, dtype=torch.bool, device=s.probabilities.device)
            real = real.to(s.probabilities.device)
            flat = s.expert_ids.flatten()
            counts = flat.new_zeros(experts).scatter_add_(0, flat, real.repeat_interleave(top_k).to(flat.dtype))
            s.layer.usage(s.adapter_name).tokens.add_(counts)
            if not coef:
                continue
            with torch.autocast(s.probabilities.device.type, enabled=False):
                weights = real.to(s.probabilities.dtype)
                mean = weights @ s.probabilities / weights.sum().clamp(min=1)  # (experts,)
                shares = counts.to(mean.dtype) / counts.sum().clamp(min=1)
                losses.append(coef * experts * (shares * mean).sum())
        if not losses:
            return None
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a graph stays with the model that made it."""
        return {**vars(self), "_loss": None, "_seen": [], "_mask": None, "_claimed": True}


def _loss_of(outputs: Any, given: dict[str, Any]) -> torch.Tensor | None:
    """The loss that a model has made of its labels, if anybody reads it."""
    if given.get("fused_lm_head"):  # TRL's, whose trainers read the log probabilities
        return None
    if isinstance(outputs, tuple):
        loss = outputs[0] if outputs and given.get("labels") is not None else None
    else:
        loss = getattr(outputs, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.dim() == 0 else None


def _with_loss(outputs: Any, loss: torch.Tensor) -> Any:
    if isinstance(outputs, tuple):
        return (loss, *outputs[1:])
    outputs.loss = loss
    return outputs
