"""`SieveLoraConfig`: LoRA's options, plus how to choose the experts that get an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftType

from ...checks import choice, flags, must_be, number, quoted, share, shown, whole
from ...errors import SieveError
from ...moe.families.family import PROJECTIONS
from ..common.config import SelectionConfig
from ..common.peft_settings import check_names, check_patterns, rank

# LoRA options that are not supported for adapters inside a stack of experts, and the values that they may have.
_REFUSED = {
    **dict.fromkeys(("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora"), False),
    **dict.fromkeys(("use_bdlora", "megatron_config", "layer_replication", "alora_invocation_tokens", "velora_config")),
    **dict.fromkeys(("kasa_config", "monteclora_config", "arrow_config", "eva_config", "corda_config")),
    "lora_ga_config": None,
}


@dataclass
class SieveLoraConfig(SelectionConfig, LoraConfig):
    """LoRA on the experts that a task uses, and on attention, router and shared experts (MoE-Sieve, arXiv 2603.24044).

    It takes what `peft.LoraConfig` takes, and:

    Args:
        r: rank.
        lora_alpha: the scaling is `lora_alpha / r`.
        lora_dropout: on expert adapters, too; the three are the recipe of the paper. The adapter of a router that is a
            bare parameter takes no dropout.
        top_k_frac: share of each layer's routed experts to adapt, in (0, 1]; `max(1, round(top_k_frac * num_experts))`.
        top_k: the same as a count; wins over `top_k_frac`.
        strategy: "uniform", "greedy" (same total budget, largest coverage gain first, Appendix C), "coverage" (fewest
            experts per layer that reach `coverage`), "cumulative" (highest scores of each layer until their sum reaches
            `top_p`; ESFT, arXiv 2407.01906) or "random" (control).
        score: "count" (tokens routed), "mass" (summed gate weight), "esft_gate" or "esft_token" (the same as averages
            over samples).
        coverage: target of the "coverage" strategy, in (0, 1].
        top_p: target of the "cumulative" strategy, in (0, 1]; None is 0.1 for "esft_gate" and 0.2 for "esft_token".
        expert_projections: which of "gate_proj", "up_proj", "down_proj" get an adapter; None is all.
        train_attention: adapt the attention, which every token passes. `target_modules`, if given, replaces this and
            the next two for linear layers (a router whose weight is a bare parameter, as in most models of
            transformers 5, still follows `train_router`, unless `target_modules` names it).
        train_router: adapt the router.
        train_shared_experts: adapt the shared experts.
        expert_tuning: "lora", or "full": the selected experts' own weights are trained, as a difference to the base's
            that has their shape and begins at zero; r, alpha and dropout do not apply to them (ESFT, arXiv 2407.01906).
        cold_experts: what the experts outside the selection get: "frozen" is nothing, as in the paper; "shared" is one
            adapter per layer that they all use, trained on all their tokens. An empty list of `selected_experts` then
            has all experts of the layer use it.
        share_outer: A of gate and up, which read the layer's input, and B of down, which writes its output, are one
            per layer instead of one per expert (shared-outer LoRA). Only the inner factors stay per expert.
        hellori_density: HELLoRI (arXiv 2605.18795): A of the experts' adapters is frozen, and of B only this share, in
            (0, 1], drawn with `hellori_seed`, is trained, the rest being zero. None trains all of both.
        calib_dataset: what to profile the routing on: Hub id or local file, `datasets.Dataset`, list of strings or
            dicts (`text`, `messages`, `prompt` + `completion`, `input_ids`), or model-ready batches. Runtime only.
        calib_tokenizer: tokenizer, or a name or path of one; None takes the one saved with the model. Runtime only.
        calib_formatting_func: row -> str, for rows in another form. Runtime only.
        calib_split: the split to read, where there are several.
        calib_samples: rows to profile; drawn at random where there are more.
        calib_max_length: tokens of a row; the rest is cut off.
        calib_batch_size: rows of a forward pass.
        calib_seed: of the drawing.
        calib_stability: None profiles all samples. A share in (0, 1] stops as soon as two halves of the samples so far
            select the same experts to at least this Jaccard similarity in every layer, and warns if they never do.
        selected_experts: the mask, experts-module path -> expert ids. Filled by calibration and saved in
            `adapter_config.json`; if given, nothing is calibrated.
        calibration: where the mask came from. Filled by calibration and saved.
        expert_shapes: experts-module path -> [num_experts, hidden_size, intermediate_size] of the model that the mask
            belongs to. Filled at injection and saved, so that another model is refused.

    Raises:
        SieveError: an option has a value that cannot work; the text says which one, and what would.
    """

    r: int = field(default=32, metadata={"help": "Rank of every adapter."})
    lora_alpha: int = field(default=64, metadata={"help": "Adapter output is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of every adapter."})
    expert_projections: list[str] | None = field(
        default=None, metadata={"help": "Which of gate_proj, up_proj, down_proj get an adapter; None is all."}
    )
    train_attention: bool = field(default=True, metadata={"help": "Adapt the attention projections."})
    train_router: bool = field(default=True, metadata={"help": "Adapt the router."})
    train_shared_experts: bool = field(default=True, metadata={"help": "Adapt the shared experts."})
    expert_tuning: str = field(default="lora", metadata={"help": "lora, or full for the experts' own weights."})
    cold_experts: str = field(
        default="frozen",
        metadata={"help": "Experts outside the selection: frozen, or shared for one adapter together."},
    )
    share_outer: bool = field(
        default=False, metadata={"help": "One A of gate and up, and one B of down, per layer instead of per expert."}
    )
    hellori_density: float | None = field(
        default=None, metadata={"help": "Train this share of the expert adapters' B, and nothing of their A (HELLoRI)."}
    )
    hellori_seed: int = field(default=0, metadata={"help": "Seed of the share that hellori_density trains."})

    def __post_init__(self, calib_dataset: Any, calib_tokenizer: Any, calib_formatting_func: Any) -> None:
        self._check_lora()
        super().__post_init__()
        self.peft_type = PeftType("SIEVE_LORA")
        self._check_selection(calib_dataset, calib_tokenizer, calib_formatting_func)
        self._check_expert_tuning()
        self.expert_projections = _checked_projections(self.expert_projections)

    def adapts(self, experts: Sequence[int]) -> bool:
        return bool(experts) or self.cold_experts == "shared"

    def _check_lora(self) -> None:
        for name, neutral in _REFUSED.items():
            value = getattr(self, name, neutral)
            if value not in (neutral, None, False):  # an empty mapping switches on, too
                raise SieveError(f"{name}={shown(value)} is not supported for expert adapters. Leave it at {neutral}.")
        choice("init_lora_weights", self.init_lora_weights, (True, False, "gaussian"))
        self.r = rank("r", self.r)
        check_names(self)
        check_patterns(self)
        flags(self, ("train_attention", "train_router", "train_shared_experts", "use_rslora", "share_outer"))
        choice("cold_experts", self.cold_experts, ("frozen", "shared"))
        choice("bias", self.bias, ("none", "all", "lora_only"))
        number("lora_alpha", self.lora_alpha, lambda alpha: alpha != 0, "a finite, non-zero number")
        number("lora_dropout", self.lora_dropout, lambda p: 0 <= p < 1, "a number in [0, 1)")

    def _check_expert_tuning(self) -> None:
        choice("expert_tuning", self.expert_tuning, ("lora", "full"))
        self.hellori_seed = whole("hellori_seed", self.hellori_seed, least=None)
        if self.expert_tuning == "full":
            for name, value, only in (
                ("hellori_density", self.hellori_density, None),
                ("cold_experts", self.cold_experts, "frozen"),
                ("share_outer", self.share_outer, False),
            ):
                if value != only:
                    raise SieveError(
                        f"{name}={value!r} is not supported with expert_tuning='full', which has no factors. Leave "
                        "one of them out."
                    )
        if self.hellori_density is None:
            return
        self.hellori_density = share("hellori_density", self.hellori_density)
        if self.share_outer:
            raise SieveError(
                "hellori_density is not supported with share_outer=True: it trains a share of each expert's own B. "
                "Leave one of them out."
            )


def _checked_projections(value: Any) -> list[str] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    if not names or any(name not in PROJECTIONS for name in names):
        raise must_be("expert_projections", f"one or more of {quoted(PROJECTIONS)}, or None for all", value)
    return [name for name in PROJECTIONS if name in names]
