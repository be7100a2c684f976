"""Related methods at the parameters of the hot quarter: the tasks, rows, steps and seeds of the study.

    python -m benchmarks.study.methods --data FOLDER

Attention and router have the study's LoRA wherever a method leaves them to LoRA. PERFT has adapters beside MoE blocks
only, and spends the whole budget there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch.optim import Optimizer
from transformers import set_seed

from peft_sieve import EpngConfig, PerftConfig, SieveLoraConfig, hellora_config, select_experts, warm_up_profile

from .run import LoadedTask, run_from_command_line
from .settings import Settings
from .training import base_model, order_of_rows, scores, train

ROWS = Path(__file__).with_name("methods.jsonl")
HOT = 8  # experts a layer, of 32, that have the study's rank in the condition that sets the budget
NUM_EXPERTS = 32
# Everything but the experts keeps the study's rank and scaling.
OUTSIDE = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate")


@dataclass(frozen=True)
class Method:
    """Attributes:
    label: in tables.
    build: (task, seed) -> the model, ready to train.
    after_step: (model, step, optimizer), for methods that change while they train.
    learning_rate: for all tasks. The study's, unless on training rows left out (`learning_rate.py`) twice of it was
        better by more than the study's margin in the mean of the tasks.
    """

    label: str
    build: Callable[[LoadedTask, int], PeftModel]
    after_step: Callable[[PeftModel, int, Optimizer], None] | None = None
    learning_rate: float = Settings().learning_rate


def lora_settings(settings: Settings, rank: int) -> dict[str, Any]:
    """LoRA of another rank on experts, and of the study's outside of them; the scaling is the same everywhere."""
    scaling = settings.lora_alpha / settings.r
    return {
        "r": rank,
        "lora_alpha": round(scaling * rank),
        "rank_pattern": dict.fromkeys(OUTSIDE, settings.r),
        "alpha_pattern": dict.fromkeys(OUTSIDE, settings.lora_alpha),
        "lora_dropout": 0.0,
        "task_type": "CAUSAL_LM",
    }


def hot(at: LoadedTask, seed: int) -> PeftModel:
    mask = select_experts(at.profile, top_k=HOT).to_dict()
    return get_peft_model(
        base_model(at.settings), SieveLoraConfig(selected_experts=mask, **lora_settings(at.settings, at.settings.r))
    )


def uniform(at: LoadedTask, seed: int) -> PeftModel:
    mask = select_experts(at.profile, top_k=NUM_EXPERTS).to_dict()
    rank = at.settings.r * HOT // NUM_EXPERTS
    return get_peft_model(
        base_model(at.settings), SieveLoraConfig(selected_experts=mask, **lora_settings(at.settings, rank))
    )


def hellora(at: LoadedTask, seed: int) -> PeftModel:
    """As many experts as a token goes to, counted while LoRA warms up on a tenth of the run's rows."""
    model = base_model(at.settings)
    rows = at.data.train.select(order_of_rows(at.data, seed, at.settings))
    profile = warm_up_profile(
        model,
        rows,
        fraction=0.1,
        config=SieveLoraConfig(r=at.settings.r, lora_alpha=at.settings.lora_alpha, lora_dropout=0.0),
        tokenizer=at.tokenizer,
        seed=seed,
        progress=False,
    )
    set_seed(seed)
    assert profile.num_experts_per_tok is not None
    rank = at.settings.r * HOT // profile.num_experts_per_tok
    return get_peft_model(model, hellora_config(profile, **lora_settings(at.settings, rank)))


def esft(at: LoadedTask, seed: int) -> PeftModel:
    """ESFT's choice for LoRA, with the largest share for which the study's rank does not exceed the budget."""
    affordable = HOT * len(at.profile.counts)
    mask: dict[str, list[int]] = {}
    for percent in range(1, 100):
        larger = select_experts(at.profile, strategy="cumulative", score="esft_gate", top_p=percent / 100).to_dict()
        if sum(map(len, larger.values())) > affordable:
            break
        mask = larger
    settings = lora_settings(at.settings, at.settings.r)
    return get_peft_model(base_model(at.settings), SieveLoraConfig(selected_experts=mask, **settings))


def epng(at: LoadedTask, seed: int) -> PeftModel:
    """From a low rank on all experts; ranks move every fourth step, in the first two thirds of the training."""
    config = EpngConfig(
        warmup_steps=8,
        update_interval=4,
        update_until=32,
        **lora_settings(at.settings, at.settings.r * HOT // NUM_EXPERTS),
    )
    return get_peft_model(base_model(at.settings), config)


def update_ranks(model: PeftModel, step: int, optimizer: Optimizer) -> None:
    model.base_model.update_and_allocate(step)


def perft(at: LoadedTask, seed: int, **options: Any) -> PeftModel:
    scaling = at.settings.lora_alpha / at.settings.r
    config = PerftConfig(alpha=scaling * options["r"], dropout=0.0, task_type="CAUSAL_LM", **options)
    return get_peft_model(base_model(at.settings), config)


def perft_hot(at: LoadedTask, seed: int) -> PeftModel:
    return perft(at, seed, variant="E", r=42, selected_experts=select_experts(at.profile, top_k=HOT).to_dict())


# PERFT's ranks are the highest within the budget, of 519,168 parameters.
METHODS = {
    "hot_25": Method("hot 25%", hot),
    "uniform": Method("uniform LoRA: all experts, rank 4", uniform),
    "hellora": Method("HELLoRA: 4 experts, rank 32", hellora),
    "esft": Method("ESFT-selected LoRA", esft),
    "epng": Method("EPnG: from all experts, rank 4", epng, update_ranks),
    "perft_r": Method("PERFT-R: 8 adapters, top-2", partial(perft, variant="R", r=41, num_adapters=8)),
    "perft_e": Method("PERFT-E: 32 adapters", partial(perft, variant="E", r=10), learning_rate=1e-2),
    "perft_e_hot": Method("PERFT-E: hot 25%", perft_hot),
}


def run_method(method: Method, at: LoadedTask, seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    settings = dataclasses.replace(at.settings, learning_rate=method.learning_rate)
    set_seed(seed)
    model = method.build(at, seed)
    budget = model.get_nb_trainable_parameters()[0]
    after_step = partial(method.after_step, model) if method.after_step else None
    train(model, at.data, seed, at.tokenizer, settings, after_step=after_step)
    found = scores(model, at.data, at.tokenizer)
    return {
        **found,
        "trainable_at_start": budget,
        "learning_rate": method.learning_rate,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    run_from_command_line(__doc__, {name: partial(run_method, method) for name, method in METHODS.items()}, ROWS)


if __name__ == "__main__":
    main()
