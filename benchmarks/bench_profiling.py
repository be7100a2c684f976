"""What does profiling cost, against a plain forward of the backbone over the same batches?

Both run in one process, in turn, so that they meet the same noise; a row has the 20th, 50th and 80th percentile of the
ratio of each pair. The goal is 1.05. Once over full sequences, once over samples of half to full length with padding.

    python benchmarks/bench_profiling.py [--settings cpu] [--repeats 15] [--quick]
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from common import Rows, arguments, interleaved, output_of, percentiles, ratios
from settings import Setting, add_setting_argument, build_base, chosen

from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing.data.batches import CalibrationData, calibration_batches
from peft_sieve.routing.profiling import profile_batches


def samples(setting: Setting, padded: bool) -> CalibrationData:
    """One batch of the setting's size."""
    shortest = setting.length // 2 if padded else setting.length
    lengths = torch.linspace(setting.length, shortest, setting.batch).long().tolist()
    rows = [{"input_ids": torch.randint(0, setting.vocab, (length,)).tolist()} for length in lengths]
    return calibration_batches(rows, batch_size=setting.batch, max_length=setting.length)


def measure(setting: Setting, padded: bool, repeats: int) -> dict[str, Any]:
    model, _ = build_base(setting)
    model.eval()
    data = samples(setting, padded)
    layers = find_moe_layers(model)
    batches = [{k: v.to(model.device) for k, v in batch.items()} for batch in data.batches]

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model.model(**batch, use_cache=False)

    def profiled() -> None:
        profile_batches(model, layers, data, progress=False)

    seconds = interleaved({"plain": plain, "profiled": profiled}, repeats)
    return {
        **setting.described(),
        "padded": padded,
        "tokens": data.num_tokens,
        **percentiles(seconds["plain"], "plain_seconds"),
        **percentiles(seconds["profiled"], "profiled_seconds"),
        **percentiles(ratios(seconds, "profiled", "plain"), "ratio"),
        "repeats": repeats,
    }


def main() -> None:
    parser = arguments(__doc__, "profiling.jsonl", repeats=15)
    add_setting_argument(parser)
    args = parser.parse_args()
    rows = Rows("profiling", output_of(args), quick=args.quick)
    for setting in chosen(args):
        if setting.checkpointing:
            continue  # no backward, nothing to checkpoint
        for padded in (False, True):
            row = measure(setting, padded, 3 if args.quick else args.repeats)
            rows.write(row)
            print(
                f"{setting.name + (', padded' if padded else ''):56s} plain {row['plain_seconds_p50']:.3f} s   "
                f"profiled {row['profiled_seconds_p50']:.3f} s   ratio p20 {row['ratio_p20']:.3f}  "
                f"p50 {row['ratio_p50']:.3f}  p80 {row['ratio_p80']:.3f}",
                flush=True,
            )
            gc.collect()


if __name__ == "__main__":
    main()
