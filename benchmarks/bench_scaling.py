"""How do time and memory of a step grow with the adapted experts, rank, sequence, number of experts and batch?

One thing is changed at a time, the rest is as in the base setting. Each row has the sieve's step beside the floor's
(no expert adapters), timed in turn, and the memory above the floor. More experts come at equal active size: each token
still goes to 8 of the same width; a quarter of them is adapted.

    python benchmarks/bench_scaling.py [--axes k rank] [--repeats 3] [--quick]
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from bench_memory import above
from common import Rows, arguments, device, interleaved, output_of, percentiles, probability, ratios
from memory import adapter_bytes, peak_bytes
from methods import Bench, trainable_counts
from settings import SETTINGS, Setting, tiny
from training import training_step

from peft_sieve.kernels import reused_memory

# A layer or two are enough, since what is asked is how a layer's cost grows; a small vocabulary keeps the head out.
BASES = {
    "cpu": replace(SETTINGS["cpu"], model="OLMoE-shaped", layers=1, vocab=1024),
    "cuda": replace(SETTINGS["olmoe"], model="OLMoE-1B-7B", layers=2, vocab=4096),
}
AXES: dict[str, list[int]] = {
    "k": [4, 8, 16, 32, 64],
    "rank": [4, 8, 16, 32, 64, 128],
    "length": [256, 512, 1024, 2048, 4096, 8192],
    "experts": [16, 32, 64, 128, 256, 512],
    "batch": [1, 2, 4, 8],
}
QUICK = {"k": [4, 64], "rank": [4, 8], "length": [32, 64], "experts": [16, 64], "batch": [1, 2]}


def changed(base: Setting, axis: str, value: int) -> Setting:
    if axis == "k":
        return base
    # One sequence, so that the longest ones fit.
    return replace(base, **{axis: value}, **({"batch": 1} if axis == "length" else {}))


def measure(base: Setting, axis: str, value: int, dropout: float, repeats: int) -> dict[str, Any]:
    setting = changed(base, axis, value)
    reused_memory.release()  # of the size that the setting before needed
    bench = Bench.of(setting, dropout)
    models = {
        "floor": bench.build("floor"),
        "sieve": bench.build("sieve_25", top_k=value) if axis == "k" else bench.build("sieve_25"),
    }
    steps = {name: training_step(model, bench.batch) for name, model in models.items()}
    seconds = interleaved({name: step for name, (step, _) in steps.items()}, repeats)
    found = {}
    for name, (step, optimizer) in steps.items():
        found[name] = {
            "peak_bytes": peak_bytes(step, models[name], optimizer, bench.batch),
            "adapter_bytes": adapter_bytes(models[name]),
        }
    if setting.device == "cuda":
        # The allocator counts what the other model holds, too: on the floor's side, the sieve's parameters and states.
        found["floor"]["peak_bytes"] -= held_bytes(models["sieve"], steps["sieve"][1])
        found["sieve"]["peak_bytes"] -= held_bytes(models["floor"], steps["floor"][1])
    return {
        **setting.described(),
        "base": base.name,
        "axis": axis,
        "value": value,
        "dropout": dropout,
        **bench.skew(),
        **trainable_counts(models["sieve"]),
        **percentiles(seconds["floor"], "floor_seconds"),
        **percentiles(seconds["sieve"], "seconds"),
        **percentiles(ratios(seconds, "sieve", "floor"), "ratio"),
        **found["sieve"],
        "floor_peak_bytes": found["floor"]["peak_bytes"],
        "frozen_bytes": sum(parameter.nbytes for parameter in bench.base.parameters()),
        **above(found["sieve"], found["floor"]),
        "repeats": repeats,
    }


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What a model holds between its steps beyond the shared frozen weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [value for p in trained for value in optimizer.state[p].values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in (*trained, *states) if tensor.is_cuda)


def main() -> None:
    parser = arguments(__doc__, "scaling.jsonl", repeats=3)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), metavar="AXIS")
    parser.add_argument("--dropout", type=probability, default=0.05, help="of the adapters, default 0.05")
    args = parser.parse_args()
    base = tiny(BASES[device()]) if args.quick else BASES[device()]
    rows = Rows("scaling", output_of(args), quick=args.quick)
    for axis in args.axes:
        print(f"\n{base.name}: {axis}")
        print(f"  {'':>6s} {'floor s':>9s} {'sieve s':>9s} {'ratio':>7s} {'above floor MiB':>16s} {'needed MiB':>11s}")
        for value in (QUICK if args.quick else AXES)[axis]:
            try:
                row = measure(base, axis, value, args.dropout, 2 if args.quick else args.repeats)
            except torch.OutOfMemoryError:
                print(f"  {value:6d} does not fit")
                continue
            finally:
                gc.collect()
            rows.write(row)
            print(
                f"  {value:6d} {row['floor_seconds_p50']:9.4f} {row['seconds_p50']:9.4f} {row['ratio_p50']:7.3f} "
                f"{row['extra_bytes'] / 2**20:16.1f} {row['adapter_bytes'] / 2**20:11.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
