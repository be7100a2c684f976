"""What does a training step cost, against one that adapts no expert at all?

All methods run in one process, in turn, on the same frozen weights. The floor has LoRA on attention, router and shared
expert only, and transformers' own experts; a ratio is taken round by round. Dropout is the package's default for every
adapter that can have one: PEFT's on stacks of experts cannot, which is in its favour.

    python benchmarks/bench_step.py [--settings cpu] [--methods floor sieve_25] [--repeats 7] [--quick]
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from common import Rows, arguments, device, interleaved, output_of, percentiles, probability, ratios
from methods import METHODS, Bench, trainable_counts
from settings import Setting, add_setting_argument, chosen
from training import training_step

PEER = "peft_all_grouped"


def prepared(bench: Bench, methods: list[str]) -> tuple[dict[str, Callable[[], None]], dict[str, dict[str, int]]]:
    """A step of each method, tried out, and its parameters counted; methods that do not fit the device are left out."""
    steps: dict[str, Callable[[], None]] = {}
    counts = {}
    for method in methods:
        step = None
        with suppress(torch.OutOfMemoryError):
            model = bench.build(method)
            step, _ = training_step(model, bench.batch)
            step()
            steps[method], counts[method] = step, trainable_counts(model)
        model = step = None
    # Again, when all the others hold their adapters: the ones in front may not fit any more.
    for method in methods:
        fits = False
        if method in steps:
            with suppress(torch.OutOfMemoryError):
                steps[method]()
                fits = True
        if not fits:
            steps.pop(method, None)
            gc.collect()
            torch.cuda.empty_cache()
            print(f"  {method:18s} does not fit beside the others: run it with --methods floor {method}")
    return steps, counts


def measure(setting: Setting, methods: list[str], dropout: float, repeats: int, rows: Rows) -> None:
    bench = Bench.of(setting, dropout)
    skew = bench.skew()
    print(f"\n{setting.name}: the hot quarter of experts receives {skew['coverage_hot_quarter']:.0%} of the tokens")
    steps, counts = prepared(bench, methods)
    if "floor" not in steps:
        print("  not even the floor fits: pass fewer --layers")
        return
    seconds = interleaved(steps, repeats)
    print(f"  {'method':18s} {'s/step':>8s} {'x floor':>8s} {'p20':>7s} {'p80':>7s} {'PEFT/it':>8s} {'trainable':>13s}")
    for method in steps:
        row: dict[str, Any] = {
            **setting.described(),
            "method": method,
            "dropout": dropout,
            **skew,
            **counts[method],
            **percentiles(seconds[method], "seconds"),
            **percentiles(ratios(seconds, method, "floor"), "ratio"),
            "repeats": repeats,
        }
        if PEER in steps:
            row |= percentiles(ratios(seconds, PEER, method), "speedup_over_peft")
        rows.write(row)
        print(
            f"  {method:18s} {row['seconds_p50']:8.4g} {row['ratio_p50']:8.3f} {row['ratio_p20']:7.3f} "
            f"{row['ratio_p80']:7.3f} {row.get('speedup_over_peft_p50', float('nan')):8.2f} {row['trainable']:13,d}",
            flush=True,
        )


def main() -> None:
    parser = arguments(__doc__, "step.jsonl", repeats=7)
    add_setting_argument(parser)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--dropout", type=probability, default=0.05, help="of the adapters, default 0.05")
    args = parser.parse_args()
    methods = list(dict.fromkeys(["floor", *args.methods]))  # everything is relative to it
    rows = Rows("step", output_of(args), quick=args.quick)
    for setting in chosen(args):
        measure(setting, methods, args.dropout, 3 if args.quick else args.repeats, rows)
        gc.collect()
        if device() == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
