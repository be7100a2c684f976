"""What does profiling cost, against a plain forward of the backbone over the same batches?

Both run in one process, in turn, so that they meet the same noise; a row has the 20th, 50th and 80th percentile of the
ratio of each pair. The goal is 1.05.

    python benchmarks/bench_profiling.py [--repeats 15] [--output benchmarks/results/profiling.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel

from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing.calibration import CalibrationData, calibration_batches
from peft_sieve.routing.profiling import profile_batches

SETTINGS: dict[str, dict[str, Any]] = {
    # OLMoE's proportions at a size that two cores can run: 64 experts, top-8.
    "olmoe-like, 4 x 512 tokens": {"length": 512, "samples": 4, "batch_size": 4, "padded": False},
    "olmoe-like, 8 short samples with padding": {"length": 128, "samples": 8, "batch_size": 8, "padded": True},
}


def set_up(length: int, samples: int, batch_size: int, padded: bool) -> tuple[PreTrainedModel, CalibrationData]:
    """A random model and its batches; with padding, samples are of half to full length."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=4096,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    lengths = [length - (i * length // (2 * samples) if padded else 0) for i in range(samples)]
    rows = [{"input_ids": torch.randint(0, 4096, (n,)).tolist()} for n in lengths]
    return model, calibration_batches(rows, batch_size=batch_size, max_length=length)


def timed(function: Callable[[], Any]) -> float:
    """Seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(setting: str, repeats: int) -> dict[str, Any]:
    model, data = set_up(**SETTINGS[setting])
    layers = find_moe_layers(model)
    batches = [{k: v.to(model.device) for k, v in batch.items()} for batch in data.batches]

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model.model(**batch, use_cache=False)

    def profiled() -> None:
        profile_batches(model, layers, data, progress=False)

    for _ in range(3):
        plain()
        profiled()
    pairs = []
    for i in range(repeats):
        # In turn which goes first: the second one finds warmer caches.
        first, second = (plain, profiled) if i % 2 else (profiled, plain)
        times = {first: timed(first)}
        times[second] = timed(second)
        pairs.append((times[profiled], times[plain]))
    ratios = statistics.quantiles([a / b for a, b in pairs], n=10)
    return {
        "setting": setting,
        "tokens": data.num_tokens,
        "plain_s_p50": round(statistics.median(b for _, b in pairs), 4),
        "profiled_s_p50": round(statistics.median(a for a, _ in pairs), 4),
        "ratio_p20": round(ratios[1], 3),
        "ratio_p50": round(ratios[4], 3),
        "ratio_p80": round(ratios[7], 3),
        "repeats": repeats,
    }


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="pairs of runs per setting")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "profiling.jsonl")
    args = parser.parse_args()
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    args.output.parent.mkdir(exist_ok=True)
    with args.output.open("a") as file:
        for setting in SETTINGS:
            row = measure(setting, args.repeats)
            file.write(json.dumps({**row, **about}) + "\n")
            file.flush()
            print(
                f"{setting:42s} plain {row['plain_s_p50']:.3f} s   profiled {row['profiled_s_p50']:.3f} s   "
                f"ratio p20 {row['ratio_p20']:.3f}  p50 {row['ratio_p50']:.3f}  p80 {row['ratio_p80']:.3f}"
            )


if __name__ == "__main__":
    main()
