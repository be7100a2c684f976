"""What does profiling cost, against a plain forward of the backbone over the same batches?

Both run in one process, in turn, so that they meet the same noise; a row has the 20th, 50th and 80th percentile of the
ratio of each pair. The goal is 1.05.

    python benchmarks/bench_profiling.py [--repeats 15] [--quick]
"""

from __future__ import annotations

from typing import Any

import torch
from common import Rows, arguments, device, interleaved, output_of, percentiles, ratios
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
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device()).eval()
    lengths = [length - (i * length // (2 * samples) if padded else 0) for i in range(samples)]
    rows = [{"input_ids": torch.randint(0, 4096, (n,)).tolist()} for n in lengths]
    return model, calibration_batches(rows, batch_size=batch_size, max_length=length)


def measure(setting: str, options: dict[str, Any], repeats: int) -> dict[str, Any]:
    model, data = set_up(**options)
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
        "setting": setting,
        "tokens": data.num_tokens,
        "plain_s_p50": percentiles(seconds["plain"], "s")["s_p50"],
        "profiled_s_p50": percentiles(seconds["profiled"], "s")["s_p50"],
        **percentiles(ratios(seconds, "profiled", "plain"), "ratio"),
        "repeats": repeats,
    }


def main() -> None:
    args = arguments(__doc__, "profiling.jsonl", repeats=15).parse_args()
    rows = Rows("profiling", output_of(args), quick=args.quick)
    for setting, options in SETTINGS.items():
        row = measure(setting, {**options, "length": 32} if args.quick else options, args.repeats)
        rows.write(row)
        print(
            f"{setting:42s} plain {row['plain_s_p50']:.3f} s   profiled {row['profiled_s_p50']:.3f} s   "
            f"ratio p20 {row['ratio_p20']:.3f}  p50 {row['ratio_p50']:.3f}  p80 {row['ratio_p80']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
