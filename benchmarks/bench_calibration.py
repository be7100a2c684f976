"""How many tokens of calibration are enough?

Profiles each sample of a domain by itself. Then, again and again, draws two calibration sets without a sample in
common and compares the experts that they select; measures how much coverage a set's selection loses, on the samples
outside it, against the best selection for those; and lets the stopping rule run on shuffled data. Without --domain
only on the Spider questions in examples/data.

    python benchmarks/bench_calibration.py --domain gsm8k=gsm8k_train.jsonl.xz:question,answer [--domain ...]

With --profile a published profile, of which only the sums are known, is subsampled instead as if its tokens were
independent.

    python benchmarks/bench_calibration.py --profile tests/data/olmoe_1b_7b.npz:gsm8k --top-k 8
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import statistics
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import HERE, Rows, arguments, output_of, positive
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sieve import RoutingProfile, select_experts, selection_stability, subsample_stability
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing.data.batches import CalibrationData, calibration_batches
from peft_sieve.routing.profiling import profile_batches
from peft_sieve.routing.until_stable import StabilityRule, profile_until

EXAMPLES = HERE.parent / "examples"
SIZES = (8, 16, 32, 64, 128, 256, 512)  # samples
THRESHOLDS = (0.5, 0.6, 0.7, 0.8)
TOKENS = tuple(250 * 2**n for n in range(9))


class Domain(NamedTuple):
    name: str
    path: Path
    fields: tuple[str, ...]


class Samples:
    """The profile of every sample of a domain, and of sets of them."""

    def __init__(self, model_name: str, domain: Domain, num_samples: int) -> None:
        with lzma.open(domain.path, "rt") if domain.path.suffix == ".xz" else open(domain.path) as file:
            rows = [json.loads(line) for line in file]
        random.Random(0).shuffle(rows)
        texts = ["\n".join(row[field] for field in domain.fields) for row in rows[:num_samples]]
        model = AutoModelForCausalLM.from_pretrained(model_name).float().eval()
        self.data = calibration_batches(
            texts, tokenizer=AutoTokenizer.from_pretrained(model_name), max_samples=num_samples, batch_size=1
        )
        layers = find_moe_layers(model)
        alone = [profile_batches(model, layers, self.data.part([batch]), progress=False) for batch in self.data.batches]
        self.counts = np.stack([np.stack([layer.numpy() for layer in one.counts.values()]) for one in alone])
        self.described = {"layer_names": alone[0].layer_names, "num_experts_per_tok": alone[0].num_experts_per_tok}

    def of(self, chosen: Iterable[int]) -> RoutingProfile:
        return RoutingProfile.from_arrays(self.counts[list(chosen)].sum(0), **self.described)

    def __len__(self) -> int:
        return len(self.counts)


def coverage_lost(samples: Samples, used: Sequence[int]) -> float:
    """Mean over layers, on the samples that were not used."""
    rest = samples.of(set(range(len(samples))) - set(used))
    best, mine = (select_experts(profile).coverage(rest) for profile in (rest, samples.of(used)))
    return statistics.fmean(best[layer] - mine[layer] for layer in best)


def by_size(samples: Samples, repeats: int) -> list[dict[str, Any]]:
    """For each number of samples: agreement of two such sets, loss of one, and agreement if tokens were independent."""
    generator = random.Random(0)
    rows = []
    whole = samples.of(range(len(samples)))
    for size in (size for size in SIZES if 2 * size <= len(samples)):
        agreements, losses, tokens = [], [], []
        for _ in range(repeats):
            drawn = generator.sample(range(len(samples)), 2 * size)
            first, second = samples.of(drawn[:size]), samples.of(drawn[size:])
            agreements.append(list(selection_stability(first, second).values()))
            tokens.append(first.num_tokens)
            losses.append(coverage_lost(samples, drawn[:size]))
        num_tokens = round(statistics.fmean(tokens))
        # Two sets of that many tokens may be a few more than there are.
        independent = subsample_stability(whole, [min(num_tokens, whole.num_tokens // 2)], repeats=repeats)
        rows.append(
            {
                "samples": size,
                "tokens": num_tokens,
                "agreement": statistics.fmean(map(statistics.fmean, agreements)),
                "lowest_layer": statistics.fmean(map(min, agreements)),
                "coverage_lost": statistics.fmean(losses),
                "coverage_lost_max": max(losses),
                "agreement_if_independent": statistics.fmean(next(iter(independent.values())).values()),
            }
        )
    return rows


def by_threshold(samples: Samples, repeats: int, batch_size: int = 8, max_samples: int = 512) -> list[dict[str, Any]]:
    """Where the rule stops, at the settings that calibration has by default."""
    rows = []
    for threshold in THRESHOLDS:
        tokens, stopped, losses = [], 0, []
        for seed in range(repeats):
            chosen = sorted(random.Random(seed).sample(range(len(samples)), min(max_samples, len(samples) // 2)))
            # The rule is given numbers instead of tokens, since their counts are there already. Samples are sorted by
            # length, as calibration sorts them.
            batches = [
                {"input_ids": torch.tensor(chosen[start : start + batch_size])}
                for start in range(0, len(chosen), batch_size)
            ]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                end = profile_until(
                    StabilityRule(threshold, {}, seed),
                    lambda part: samples.of(numbers_in(part)),
                    samples.data.part(batches),
                )
            used = numbers_in(end.data)
            stopped += min(end.stability.values()) >= threshold
            tokens.append(end.profile.num_tokens)
            losses.append(coverage_lost(samples, used))
        rows.append(
            {
                "threshold": threshold,
                "stopped": stopped / repeats,
                "tokens_median": statistics.median(tokens),
                "tokens_max": max(tokens),
                "coverage_lost": statistics.fmean(losses),
                "coverage_lost_max": max(losses),
            }
        )
    return rows


def numbers_in(part: CalibrationData) -> list[int]:
    return [number for batch in part.batches for number in batch["input_ids"].tolist()]


def subsampled(path: Path, name: str, top_k: int, repeats: int) -> list[dict[str, Any]]:
    """Agreement of two sets of tokens of a profile, as if tokens were independent."""
    profile = RoutingProfile.from_arrays(np.load(path)[f"{name}.counts"], num_experts_per_tok=top_k)
    sizes = [size for size in TOKENS if 2 * size <= (profile.num_tokens or 0)]
    found = subsample_stability(profile, sizes, repeats=repeats)
    return [
        {"tokens": size, "agreement": statistics.fmean(layers.values()), "lowest_layer": min(layers.values())}
        for size, layers in found.items()
    ]


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{title}")
    names = list(rows[0])
    widths = [max(len(name), 8) for name in names]
    print("  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True)))
    for row in rows:
        shown = [f"{value:.4f}" if isinstance(value, float) else f"{value:,}" for value in row.values()]
        print("  ".join(value.rjust(width) for value, width in zip(shown, widths, strict=True)), flush=True)


def domain(text: str) -> Domain:
    name, _, rest = text.partition("=")
    path, _, fields = rest.rpartition(":")
    if not (name and path and fields):
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected NAME=FILE:FIELD,FIELD")
    return Domain(name, Path(path), tuple(fields.split(",")))


def published(text: str) -> tuple[Path, str]:
    path, _, name = text.rpartition(":")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected FILE.npz:NAME")
    return Path(path), name


def main() -> None:
    parser = arguments(__doc__, "calibration.jsonl", repeats=20)
    spider = Domain("spider", EXAMPLES / "data" / "spider_train.jsonl.xz", ("question", "query"))
    parser.add_argument(
        "--model", default=str(EXAMPLES / "tiny-olmoe"), help="a model of transformers with its tokenizer"
    )
    parser.add_argument(
        "--domain", action="append", type=domain, metavar="NAME=FILE:FIELDS", help="JSON lines, also .xz"
    )
    parser.add_argument("--samples", type=positive, default=2048, help="samples of a domain, default 2048")
    parser.add_argument("--profile", action="append", type=published, default=[], metavar="FILE.npz:NAME")
    parser.add_argument("--top-k", type=positive, default=8, help="experts a token in --profile, default 8")
    args = parser.parse_args()
    repeats, num_samples = (2, 64) if args.quick else (args.repeats, args.samples)
    rows = Rows("calibration", output_of(args), repeats=repeats)

    def report(question: str, name: str, found: list[dict[str, Any]]) -> None:
        show(f"{name}: {question}", found)
        for row in found:
            rows.write({"question": question, "data": name, **row})

    for path, name in args.profile:
        report("two sets of independent tokens", name, subsampled(path, name, args.top_k, repeats))
    for one in args.domain or ([] if args.profile else [spider]):
        samples = Samples(args.model, one, num_samples)
        report("two sets of samples", one.name, by_size(samples, repeats))
        report("where the rule stops", one.name, by_threshold(samples, repeats))


if __name__ == "__main__":
    main()
