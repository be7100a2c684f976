"""What does pruning LoRA experts save, and what does it cost?

Trains mixtures of LoRA experts on the attention of the small MoE model of the examples, on the Spider questions beside
it: once with all experts to the end and the balance loss throughout, and once pruned (DMEP). Both see the same batches.
Then steps of both are timed in turn. Losses are means over the tokens of held-out questions.

    python benchmarks/bench_dmep.py [--seeds 0 1 2] [--thresholds 0.8 0.9] [--repeats 15] [--quick]
"""

from __future__ import annotations

import json
import lzma
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import HERE, Rows, arguments, device, interleaved, output_of, percentiles, positive, ratios
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sieve import LoraMoeConfig

EXAMPLES = HERE.parent / "examples"
MODEL = EXAMPLES / "tiny-olmoe"
LENGTH = 128  # tokens of a sequence; texts are joined
BATCH = 8
RATE = 2e-3


def sequences(name: str) -> torch.Tensor:
    """Questions and queries, end to end, cut into (sequences, LENGTH)."""
    with lzma.open(EXAMPLES / "data" / name, "rt") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = tokenizer.eos_token.join(f"{row['question']}\n{row['query']}" for row in rows)
    ids = torch.tensor(tokenizer(text).input_ids)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH).to(device())


def build(seed: int, **settings: Any) -> PeftModel:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device())
    return get_peft_model(base, LoraMoeConfig(task_type="CAUSAL_LM", **settings))


def training_step(model: PeftModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def trained(data: torch.Tensor, steps: int, seed: int, **settings: Any) -> tuple[PeftModel, torch.optim.Optimizer]:
    model = build(seed, **settings).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    order = random.Random(seed)
    for step in range(1, steps + 1):
        training_step(model, optimizer, data[order.sample(range(len(data)), BATCH)])
        model.update_and_prune(step, optimizer, total_steps=steps)
    return model, optimizer


@torch.no_grad()
def held_out_loss(model: PeftModel, data: torch.Tensor) -> float:
    model.eval()
    total = sum(model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in data.split(BATCH))
    model.train()
    return total / len(data)


def file_size(model: PeftModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def state_size(optimizer: torch.optim.Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def described(model: PeftModel, optimizer: torch.optim.Optimizer, held_out: torch.Tensor) -> dict[str, Any]:
    return {
        "trainable": model.get_nb_trainable_parameters()[0],
        "adapter_bytes": file_size(model),
        "optimizer_bytes": state_size(optimizer),
        "held_out_loss": round(held_out_loss(model, held_out), 4),
    }


def measure(seed: int, thresholds: list[float], steps: int, repeats: int, rows: Rows) -> None:
    data, held_out = sequences("spider_train.jsonl.xz"), sequences("spider_dev.jsonl.xz")
    runs = {"all experts": trained(data, steps, seed, prune_ratio=None)}
    for threshold in thresholds:
        runs[f"threshold {threshold}"] = trained(data, steps, seed, prune_threshold=threshold)
    timed: dict[str, Callable[[], None]] = {
        name: partial(training_step, model, optimizer, data[:BATCH]) for name, (model, optimizer) in runs.items()
    }
    about = {name: described(*run, held_out) for name, run in runs.items()}
    base_loss = _base_loss(runs["all experts"][0], held_out)
    seconds = interleaved(timed, repeats)
    for name, (model, _) in runs.items():
        kept = model.peft_config["default"].kept_experts
        counts = Counter(len(ids) for ids in kept.values()) if kept else None
        saved = 1 - about[name]["trainable"] / about["all experts"]["trainable"]
        faster = [1 / ratio for ratio in ratios(seconds, name, "all experts")]
        rows.write(
            {
                "model": MODEL.name,
                "run": name,
                "seed": seed,
                "steps": steps,
                "batch": BATCH,
                "length": LENGTH,
                **about[name],
                "held_out_loss_base": round(base_loss, 4),
                "trainable_saved": round(saved, 4),
                "layers_by_kept_experts": counts and {str(k): counts[k] for k in sorted(counts)},
                **percentiles(seconds[name], "step_seconds"),
                **percentiles(faster, "throughput"),
                "repeats": repeats,
            }
        )
        layers = dict(sorted(counts.items())) if counts else "-"
        print(
            f"seed {seed}, {name:15s} {about[name]['trainable']:9,} trainable ({saved:.0%} less), held-out loss "
            f"{about[name]['held_out_loss']:.4f} (base {base_loss:.4f}), throughput x"
            f"{percentiles(faster, 't')['t_p50']:.3f}, layers by experts kept {layers}",
            flush=True,
        )


def _base_loss(model: PeftModel, held_out: torch.Tensor) -> float:
    with model.disable_adapter():
        return held_out_loss(model, held_out)


def main() -> None:
    parser = arguments(__doc__, "dmep.jsonl", repeats=15)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run of each kind for each")
    parser.add_argument("--steps", type=positive, default=300, help="training steps, default 300")
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.8, 0.9], help="values of prune_threshold")
    args = parser.parse_args()
    rows = Rows("dmep", output_of(args), quick=args.quick)
    for seed in args.seeds[:1] if args.quick else args.seeds:
        measure(seed, args.thresholds, 20 if args.quick else args.steps, 2 if args.quick else args.repeats, rows)


if __name__ == "__main__":
    main()
