"""Where does the time of a training step go?

Sums what PyTorch's profiler says each operation took by itself, by kind, for one step of each method after two others.
The rest is Python, autograd's bookkeeping and waiting for memory. On a GPU the times are those of its kernels.

    python benchmarks/bench_profile.py [--methods floor sieve_25 peft_all_grouped] [--quick]

An earlier state of the package, in another checkout:

    PYTHONPATH=../checkout python benchmarks/bench_profile.py --methods sieve_25
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from common import Rows, arguments, device, output_of, probability, timed
from methods import METHODS, Bench
from settings import add_setting_argument, chosen
from torch.profiler import ProfilerActivity, profile
from training import training_step

# Kind -> beginnings of operations' names, the first match counts.
KINDS = {
    "products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_grouped_mm",
        "cutlass",
        "_multiply_k",
    ),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "flash", "pytorch_flash"),
    "rows in and out of order": (
        "aten::index",
        "aten::_index_put",
        "aten::gather",
        "aten::scatter",
        "aten::_embedding_bag",
        "aten::sort",
    ),
    "dropout": ("aten::bernoulli", "aten::native_dropout"),
    "activations": ("aten::silu", "aten::sigmoid", "aten::_softmax", "aten::_log_softmax"),
    "copies and fills": ("aten::copy", "aten::fill", "aten::cat", "aten::zero", "aten::clone", "aten::stack"),
    "optimizer": ("aten::_fused_adam",),
    "additions and multiplications": ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::sum", "aten::pow"),
}
REST = "rest"


def kind_of(operation: str) -> str:
    return next((kind for kind, names in KINDS.items() if operation.startswith(names)), REST)


def seconds_by_kind(step: Callable[[], None]) -> dict[str, float]:
    on_gpu = device() == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        whole = timed(step)
    spent = dict.fromkeys([*KINDS, REST], 0.0)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[kind_of(event.key)] += microseconds / 1e6
    if not on_gpu:
        # Functions in Python appear in the profile, too: count by what is left.
        spent[REST] = whole - sum(seconds for kind, seconds in spent.items() if kind != REST)
    return spent


def medians(runs: Iterable[dict[str, float]]) -> dict[str, float]:
    runs = list(runs)
    return {kind: round(statistics.median(run[kind] for run in runs), 4) for kind in runs[0]}


def main() -> None:
    parser = arguments(__doc__, "profile.jsonl", repeats=3)
    add_setting_argument(parser)
    parser.add_argument(
        "--methods", nargs="+", choices=sorted(METHODS), default=["floor", "sieve_25", "peft_all_grouped"]
    )
    parser.add_argument("--dropout", type=probability, default=0.05, help="of the adapters, default 0.05")
    args = parser.parse_args()
    rows = Rows("profile", output_of(args), quick=args.quick)
    for setting in chosen(args)[:1]:
        bench = Bench.of(setting, args.dropout)
        steps = {method: training_step(bench.build(method), bench.batch)[0] for method in args.methods}
        for step in steps.values():
            step()
            step()
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in steps}
        for _ in range(args.repeats):
            for method, step in steps.items():
                runs[method].append(seconds_by_kind(step))
        found: dict[str, Any] = {method: medians(runs[method]) for method in steps}
        print(f"\n{setting.name}, seconds of a step")
        print(f"  {'':32s}" + "".join(f"{method:>18s}" for method in found))
        for kind in [*KINDS, REST]:
            print(f"  {kind:32s}" + "".join(f"{found[method][kind]:18.3f}" for method in found))
        print(f"  {'sum':32s}" + "".join(f"{sum(found[method].values()):18.3f}" for method in found))
        for method in found:
            rows.write({**setting.described(), "method": method, "seconds": found[method], "repeats": args.repeats})


if __name__ == "__main__":
    main()
