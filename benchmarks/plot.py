"""Draws the figures of the performance page from the rows in `benchmarks/results`, the newest row of each kind.

python benchmarks/plot.py [--results benchmarks/results] [--out docs/figures] [--format svg]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import HERE

try:
    import matplotlib
except ImportError as error:
    raise SystemExit("matplotlib is not installed, and draws the figures: pip install peft-sieve[report]") from error
matplotlib.use("Agg")
# Text stays text: smaller files, and it can be searched. A fixed salt gives the same file for the same rows.
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "peft_sieve", "font.size": 9}
matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

LABELS = {
    "floor": "no expert adapters (floor)",
    "sieve_25": "peft_sieve, hot 25%",
    "shared_25": "hot 25%, rest and outer factors shared",
    "shared_25_same_rank": "the same at the same rank",
    "outer_shared_25": "hot 25%, outer factors shared",
    "cold_shared_25": "hot 25%, rest shared",
    "sieve_all": "peft_sieve, all experts",
    "peft_all_grouped": "PEFT, all experts, grouped_mm",
    "peft_all_eager": "PEFT, all experts, eager",
    "module_list_25": "loop over experts, hot 25%",
    "module_list_all": "loop over experts, all",
}
OURS, OTHERS, FLOOR = "#0b6e99", "#9aa5ab", "#555555"
AXES = {"k": "adapted experts", "rank": "rank", "length": "sequence length, tokens", "experts": "experts in the layer"}
AXES |= {"batch": "sequences in the batch"}
MIB = 2**20


def newest(folder: Path, name: str, key: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file, of those with equal `key` the one with the latest date; none if there is no file."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        print(f"{path} is not there: no figure from it")
        return []
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            identity = tuple(row[field] for field in key)
            newer = identity not in found or row["date"] >= found[identity]["date"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}, line {number}, is not a row of this benchmark ({error!r}): remove it") from error
        if newer and not row.get("quick"):
            found[identity] = row
    return list(found.values())


def one_run(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each setting the run with the most methods, the newest of those: rows of different runs do not compare."""
    runs: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        runs.setdefault((row["setting"], row["device"]), {}).setdefault(row["date"], []).append(row)
    return [row for dates in runs.values() for row in max(dates.items(), key=lambda run: (len(run[1]), run[0]))[1]]


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By setting and device, in the order they were first measured."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row.get('base', row['setting'])}\n{row['device']}, {row['dtype']}", []).append(row)
    return groups


def bars(axes: Axes, rows: list[dict[str, Any]], field: str, unit: str) -> None:
    """One bar a method, labelled with its value, beyond the row's `mark` if it has one."""
    rows = sorted(rows, key=lambda row: list(LABELS).index(row["method"]), reverse=True)
    values = [row.get(f"{field}_p50", row.get(field)) for row in rows]
    colors = [OURS if row["method"].startswith("sieve") else OTHERS for row in rows]
    spread = None
    if f"{field}_p20" in rows[0]:
        spread = [[max(0, r[f"{field}_p50"] - r[f"{field}_p20"]) for r in rows]]
        spread += [[max(0, r[f"{field}_p80"] - r[f"{field}_p50"]) for r in rows]]
    names = [LABELS[row["method"]] for row in rows]
    axes.barh(names, values, color=colors, height=0.65, xerr=spread, error_kw={"lw": 1, "ecolor": FLOOR})
    for i, (value, row) in enumerate(zip(values, rows, strict=True)):
        right = max(0, value, row.get(f"{field}_p80", value), row.get("mark", value))
        axes.annotate(f"{value:.2f}{unit}", (right, i), xytext=(4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.15)
    axes.tick_params(axis="y", length=0)


def step_figure(rows: list[dict[str, Any]]) -> Figure:
    groups = grouped(rows)
    figure, panels = plt.subplots(len(groups), 1, figsize=(7, 0.9 + 2.4 * len(groups)), squeeze=False)
    for axes, (title, group) in zip(panels[:, 0], groups.items(), strict=True):
        bars(axes, group, "ratio", "x")
        axes.axvline(1, color=FLOOR, lw=0.8, ls=":")
        axes.set_title(title, loc="left", fontsize=9)
    panels[-1, 0].set_xlabel("time of a step / floor's (median; line: 20th to 80th percentile)", loc="right")
    return figure


def memory_figure(rows: list[dict[str, Any]]) -> Figure:
    """Above the floor, beside what an adapter of this size cannot do without."""
    groups = grouped([row for row in rows if row["method"] != "floor"])
    figure, panels = plt.subplots(len(groups), 1, figsize=(7, 0.9 + 2.2 * len(groups)), squeeze=False)
    for axes, (title, group) in zip(panels[:, 0], groups.items(), strict=True):
        rows = [{**row, "extra": row["extra_bytes"] / MIB, "mark": row["adapter_bytes"] / MIB} for row in group]
        bars(axes, rows, "extra", " MiB")
        axes.plot([row["mark"] for row in rows], [LABELS[row["method"]] for row in rows], "|", color="black", ms=14)
        axes.set_title(title, loc="left", fontsize=9)
    panels[-1, 0].set_xlabel("peak of a step above the floor's, MiB (mark: adapter + gradient + Adam)", loc="right")
    return figure


def scaling_figure(rows: list[dict[str, Any]]) -> Figure:
    """A column for each thing that grows: seconds, their ratio, memory."""
    names = [name for name in AXES if any(row["axis"] == name for row in rows)]
    figure, panels = plt.subplots(3, len(names), figsize=(2.4 * len(names), 6.4), squeeze=False, sharey="row")
    for column, name in zip(panels.T, names, strict=True):
        points = sorted((row for row in rows if row["axis"] == name), key=lambda row: row["value"])
        x = [row["value"] for row in points]
        column[0].loglog(x, [r["floor_seconds_p50"] for r in points], "o--", color=FLOOR, ms=3, lw=1, label="floor")
        column[0].loglog(x, [r["seconds_p50"] for r in points], "o-", color=OURS, ms=3, label="peft_sieve")
        column[1].fill_between(x, [r["ratio_p20"] for r in points], [r["ratio_p80"] for r in points], alpha=0.2, lw=0)
        column[1].semilogx(x, [r["ratio_p50"] for r in points], "o-", color=OURS, ms=3)
        column[1].axhline(1, color=FLOOR, lw=0.8, ls=":")
        # Without the frozen weights, which both have.
        floor = [(r["floor_peak_bytes"] - r["frozen_bytes"]) / MIB for r in points]
        bound = [low + r["adapter_bytes"] / MIB for low, r in zip(floor, points, strict=True)]
        column[2].loglog(x, floor, "o--", color=FLOOR, ms=3, lw=1, label="floor")
        column[2].loglog(x, bound, ":", color="black", lw=1, label="floor + adapter,\ngradient, Adam")
        column[2].loglog(
            x, [(r["peak_bytes"] - r["frozen_bytes"]) / MIB for r in points], "o-", color=OURS, ms=3, label="peft_sieve"
        )
        for axes in column:
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [str(value) if axes is column[2] else "" for value in x], rotation=45)
            axes.minorticks_off()
        column[2].set_xlabel(AXES[name])
    for axes, label in zip(
        panels[:, 0], ("step, s", "step / floor", "peak memory but\nfrozen weights, MiB"), strict=True
    ):
        axes.set_ylabel(label)
    panels[0, 0].legend(fontsize=8)
    panels[2, 0].legend(fontsize=8)
    return figure


def save(figure: Figure, out: Path, name: str, form: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"performance_{name}.{form}"
    figure.tight_layout()
    # Without a date, so that drawing the same rows again changes nothing.
    figure.savefig(path, dpi=130, metadata={"Date": None} if form == "svg" else None)
    plt.close(figure)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the rows")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "figures", help="folder to write to")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args()
    if not args.results.is_dir():
        parser.error(f"{args.results} is no folder: run a benchmark first, or name the folder of its rows")
    if rows := one_run(newest(args.results, "step", ("setting", "device", "method", "date"))):
        save(step_figure(rows), args.out, "step", args.format)
    if rows := newest(args.results, "memory", ("setting", "device", "method")):
        save(memory_figure(rows), args.out, "memory", args.format)
    rows = newest(args.results, "scaling", ("base", "device", "axis", "value"))
    for title, group in grouped(rows).items():
        figure = scaling_figure(group)
        figure.suptitle(title.replace("\n", ", "), x=0.01, ha="left", fontsize=9)
        save(figure, args.out, f"scaling_{group[0]['device_type']}", args.format)


if __name__ == "__main__":
    main()
