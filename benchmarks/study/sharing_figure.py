"""The figure of docs/evidence.md on shared factors: what each condition keeps of the gain of training all experts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from peft_sieve.report.canvas import dress, head, new_figure, save_png
from peft_sieve.report.themes import LIGHT

from .analysis import NO_EXPERT, REFERENCE, compare
from .sharing_table import RECIPE, OfTask

_MARKERS = "Ds"


def draw(models: Mapping[str, Mapping[str, OfTask]], labels: Mapping[str, str], path: Path) -> None:
    """Mean and 95% interval of each condition; a panel a task, a colour a model.

    Args:
        models: name -> label of a task -> its losses.
    """
    first, *_ = models.values()
    there = {name for tasks in models.values() for of_task in tasks.values() for name in of_task}
    names = [name for name in labels if name in there - {NO_EXPERT, REFERENCE}]
    figure = new_figure(12.0, 1.5 + 0.32 * len(names))
    panels = figure.subplots(1, len(first), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, first, strict=True):
        axes.axvline(100.0, color=LIGHT.quiet, lw=1)
        for number, (model, tasks) in enumerate(models.items()):
            color = (LIGHT.emphasis, LIGHT.series[0])[number]
            shift = 0.3 * (number - (len(models) - 1) / 2)
            kept = {name: gain(tasks[task], name) for name in names if name in tasks[task]}
            axes.axvline(kept[RECIPE][1], color=color, lw=1, ls=(0, (2, 2)), alpha=0.7)
            for name, (low, mean, high) in kept.items():
                place = names.index(name) + shift
                label = model if name == RECIPE and axes is panels[0] else None
                axes.plot([low, high], [place] * 2, "-", lw=1.5, color=color)
                axes.plot(mean, place, _MARKERS[number], ms=4.5, color=color, label=label)
        axes.set_yticks(range(len(names)), [labels[name] for name in names])
        axes.set_title(task, loc="left")
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel("share of the gain of LoRA on all experts over LoRA on none, % (right is better)", fontsize=9)
    head(figure, "Mean and 95% interval. Dashed: the recipe; line: all experts. Each panel has its own scale.", LIGHT)
    if len(models) > 1:
        figure.legend(loc="outside upper right", ncols=len(models))
    dress(figure, LIGHT)
    save_png(figure, path, "figure of the study")


def gain(of_task: OfTask, name: str) -> tuple[float, float, float]:
    """Per cent of the gain that a condition keeps: the interval's ends around the mean.

    The interval is that of the difference to training all experts, over the mean gain of the task.
    """
    none, full = (statistics.fmean(of_task[each].values()) for each in (NO_EXPERT, REFERENCE))
    paired = compare(of_task, [(name, REFERENCE)])[f"{name} - {REFERENCE}"].paired
    low, high = paired.confidence_interval
    worse = (high, paired.mean_difference, low)
    less, mean, more = (100 * (1 - difference / (none - full)) for difference in worse)
    return less, mean, more
