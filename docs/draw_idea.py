"""Draws figures/idea.png: the method in three steps, with the routing of a real layer.

    python docs/draw_idea.py

The counts are those of OLMoE-1B-7B's ninth layer on GSM8K (tests/data).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from peft_sieve import RoutingProfile, select_experts

ROOT = Path(__file__).resolve().parents[1]
LAYER = "model.layers.8.mlp.experts"
COLUMNS = 16
FROZEN, ADAPTED, TEXT, QUIET = "#c6dbef", "#D55E00", "#1f2328", "#6b727a"


def bars(axes: Axes, shares: np.ndarray, colors: list[str], label: str) -> None:
    axes.bar(range(len(shares)), shares, width=0.85, color=colors)
    axes.set_xlim(-1, len(shares))
    axes.set_xlabel(label, color=QUIET)
    axes.set_xticks([])
    axes.set_yticks([0, 2, 4])
    axes.axhline(1, color=QUIET, lw=0.8, ls=(0, (4, 2)))
    axes.spines[["top", "right"]].set_visible(False)


def box(axes: Axes, x: float, y: float, width: float, height: float, label: str, *, adapted: bool) -> None:
    edge = ADAPTED if adapted else FROZEN
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.012", fc=FROZEN, ec=edge, lw=2 if adapted else 0
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", color=TEXT, fontsize=9)


def layer(axes: Axes, hot: list[bool]) -> None:
    """A transformer layer, its adapted parts outlined."""
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    box(axes, 0.05, 0.80, 0.90, 0.13, "attention", adapted=True)
    box(axes, 0.05, 0.60, 0.90, 0.13, "router", adapted=True)
    for index, adapted in enumerate(hot):
        row, column = divmod(index, COLUMNS)
        box(axes, 0.05 + 0.91 * column / COLUMNS, 0.46 - 0.105 * row, 0.72 / COLUMNS, 0.07, "", adapted=adapted)
    axes.text(0.5, 0.03, "experts", ha="center", color=QUIET)


def main() -> None:
    arrays = np.load(ROOT / "tests" / "data" / "olmoe_1b_7b.npz")
    names = [f"model.layers.{number}.mlp.experts" for number in range(16)]
    profile = RoutingProfile.from_arrays(arrays["gsm8k.counts"], num_experts_per_tok=8, layer_names=names)
    counts = profile.counts[LAYER].double().numpy()
    shares = counts / counts.mean()
    selected = set(select_experts(profile, top_k_frac=0.25)[LAYER])
    hot = [expert in selected for expert in range(len(shares))]
    covered = counts[hot].sum() / counts.sum()

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    bars(first, shares, [FROZEN if share < 1 else "#6baed6" for share in shares], "expert")
    first.set_ylabel("tokens, in uniform shares", color=QUIET)
    first.set_title("1  Profile: where does the task go?", loc="left", fontsize=11, color=TEXT)
    order = np.argsort(-counts, kind="stable")
    bars(second, shares[order], [ADAPTED if hot[expert] else FROZEN for expert in order], "expert, hottest first")
    second.set_title("2  Select: the hottest quarter", loc="left", fontsize=11, color=TEXT)
    second.text(len(shares) - 1, 1.1, "uniform", ha="right", color=QUIET, fontsize=9)
    second.text(17, 2.2, f"these {len(selected)} of {len(shares)} receive\n{covered:.0%} of the tokens", color=ADAPTED)
    layer(third, hot)
    third.set_title("3  Train: adapters where outlined", loc="left", fontsize=11, color=TEXT)
    figure.savefig(ROOT / "docs" / "figures" / "idea.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
