"""One run: a fresh model, adapters on the experts of a condition, training, and what it scores on held-out rows."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup, set_seed

from examples.quickstart import measure, tokenized
from peft_sieve import RoutingProfile, SieveExpertLayer, SieveLoraConfig

from .conditions import Condition, Mask
from .settings import Settings
from .step_selection import StepSelection
from .tasks import TaskData


def base_model(settings: Settings) -> Any:
    return AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)


def run(
    data: TaskData, profile: RoutingProfile, condition: Condition, seed: int, tokenizer: Any, settings: Settings
) -> dict[str, Any]:
    """Train and evaluate; the seed gives the adapters' first values, the order of the rows and random choices."""
    start = time.perf_counter()
    mask = condition.choose(profile, seed)
    model = adapted(mask, seed, settings)
    selection = StepSelection(model, settings.hot) if condition.per_step else None
    train(model, data, seed, tokenizer, settings, selection)
    return {
        **scores(model, data, tokenizer),
        "experts_per_layer": sum(map(len, mask.values())) / len(mask),
        "coverage": _mean_coverage(profile, mask),
        "seconds": round(time.perf_counter() - start, 1),
    }


def scores(model: PeftModel, data: TaskData, tokenizer: Any) -> dict[str, Any]:
    """What a trained model achieves on held-out rows, and how many parameters it trained."""
    loss, next_token, whole = measure(model, tokenizer, data.held_out)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return {
        "loss": loss,
        "next_token": next_token,
        "whole": whole,
        "trainable": sum(sizes.values()),
        "trainable_experts": sum(size for name, size in sizes.items() if ".experts." in name),
    }


def adapted(mask: Mask, seed: int, settings: Settings, **options: Any) -> PeftModel:
    """The model with new adapters.

    Whatever is outside of the experts gets the same first values in every condition of a seed. So does an expert's own
    adapter, if it has the study's rank and shares no factor.

    Args:
        options: of `SieveLoraConfig`.
    """
    shared = options.get("cold_experts") == "shared"
    set_seed(seed)
    # A router has an adapter only if an expert of its layer has. A new one adds zero, and a frozen one stays so.
    masked = {layer: experts if experts or shared else [0] for layer, experts in mask.items()}
    model = get_peft_model(base_model(settings), lora_config(settings, masked, **options))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SieveExpertLayer)}
    num_experts = next(iter(layers.values())).shape.num_experts
    set_seed(seed)
    everything = {layer: list(range(num_experts)) for layer in mask}
    values = dict(get_peft_model(base_model(settings), lora_config(settings, everything)).named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layers.get(name.partition(".lora_")[0])
        if layer is None:
            parameter.data.copy_(values[name])
            continue
        plan = layer.plans["default"]
        if not plan.share_outer and parameter.shape[1:] == values[name].shape[1:]:
            parameter.data[: len(plan.experts)] = values[name][list(plan.experts)]
        parameter.requires_grad_(shared or bool(mask[layer.path]))
    return model


def lora_config(settings: Settings, selected_experts: Mask, **options: Any) -> SieveLoraConfig:
    """The study's LoRA on these experts; `options` add to it."""
    return SieveLoraConfig(
        selected_experts=dict(selected_experts),
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,  # no row is seen twice
        task_type="CAUSAL_LM",
        **options,
    )


def order_of_rows(data: TaskData, seed: int, settings: Settings) -> list[int]:
    """The training rows that a run sees, batch after batch."""
    return random.Random(f"{seed}:order").sample(range(len(data.train)), settings.steps * settings.batch_size)


def train(
    model: PeftModel,
    data: TaskData,
    seed: int,
    tokenizer: Any,
    settings: Settings,
    selection: StepSelection | None = None,
    after_step: Callable[[int, Optimizer], None] | None = None,
) -> None:
    """AdamW without weight decay on the model's own loss of the completions, its load-balancing term included.

    Args:
        selection: of experts anew at every step.
        after_step: gets the number of the step, from 1 on, and the optimizer, before gradients are cleared.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    with selection.watching() if selection else nullcontext():
        batches = data.train.select(order_of_rows(data, seed, settings)).iter(batch_size=settings.batch_size)
        for step, batch in enumerate(batches, start=1):
            inputs, in_completion = tokenized(tokenizer, batch)
            labels = inputs["input_ids"].masked_fill(~in_completion, -100)
            if selection:
                selection.begin(inputs["attention_mask"])
            model(**inputs, labels=labels, use_cache=False).loss.backward()
            with selection.applied() if selection else nullcontext():
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                optimizer.step()
            schedule.step()
            if after_step:
                after_step(step, optimizer)
            optimizer.zero_grad()


def _mean_coverage(profile: RoutingProfile, mask: Mask) -> float:
    """Share of the calibration tokens that the mask's experts receive, mean over the layers."""
    shares = [counts[list(mask[layer])].sum() / counts.sum() for layer, counts in profile.counts.items()]
    return float(sum(shares) / len(shares))
