"""A callback for transformers' `Trainer` that logs how far routing drifts away from the mask during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..errors import SieveError
from ..routing.counting import DispatchCounter, Watched, see_mask, watching
from ..routing.distributed import summed
from ..routing.drift import routing_drift
from ..routing.encoder_decoder import decoder_layers
from ..routing.plain_model import unwrapped
from ..routing.profile import RoutingProfile
from ..routing.scores import check_score
from ..routing.selection import ExpertSelection
from ..tuners.common.experts.layer import SieveExpertLayer
from .trainer_methods import wrap_method

_ADVICE = "train with per_device_train_batch_size=1, or leave RoutingDriftCallback out"
# What the Trainer's own entry of a training log has, and those of evaluations and of the end do not.
_TRAINING_ENTRY = "loss"
# What is counted instead of averages over samples, which a packed batch does not tell apart.
_OVER_TOKENS = {"esft_gate": "mass", "esft_token": "count"}


class RoutingDriftCallback(TrainerCallback):
    """Adds the drift of routing to the Trainer's own training logs, and so to whatever tracker it reports to.

    On every `every`-th step it counts what the routers dispatch in the forward of the loss: real tokens once, without
    padding, without what gradient checkpointing computes again, and without a reference model's forward, in which the
    adapter is off. Each training log then has, over the steps counted since the log before and over all processes:

    - `routing_jaccard`: agreement of the mask with the one that these counts would give, with as many experts in each
      layer; mean over layers. Few tokens give another mask by chance alone: what to watch is its change.
    - `routing_coverage`: share of this traffic that the adapted experts got; mean over layers.
    - `routing_tokens`: how many tokens that is.

    Both go by the score that the adapter was calibrated with, and by gate weights and counts over all tokens in the
    place of ESFT's averages over samples. A log with no counted step before it has none of the three. The model, its
    gradients and random numbers are not touched, and nothing waits for the device but the log.

    Args:
        trainer: the Trainer, or one derived from it, to which the callback is then added:
            `trainer.add_callback(RoutingDriftCallback(trainer))`. Callbacks are not told what is logged before trackers
            are, so it needs the Trainer itself.
        every: optimizer steps from one counted step to the next, from the first on.

    Raises:
        SieveError: no sieve adapter is being trained, or its routing cannot be counted; also when training begins.
    """

    def __init__(self, trainer: Trainer, *, every: int = 10) -> None:
        if not isinstance(trainer, Trainer):
            raise SieveError(
                f"received {type(trainer).__name__} as the trainer, expected a Trainer of transformers or TRL: make it "
                "first, then trainer.add_callback(RoutingDriftCallback(trainer))"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise SieveError(f"received every={every!r}, expected a whole number of steps from 1 on: pass one like 10")
        self.trainer = trainer
        self.every = every
        self._restore = ExitStack()
        self._counts = _TrainingCounts(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start anew; also after a run that an exception ended."""
        if self.trainer.state is not state:
            raise SieveError(
                "RoutingDriftCallback was added to another trainer than it was made with, expected the same: use "
                "trainer.add_callback(RoutingDriftCallback(trainer))"
            )
        self._restore.close()
        self._counts = _TrainingCounts(self.trainer)
        self._restore.callback(wrap_method(self.trainer, "compute_loss", self._counted))
        self._restore.callback(wrap_method(self.trainer, "log", self._with_drift))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the Trainer its methods back."""
        self._restore.close()

    def _counted(self, compute_loss: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The backward, with what checkpointing computes again, comes after this call.
        if not model.training or self.trainer.state.global_step % self.every:
            return compute_loss(model, *args, **kwargs)
        with self._counts.counting():
            return compute_loss(model, *args, **kwargs)

    def _with_drift(self, log: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if _TRAINING_ENTRY in logs:  # every process is here, having just shared its loss
            logs.update(self._counts.drift())
        return log(logs, *args, **kwargs)


class _TrainingCounts:
    """What the routers of the adapted layers dispatch while the model trains.

    Raises:
        SieveError: there is nothing to count, or no way to do so.
    """

    model: nn.Module

    def __init__(self, trainer: Trainer) -> None:
        model: Any = trainer.model
        self.model = model
        self.layers = [
            (module, child)
            for module in model.modules()
            for child in module.children()
            if isinstance(child, SieveExpertLayer)
        ]
        self.adapter = _trained_adapter(trainer, [layer for _, layer in self.layers])
        self.layers = [(parent, layer) for parent, layer in self.layers if self.adapter in layer.plans]
        score: str = model.peft_config[self.adapter].score
        self.score = _OVER_TOKENS.get(score, score)
        check_score(self.score)
        self.counters = self._new_counters()
        self.in_decoder = decoder_layers(unwrapped(model), self.counters)

    @property
    def mask(self) -> ExpertSelection:
        """The experts that have an adapter now; EPnG changes them in training."""
        return ExpertSelection({layer.path: layer.plans[self.adapter].experts for _, layer in self.layers})

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Forwards in the block count; no hook is left after it, also after an exception."""
        for counter in self.counters.values():
            counter.real = None
        # The model itself is called, or its backbone alone by losses that never make logits, or by PEFT's wrappers.
        inner = unwrapped(self.model)
        called = {id(module): module for module in (self.model, inner, _backbone(inner))}
        with ExitStack() as stack:
            stack.enter_context(watching(self._watched(parent, layer) for parent, layer in self.layers))
            for module in called.values():
                stack.callback(module.register_forward_pre_hook(self._see_mask, with_kwargs=True).remove)
            yield

    def drift(self) -> dict[str, float]:
        """What to log, with the counts of all processes, and start anew; every process must call it."""
        totals = {path: counter.totals() for path, counter in self.counters.items()}
        top_k = max(counter.top_k for counter in self.counters.values())
        profile = summed(
            RoutingProfile(
                counts={path: counts for path, (counts, _) in totals.items()},
                mass={path: mass for path, (_, mass) in totals.items()},
                num_experts_per_tok=top_k or None,
            )
        )
        self.counters = self._new_counters()
        if profile.num_experts_per_tok is None:
            return {}
        routed = max(int(counts.sum()) for counts in profile.counts.values())
        if routed == 0:
            return {}
        found = routing_drift(profile, self.mask, score=self.score)
        return {
            "routing_jaccard": found.jaccard,
            "routing_coverage": found.coverage,
            "routing_tokens": routed // profile.num_experts_per_tok,
        }

    def _new_counters(self) -> dict[str, DispatchCounter]:
        return {layer.path: DispatchCounter(layer.shape.num_experts, _ADVICE) for _, layer in self.layers}

    def _watched(self, parent: nn.Module, layer: SieveExpertLayer) -> Watched:
        counter = self.counters[layer.path]

        def on_dispatch(expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> None:
            # Off, or another in its place: a reference model's forward.
            if not layer.disable_adapters and self.adapter in layer.active_adapters:
                counter.add(expert_ids, expert_weights)

        return layer.family, layer, parent, on_dispatch

    def _see_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # What the model is given counts; what it hands on inside may have been turned into one mask per query.
        see_mask(self.counters, self.in_decoder, kwargs, given=module is self.model)


def _trained_adapter(trainer: Trainer, layers: list[SieveExpertLayer]) -> str:
    """The name of the adapter that the trainer trains.

    Raises:
        SieveError: none or several, or training runs in a way in which hooks do not see it.
    """
    active = sorted({name for layer in layers for name in layer.active_adapters if name in layer.plans})
    if len(active) != 1:
        raise SieveError(
            f"the trainer's model, a {type(trainer.model).__name__}, has {len(active)} active sieve adapters on expert "
            "layers, expected one whose routing to watch: train a SieveLoraConfig, or leave RoutingDriftCallback out"
        )
    if trainer.args.torch_compile:
        raise SieveError(
            "the trainer has torch_compile=True, expected a model that is not compiled, since compiled code passes by "
            "the hooks that count: leave torch_compile or RoutingDriftCallback out"
        )
    if trainer.args.n_gpu > 1:
        raise SieveError(
            f"the trainer spreads one process over {trainer.args.n_gpu} GPUs, expected one process for each, since "
            "copies of a layer would count at once: start it with accelerate launch or torchrun, or show it one GPU"
        )
    return active[0]


def _backbone(model: nn.Module) -> nn.Module:
    backbone = getattr(model, "base_model", model)
    assert isinstance(backbone, nn.Module)
    return backbone
