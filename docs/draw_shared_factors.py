"""Draws figures/shared_factors.png: which factors of a layer's adapters belong to one expert, and which to several.

    python docs/draw_shared_factors.py

Areas are in the proportions of OLMoE-1B-7B (hidden size 2048, experts of width 1024).
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
FROZEN, OWN, SHARED, TEXT, QUIET = "#c6dbef", "#D55E00", "#0b6e99", "#1f2328", "#6b727a"
HIDDEN, WIDTH, EXPERTS, HOT, RANK, PROJECTIONS = 2048, 1024, 64, 16, 32, 3
# What is drawn: some experts, a quarter of them hot.
DRAWN, DRAWN_HOT, STEP = 8, 2, 1.0


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, label: str = "") -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", fc=color, ec="none")
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", color="white", fontsize=9)


def panel(axes: Axes, title: str, size: str, *, outer: bool, cold: bool) -> None:
    axes.set_xlim(-0.2, DRAWN * STEP)
    axes.set_ylim(-1.0, 5.1)
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=11, color=TEXT)
    for expert in range(DRAWN):
        box(axes, expert * STEP, 0, 0.8, 0.7, FROZEN)
    axes.text(DRAWN_HOT * STEP / 2 - 0.1, -0.4, "hot", ha="center", va="center", color=QUIET, fontsize=9)
    middle = (DRAWN + DRAWN_HOT) * STEP / 2 - 0.1
    axes.text(middle, -0.4, "cold experts", ha="center", va="center", color=QUIET, fontsize=9)
    for expert in range(DRAWN_HOT):
        box(axes, expert * STEP + 0.15, 1.0, 0.5, 1.0, OWN, "B")
        if not outer:
            box(axes, expert * STEP + 0.15, 2.2, 0.5, 2.0, OWN, "A")
    cold_width = (DRAWN - DRAWN_HOT) * STEP - 0.2
    if cold:
        box(axes, middle - 0.25, 1.0, 0.5, 1.0, SHARED, "B")
        axes.plot([DRAWN_HOT * STEP, DRAWN_HOT * STEP + cold_width], [0.85, 0.85], color=SHARED, lw=1.5)
    if outer:
        box(axes, 0.15, 2.2, 0.5, 2.0, SHARED, "A")
        right = DRAWN_HOT * STEP + (cold_width if cold else 0) - (0 if cold else 0.2)
        axes.plot([0, right], [2.1, 2.1], color=SHARED, lw=1.5)
    axes.text(-0.05, 4.65, size, ha="left", va="center", color=TEXT, fontsize=9)


def main() -> None:
    own = HOT * PROJECTIONS * (HIDDEN + WIDTH)
    outer = PROJECTIONS * (HIDDEN + HOT * WIDTH)
    both = PROJECTIONS * (HIDDEN + (HOT + 1) * WIDTH)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    panel(first, "The paper: hot experts only", f"rank {RANK}: {_millions(RANK * own)}", outer=False, cold=False)
    text = f"rank {RANK}: {_millions(RANK * outer)}"
    panel(second, "share_outer=True", text, outer=True, cold=False)
    rank = RANK * own // both
    text = f"rank {RANK}: {_millions(RANK * both)}; rank {rank}: {_millions(rank * both)}"
    panel(third, 'and cold_experts="shared"', text, outer=True, cold=True)
    figure.savefig(ROOT / "docs" / "figures" / "shared_factors.png", dpi=150, metadata={"Software": None})


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M per layer"


if __name__ == "__main__":
    main()
