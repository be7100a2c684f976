"""The figure of docs/evidence.md: each condition's loss minus that of LoRA on all experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_sieve.report.canvas import dress, head, new_figure, save_png
from peft_sieve.report.themes import LIGHT

from .analysis import MARGIN, Row, against_full, losses
from .conditions import conditions
from .settings import Settings
from .tasks import TASKS


def draw(finished: Sequence[Row], path: Path) -> None:
    """Mean and 95% interval, the seeds as dots, the margin as a band; a panel a task."""
    labels = {name: condition.label for name, condition in conditions(Settings()).items()}
    tasks = [name for name in TASKS if any(row["task"] == name for row in finished)]
    figure = new_figure(9.0, 4.2)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        compared = against_full(losses(finished, task))
        names = [name for name in labels if name in compared]
        axes.axvspan(-MARGIN, MARGIN, color=LIGHT.quiet, alpha=0.35, lw=0)
        axes.axvline(0.0, color=LIGHT.quiet, lw=1)
        for place, name in enumerate(names):
            comparison = compared[name]
            low, high = comparison.paired.confidence_interval
            axes.plot(comparison.differences, [place] * len(comparison.differences), "o", ms=3, color=LIGHT.series[5])
            axes.plot([low, high], [place, place], "-", lw=1.5, color=LIGHT.series[0])
            axes.plot(comparison.paired.mean_difference, place, "D", ms=5, color=LIGHT.emphasis)
        axes.set_yticks(range(len(names)), [labels[name] for name in names])
        axes.set_title(TASKS[task].label, loc="left")
    panels[0].invert_yaxis()
    figure.supxlabel("loss per answer token minus that of LoRA on all experts, nats (left is better)", fontsize=9)
    head(
        figure,
        f"Diamond: mean; line: 95% interval; dots: seeds; band: ±{MARGIN:g}. Each panel has its own scale.",
        LIGHT,
    )
    dress(figure, LIGHT)
    save_png(figure, path, "figure of the study")
