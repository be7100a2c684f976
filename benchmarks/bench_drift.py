"""What does RoutingDriftCallback cost, against the same Trainer without it?

Two Trainers, on models that share their frozen weights and on the same batches, run in turn, so that they meet the same
noise. One has the callback count on every step, which is where it costs most: the excess of that step, divided by the
callback's default of steps from one count to the next, is the share of the run. The goal is below 1%.

    python benchmarks/bench_drift.py [--settings cpu] [--repeats 7] [--quick]
"""

from __future__ import annotations

import gc
import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from common import Rows, arguments, device, interleaved, output_of, percentiles, ratios
from methods import Bench
from settings import Setting, add_setting_argument, chosen
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_sieve import RoutingDriftCallback

DEFAULT_EVERY: int = inspect.signature(RoutingDriftCallback).parameters["every"].default


class Samples(Dataset):  # type: ignore[type-arg]
    """The rows of a batch, each second one with a last quarter of padding."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids.cpu()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        mask = torch.ones_like(ids)
        if index % 2:
            mask[-len(ids) // 4 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step_of(bench: Bench, folder: str, watched: bool) -> Callable[[], None]:
    """One optimizer step of a Trainer, and its log, as often as it is called."""
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=bench.setting.batch,
        learning_rate=1e-6,  # so that the routing stays what it was set to be
        report_to="none",
        use_cpu=bench.setting.device == "cpu",
    )
    trainer = Trainer(bench.build("sieve_25"), args, train_dataset=Samples(bench.batch["input_ids"]))
    trainer.callback_handler.callbacks.clear()  # none that prints
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.current_gradient_accumulation_steps = 1  # the training loop, which does not run here, sets it
    (batch,) = trainer.get_train_dataloader()
    if watched:
        # The trainer's count of steps stays at 0, so that every one of them is counted.
        RoutingDriftCallback(trainer).on_train_begin(args, trainer.state, trainer.control)

    def step() -> None:
        loss = trainer.training_step(trainer.model, dict(batch))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        logs = {"loss": loss.item()}
        trainer.log(logs)
        assert ("routing_jaccard" in logs) is watched

    return step


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    bench = Bench.of(setting, dropout=0.05)
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: step_of(bench, folder, name == "counted") for name in ("plain", "counted")}
        seconds = interleaved(steps, repeats)
    found = ratios(seconds, "counted", "plain")
    return {
        **setting.described(),
        "every": DEFAULT_EVERY,
        **percentiles(seconds["plain"], "plain_seconds"),
        **percentiles(seconds["counted"], "counted_seconds"),
        **percentiles(found, "ratio"),
        **percentiles([(ratio - 1) / DEFAULT_EVERY for ratio in found], "share_of_run", digits=2),
        "repeats": repeats,
    }


def main() -> None:
    parser = arguments(__doc__, "drift.jsonl", repeats=7)
    add_setting_argument(parser)
    args = parser.parse_args()
    rows = Rows("drift", output_of(args), quick=args.quick)
    for setting in chosen(args):
        row = measure(setting, 3 if args.quick else args.repeats)
        rows.write(row)
        print(
            f"{setting.name}: plain {row['plain_seconds_p50']:.3f} s, a counted and logged step "
            f"{row['counted_seconds_p50']:.3f} s, ratio p20 {row['ratio_p20']:.4f}  p50 {row['ratio_p50']:.4f}  "
            f"p80 {row['ratio_p80']:.4f}; every {DEFAULT_EVERY} steps {row['share_of_run_p50']:.2%} of the run",
            flush=True,
        )
        gc.collect()
        if device() == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
