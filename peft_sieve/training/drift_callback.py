"""A callback for transformers' `Trainer` that logs how far routing drifts away from the mask during training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import Trainer, TrainerCallback

from ..checks import whole
from ..errors import SieveError
from ..moe.wrappers import is_compiled
from ..routing.counting import DispatchCounter
from ..routing.distributed import summed
from ..routing.drift import routing_drift
from ..routing.plain_model import unwrapped
from ..routing.profile import RoutingProfile
from ..routing.scores import check_score
from ..routing.selection import ExpertSelection
from ..tuners.common.experts.layer import SieveExpertLayer
from ..tuners.common.traffic import Traffic
from .trainers import check_hooks_see, check_same_trainer, check_trainer, wrap_method

_NAME = "drift"
_ADVICE = "Train with per_device_train_batch_size=1, or leave RoutingDriftCallback out"
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
    - `routing_coverage`: share of this traffic that the selected experts got; mean over layers.
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
        SieveError: no sieve adapter is being trained, or one without selected experts, or its routing cannot be
            counted; also when training begins.
    """

    def __init__(self, trainer: Trainer, *, every: int = 10) -> None:
        check_trainer(self, trainer)
        self.every = whole("every", every)
        self.trainer = trainer
        self._restore = ExitStack()
        self._traffic = _DriftTraffic(trainer, every)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start anew; also after a run that an exception ended."""
        check_same_trainer(self, state)
        self._restore.close()
        self._traffic = _DriftTraffic(self.trainer, self.every)
        self._restore.callback(wrap_method(self.trainer, "compute_loss", self._traffic.during))
        self._restore.callback(wrap_method(self.trainer, "log", self._with_drift))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the Trainer its method back, and count no more."""
        self._restore.close()

    def _with_drift(self, log: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if _TRAINING_ENTRY in logs:  # every process is here, having just shared its loss
            logs.update(self._traffic.drift())
        return log(logs, *args, **kwargs)


class _DriftTraffic(Traffic):
    """What the routers of the adapted layers dispatch while a trainer trains, on every so many-th step.

    Raises:
        SieveError: there is nothing to count, or no way to do so.
    """

    def __init__(self, trainer: Trainer, every: int) -> None:
        model: Any = trainer.model
        self.model, self.trainer, self.every = unwrapped(model), trainer, every
        super().__init__(self.model, SieveExpertLayer)
        self.adapter = _trained_adapter(trainer, [layer for _, layer in self.layers])
        self.layers = [(parent, layer) for parent, layer in self.layers if self.adapter in layer.plans]
        if not any(self.mask.values()):
            raise SieveError(
                f"Adapter '{self.adapter}' has no selected experts that routing could drift away from: all experts of "
                "a layer share one adapter. Leave RoutingDriftCallback out."
            )
        score: str = model.peft_config[self.adapter].score
        self.score = _OVER_TOKENS.get(score, score)
        check_score(self.score)
        self.counters = self._new_counters()

    def during(self, compute_loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute a loss, and count meanwhile if this is a step that counts; no hook is left, also after an error."""
        if self.trainer.state.global_step % self.every:
            return compute_loss(*args, **kwargs)
        self.hang_on(self.model, _NAME)
        try:
            return compute_loss(*args, **kwargs)
        finally:
            self.take_off(self.model, _NAME)

    def counter(self, layer: SieveExpertLayer) -> DispatchCounter:
        return self.counters[layer.path]

    def counts(self, layer: SieveExpertLayer) -> bool:
        # Off, or another in its place: a reference model's forward.
        return not layer.disable_adapters and self.adapter in layer.active_adapters

    @property
    def mask(self) -> ExpertSelection:
        """The experts that have an adapter of their own now; EPnG changes them in training."""
        return ExpertSelection({layer.path: layer.plans[self.adapter].experts for _, layer in self.layers})

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


def _trained_adapter(trainer: Trainer, layers: list[SieveExpertLayer]) -> str:
    """The name of the adapter that the trainer trains.

    Raises:
        SieveError: none or several, or training runs in a way in which hooks do not see it.
    """
    active = sorted({name for layer in layers for name in layer.active_adapters if name in layer.plans})
    if len(active) != 1:
        raise SieveError(
            f"The trainer's model, a {type(trainer.model).__name__}, has {len(active)} active sieve adapters on expert "
            "layers, not one. Train a SieveLoraConfig, or leave RoutingDriftCallback out."
        )
    check_hooks_see(trainer.args, "RoutingDriftCallback")
    if is_compiled(trainer.model):  # type: ignore[arg-type]
        raise SieveError(
            "RoutingDriftCallback does not support a compiled model: compiled code passes by the hooks that count the "
            "routing. Leave it out, or train without torch.compile."
        )
    return active[0]
