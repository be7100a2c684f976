"""How much memory does a step need above the floor's, and how much of that is unavoidable?

The floor is a step that adapts no expert. What an adapter cannot do without is its parameters, their gradients and
Adam's two states; the ratio says how much more than that it takes at the peak of a step. One method at a time, second
step, when the optimizer has its states.

    python benchmarks/bench_memory.py [--settings cpu] [--methods floor sieve_25] [--quick]
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from common import Rows, arguments, device, output_of, probability
from memory import adapter_bytes, peak_bytes
from methods import METHODS, Bench, trainable_counts
from settings import Setting, add_setting_argument, chosen
from training import training_step

from peft_sieve.kernels import reused_memory


def peak_of(bench: Bench, method: str, **options: Any) -> dict[str, int]:
    """Bytes at the peak of a method's second step, the base model included, and what its expert adapters must have."""
    gc.collect()
    reused_memory.release()
    model = bench.build(method, **options)
    step, optimizer = training_step(model, bench.batch)
    step()
    peak = peak_bytes(step, model, optimizer, bench.batch)
    return {"peak_bytes": peak, "adapter_bytes": adapter_bytes(model), **trainable_counts(model)}


def above(found: dict[str, int], floor: dict[str, int]) -> dict[str, float | None]:
    """For a row: what a method takes above the floor, in bytes and as a multiple of the unavoidable."""
    extra = found["peak_bytes"] - floor["peak_bytes"]
    needed = found["adapter_bytes"]
    return {"extra_bytes": extra, "extra_over_adapter": round(extra / needed, 4) if needed else None}


def measure(setting: Setting, methods: list[str], dropout: float, rows: Rows) -> None:
    bench = Bench.of(setting, dropout)
    peak_of(bench, "floor")  # libraries set workspaces aside when they are first used, and keep them
    print(f"\n{setting.name}")
    print(f"  {'method':18s} {'peak MiB':>10s} {'above floor':>12s} {'adapter+grad+Adam':>18s} {'ratio':>7s}")
    floor: dict[str, int] = {}
    for method in methods:
        try:
            found = peak_of(bench, method)
        except torch.OutOfMemoryError:
            print(f"  {method:18s} does not fit")
            continue
        floor = floor or found
        row = {**setting.described(), "method": method, "dropout": dropout, **bench.skew(), **found}
        row |= above(found, floor)
        rows.write(row)
        ratio = row["extra_over_adapter"]
        print(
            f"  {method:18s} {found['peak_bytes'] / 2**20:10.1f} {row['extra_bytes'] / 2**20:12.2f} "
            f"{found['adapter_bytes'] / 2**20:18.2f} {'' if ratio is None else f'{ratio:.3f}':>7s}",
            flush=True,
        )


def main() -> None:
    parser = arguments(__doc__, "memory.jsonl", repeats=None)
    add_setting_argument(parser)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--dropout", type=probability, default=0.05, help="of the adapters, default 0.05")
    args = parser.parse_args()
    methods = list(dict.fromkeys(["floor", *args.methods]))  # first: everything is relative to it
    rows = Rows("memory", output_of(args), quick=args.quick)
    for setting in chosen(args):
        measure(setting, methods, args.dropout, rows)
        gc.collect()
        if device() == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
