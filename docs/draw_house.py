"""Draws figures/house.png: the rooms of the package, as the import contract in pyproject.toml has them.

python docs/draw_house.py
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
TEXT, QUIET = "#1f2328", "#6b727a"
COLORS = ("#fde2cf", "#c6dbef", "#d9ead3")  # what people call, how adapters work, what models and routers are
ROOMS = {
    "cli": "the command line",
    "commands": "a file per command",
    "report": "pages and figures",
    "planning": "what training costs",
    "training": "beside a Trainer: callbacks, warm-up, TRL's options",
    "adapters": "an adapter as files: read, summary, plain LoRA, merged into a checkpoint",
    "tuners": "the methods: sieve, epng, perft, lora_moe, presets; common: what each stands on",
    "hf": "the registry of methods; what PEFT and transformers have no hook for; model cards",
    "routing": "what the router does: data, counting, profile, scores, selection, statistics",
    "moe": "what a MoE layer is: topology, placement, storage; families: how experts are laid out",
    "kernels": "products on rows sorted by expert, forward and backward: PyTorch, CPU, Triton",
    "files": "atomic writes",
    "checks": "small checks",
    "table": "tables",
    "errors": "SieveError",
}
LOWEST = {"cli": 0, "commands": 0, "report": 0, "planning": 0, "training": 0, "adapters": 0, "tuners": 1, "hf": 1}


def layers() -> list[list[str]]:
    """The rooms from the top down, those that stand beside each other together."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'containers = \["peft_sieve"\]\nlayers = \[\n(.*?)\n\]', text, flags=re.DOTALL)
    assert match is not None
    return [re.split(r" [:|] ", line) for line in re.findall(r'"(.*?)"', match.group(1))]


def main() -> None:
    rows = layers()
    figure = Figure(figsize=(10, 0.62 * len(rows) + 0.3), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 10)
    axes.set_ylim(-len(rows) - 0.1, 0.15)
    axes.axis("off")
    for number, rooms in enumerate(rows):
        width = 9.2 / len(rooms)
        for place, room in enumerate(rooms):
            x, y = 0.6 + place * width, -number - 0.9
            color = COLORS[LOWEST.get(room, 2)]
            axes.add_patch(
                FancyBboxPatch((x, y), width - 0.12, 0.76, boxstyle="round,pad=0,rounding_size=0.06", fc=color, lw=0)
            )
            axes.text(x + 0.15, y + 0.38, room, va="center", color=TEXT, fontsize=11, weight="bold")
            axes.text(x + (1.35 if width > 4 else 0.95), y + 0.37, ROOMS[room], va="center", color=TEXT, fontsize=9)
    axes.add_patch(
        FancyArrowPatch((0.3, -0.2), (0.3, -len(rows) + 0.1), arrowstyle="-|>", mutation_scale=14, color=QUIET, lw=1.2)
    )
    axes.text(0.14, -len(rows) / 2, "may import", rotation=90, va="center", ha="center", color=QUIET, fontsize=9)
    figure.savefig(ROOT / "docs" / "figures" / "house.png", facecolor="white")


if __name__ == "__main__":
    main()
