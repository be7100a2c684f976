"""Should adapters beside a MoE block compute all tokens in one wide product, or only the tokens sent to each?

The wide product (peft_sieve/tuners/perft/mixture.py) does num_adapters / num_adapters_per_tok times the arithmetic and
moves no token. The alternative sorts tokens by adapter and copies them, once for each adapter that they go to. Forward
and backward of both on OLMoE's width, with the same values, for E on all experts and on a hot quarter of them.

    python benchmarks/bench_perft.py [--repeats 7] [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Rows, arguments, device, interleaved, output_of, percentiles, ratios

from peft_sieve.tuners.perft.mixture import dispatched_gates, mixture

WIDTH, EXPERTS, TOP_K, TOKENS = 2048, 64, 8, 1024
# (experts with an adapter, rank)
CASES = [(64, 16), (16, 16), (16, 64), (64, 64)]


def sorted_mixture(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """As `mixture`, an adapter at a time on the tokens that go to it."""
    places = slots[expert_ids]
    token, column = (places >= 0).nonzero(as_tuple=True)
    slot, order = places[token, column].sort(stable=True)
    token, weights = token[order], expert_weights[token, column][order]
    counts = slot.bincount(minlength=first.shape[0]).tolist()
    parts = [
        F.linear(x[rows], a) * gates.unsqueeze(-1) @ b
        for rows, gates, a, b in zip(token.split(counts), weights.split(counts), first, second, strict=True)
    ]
    return torch.zeros_like(x).index_add(0, token, torch.cat(parts))


def measure(adapters: int, rank: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device()).requires_grad_()

    x, first, second = random(TOKENS, WIDTH), random(adapters, rank, WIDTH), random(adapters, rank, WIDTH)
    popularity = torch.randn(EXPERTS, generator=generator).softmax(0)
    ids = popularity.expand(TOKENS, EXPERTS).multinomial(TOP_K, generator=generator).to(device())
    weights = torch.rand(TOKENS, TOP_K, generator=generator).to(device())
    slots = torch.full((EXPERTS,), -1, device=device())
    slots[ids.flatten().bincount(minlength=EXPERTS).topk(adapters).indices] = torch.arange(adapters, device=device())

    forwards: dict[str, Callable[[], torch.Tensor]] = {
        "wide": lambda: mixture(x, first, second, dispatched_gates(ids, weights, slots, adapters)),
        "sorted": lambda: sorted_mixture(x, first, second, ids, weights, slots),
    }
    torch.testing.assert_close(forwards["wide"](), forwards["sorted"](), rtol=1e-3, atol=0.1)
    steps = {name: lambda forward=forward: forward().sum().backward() for name, forward in forwards.items()}
    seconds = interleaved(steps, repeats)
    return {
        "adapters": adapters,
        "rank": rank,
        "share_of_pairs": round((slots[ids] >= 0).float().mean().item(), 3),
        **percentiles(seconds["wide"], "wide_seconds"),
        **percentiles(seconds["sorted"], "sorted_seconds"),
        **percentiles(ratios(seconds, "sorted", "wide"), "ratio"),
        "repeats": repeats,
    }


def main() -> None:
    args = arguments(__doc__, "perft.jsonl", repeats=7).parse_args()
    rows = Rows("perft", output_of(args), quick=args.quick, width=WIDTH, experts=EXPERTS, top_k=TOP_K, tokens=TOKENS)
    for adapters, rank in CASES:
        row = measure(adapters, rank, 3 if args.quick else args.repeats)
        rows.write(row)
        print(
            f"{adapters} of {EXPERTS} experts, rank {rank}: wide {row['wide_seconds_p50']:.3f} s, sorted "
            f"{row['sorted_seconds_p50']:.3f} s, ratio p20 {row['ratio_p20']:.2f}  p50 {row['ratio_p50']:.2f}  "
            f"p80 {row['ratio_p80']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
