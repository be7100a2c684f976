"""The balance loss of routers that are a part of adapters: made from a whole forward of the model, added to its loss.

The models of transformers do the same for their own routers: logits of all layers are collected during the forward, and
the head adds the loss times its coefficient to `outputs.loss`. Here hooks on the model do it, so that it reaches
whatever reads that loss. A loss made by hand from logits adds `last_loss()`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import SieveError
from ...routing.encoder_decoder import canvas_layers, decoder_layers, decoder_mask
from ...routing.masks import token_mask
from .forwards import TrainingForwards, share_of_step

_NAME = "balance"


@dataclass(frozen=True)
class Routed:
    """What one router said in one forward.

    Attributes:
        coef: factor of its balance loss, 0 for none.
        probabilities: (tokens, adapters), of which the loss has its gradient.
        expert_ids: (tokens, top_k), where the tokens were sent.
        trainable: whether the router itself is being trained.
        path: of its layer, for encoder-decoders; None where that does not tell which of two sequences it reads.
        group: losses of one group are averaged, and the groups added up.
        per_selection: whether the shares are those of all selections, so that an even spread gives 1, or of the tokens,
            so that it gives `top_k`.
        usage: (adapters,), int64: what was sent to each is added to it; None for nothing.
    """

    coef: float
    probabilities: torch.Tensor
    expert_ids: torch.Tensor
    trainable: bool
    path: str | None = None
    group: str = ""
    per_selection: bool = False
    usage: torch.Tensor | None = None


def balance_loss(
    probabilities: torch.Tensor,
    expert_ids: torch.Tensor,
    real: torch.Tensor | None = None,
    *,
    per_selection: bool = False,
) -> torch.Tensor:
    """How unevenly a router spreads tokens (Switch Transformers, arXiv 2101.03961, equations 4 to 6).

    Args:
        probabilities, expert_ids, per_selection: as in `Routed`.
        real: (tokens,), which of them are not padding; None if all are.

    Returns:
        adapters * sum over adapters of (share sent there) * (mean probability): `top_k` when even, or 1 with
        `per_selection`; more otherwise. A scalar; its gradient comes from the probabilities.
    """
    with torch.autocast(probabilities.device.type, enabled=False):
        # In two ways, so that runs that go on keep the bits that they had.
        if per_selection:
            weights = probabilities.new_ones(len(probabilities)) if real is None else real.to(probabilities)
            counts = sent_to(expert_ids, probabilities.shape[-1], real)
            means = weights @ probabilities / weights.sum().clamp(min=1)  # (adapters,)
            shares = counts.to(means.dtype) / counts.sum().clamp(min=1)
        elif real is None:
            shares, means = _sent(probabilities, expert_ids).mean(0), probabilities.mean(0)
        else:
            weights = real.to(probabilities).unsqueeze(-1) / real.sum().clamp(min=1)
            shares, means = (_sent(probabilities, expert_ids) * weights).sum(0), (probabilities * weights).sum(0)
        return probabilities.shape[-1] * (shares * means).sum()


def _sent(probabilities: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """(tokens, adapters), 1 where a token was sent."""
    return torch.zeros_like(probabilities).scatter(-1, expert_ids, 1.0)


def sent_to(expert_ids: torch.Tensor, num_adapters: int, real: torch.Tensor | None) -> torch.Tensor:
    """How many of the real tokens were sent to each adapter: (adapters,), in the type of the ids."""
    flat = expert_ids.flatten()
    counted = torch.ones_like(flat) if real is None else real.to(flat).repeat_interleave(expert_ids.shape[-1])
    return flat.new_zeros(num_adapters).scatter_add_(0, flat, counted)


class BalanceLoss(TrainingForwards):
    """Collects what the routers of a model's adapters say in a training forward, and adds their loss.

    Attributes:
        adds_to_outputs: whether the loss is added to `outputs.loss`, where there is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adds_to_outputs = True
        self._routed: list[Routed] = []
        self._loss: torch.Tensor | None = None
        self._used = True
        self._warned = False

    @classmethod
    def of(cls, model: nn.Module) -> BalanceLoss | None:
        """The one that hangs on a base model; None if no adapter in it has routers."""
        found = vars(model).get("_balance_loss")
        return found if isinstance(found, cls) else None

    @classmethod
    def hung_on(cls, model: nn.Module) -> BalanceLoss:
        """The one that hangs on a base model, which is hung there if there is none."""
        found = cls.of(model)
        if found is None:
            found = vars(model)["_balance_loss"] = cls()
            found.hang_on(model, _NAME)
        return found

    @staticmethod
    def remove_from(model: nn.Module) -> None:
        """Take it away."""
        found = vars(model).pop("_balance_loss", None)
        if found is not None:
            found.take_off(model, _NAME)

    def report(self, routed: Routed) -> None:
        """Called by every router in every forward; nothing outside of training forwards."""
        if self.running:
            self._routed.append(routed)

    def last_loss(self) -> torch.Tensor | None:
        """The loss of the last training forward, coefficients included: a scalar; None if there was none."""
        self._used = True
        return self._loss

    @property
    def trains(self) -> bool:
        """Whether the last training forward gave a loss that is worth adding."""
        return self._loss is not None and self._loss.requires_grad

    @contextmanager
    def added_elsewhere(self) -> Iterator[None]:
        """In the block, losses of outputs are left alone: the caller adds `last_loss()` to the loss that it makes."""
        before, self.adds_to_outputs = self.adds_to_outputs, False
        try:
            yield
        finally:
            self.adds_to_outputs = before

    def begin(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        if not self._used and self.trains and not self._warned:
            self._warned = True
            warnings.warn(
                "The balance loss of the last forward was not used: the model gave no loss that it could be added to. "
                "Add model.auxiliary_loss() to yours, or set balance_loss_coef=0.",
                UserWarning,
            )
        self._routed, self._loss, self._used = [], None, True

    def end(self, model: nn.Module, given: Mapping[str, Any], output: Any) -> Any:
        routed, self._routed = self._routed, []
        if output is None:
            return None
        self._loss = _added_up(model, routed, given)
        loss = _loss_of(output, given) if self.trains else None
        self._used = (loss is not None and self.adds_to_outputs) or not self.trains
        if loss is None or not self.adds_to_outputs:
            return None
        loss = loss + self._loss.to(loss.device) * share_of_step(model, given)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output.loss = loss
        return output

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a graph stays with the model that made it."""
        return {**vars(self), "_loss": None, "_routed": [], "_used": True}


def _added_up(model: nn.Module, routed: list[Routed], given: Mapping[str, Any]) -> torch.Tensor:
    """For each group the mean of coefficient times loss, all added up; counts usage on the way."""
    if any(one.coef and one.trainable and not one.probabilities.requires_grad for one in routed):
        raise SieveError(
            "The routers of the adapters ran without gradients (gradient checkpointing with use_reentrant=True), so "
            "that their balance loss would train nothing. Pass gradient_checkpointing_kwargs={'use_reentrant': False}, "
            "or set balance_loss_coef=0."
        )
    groups: dict[str, list[torch.Tensor]] = {}
    masks = _Masks(model, [one.path for one in routed if one.path is not None], given)
    for one in routed:
        real = masks.of(one)
        if one.usage is not None:
            one.usage.add_(sent_to(one.expert_ids, len(one.usage), real))
        if one.coef:
            loss = balance_loss(one.probabilities, one.expert_ids, real, per_selection=one.per_selection)
            groups.setdefault(one.group, []).append(one.coef * loss)
    if not groups:
        return torch.zeros(())
    device = next(iter(groups.values()))[0].device
    return torch.stack([torch.stack([loss.to(device) for loss in group]).mean() for group in groups.values()]).sum()


class _Masks:
    """Which of the tokens that a router read are not padding."""

    def __init__(self, model: nn.Module, paths: list[str], given: Mapping[str, Any]) -> None:
        self.in_decoder, self.on_canvas = decoder_layers(model, paths), canvas_layers(model, paths)
        self.has_two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.masks = [token_mask(mask, given) for mask in (given.get("attention_mask"), decoder_mask(given))]

    def of(self, routed: Routed) -> torch.Tensor | None:
        """(tokens,); None where no mask says it of as many."""
        tokens, device = len(routed.probabilities), routed.probabilities.device
        # Of two sequences of one length, which of the masks holds would be a guess.
        known = routed.path not in self.on_canvas and (routed.path is not None or not self.has_two)
        real = self.masks[routed.path in self.in_decoder] if known else None
        if real is None or real.numel() != tokens:
            return None
        return real.to(device)


def _loss_of(outputs: Any, given: Mapping[str, Any]) -> torch.Tensor | None:
    """The loss that a model has made of its labels, if anybody reads it."""
    # Some of TRL's trainers have their model compute log-probabilities, and take those, not this loss.
    if given.get("fused_lm_head") or getattr(outputs, "log_probs", None) is not None:
        return None
    if isinstance(outputs, tuple):
        loss = outputs[0] if outputs and given.get("labels") is not None else None
    else:
        loss = getattr(outputs, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.dim() == 0 else None
