"""Print what a saved adapter holds, without loading a model: mask, coverage, ranks, sizes, and where the mask came
from."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

    from ..interop.summary import AdapterSummary

NAME = "inspect"
HELP = "print what a saved adapter holds"
EXAMPLES = """\
  peft-sieve inspect out/adapter
  peft-sieve inspect me/adapter --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("adapter", help="path or Hub id of a saved sparse adapter")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from ..interop.summary import inspect_adapter

    summary = inspect_adapter(args.adapter)
    if args.json:
        print(json.dumps(summary.to_dict(), indent=2))
    else:
        _print(summary)
    return 0


def _print(summary: AdapterSummary) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=False)
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(summary).items():
        facts.add_row(name, _plain(value))
    console.print(facts)

    layers = Table("layer", "experts", "coverage", "ranks", "parameters", "ids")
    for layer in summary.layers:
        of = "?" if layer.num_experts is None else layer.num_experts
        layers.add_row(
            _plain(layer.path),
            f"{len(layer.experts)} of {of}",
            "" if layer.coverage is None else f"{layer.coverage:.1%}",
            ", ".join(f"{group} {rank}" for group, rank in layer.ranks.items()),
            f"{layer.num_parameters:,}",
            " ".join(map(str, layer.experts)),
        )
    console.print(layers)

    if summary.modules:
        modules = Table("module", "layers", "rank", "parameters")
        for module in summary.modules:
            ranks = ", ".join(map(str, module.ranks))
            modules.add_row(_plain(module.name), str(module.count), ranks, f"{module.num_parameters:,}")
        console.print(modules)


def _facts(summary: AdapterSummary) -> dict[str, Any]:
    scaling = f"alpha {summary.lora_alpha}, dropout {summary.lora_dropout}" + (", rslora" if summary.use_rslora else "")
    facts = {
        "adapter": summary.adapter,
        "base model": summary.base_model or "not recorded",
        "revision": summary.revision,
        "task": summary.task_type,
        "LoRA": f"rank {summary.r}, {scaling}",
        "rank_pattern": summary.rank_pattern,
        "alpha_pattern": summary.alpha_pattern,
        "projections": ", ".join(summary.expert_projections),
        "parameters": f"{summary.num_parameters:,} ({', '.join(summary.dtypes)}), {summary.num_bytes / 1e6:.1f} MB",
        "in experts": _share(summary),
        "in other tensors": f"{summary.other_tensors:,}" if summary.other_tensors else None,
    }
    known = summary.calibration
    # The layers' coverage is in the table.
    facts |= {name.replace("_", " "): value for name, value in known.items() if name != "coverage"}
    if stability := known.get("stability"):
        lowest = min(stability, key=stability.get)
        facts["stability"] = f"{stability[lowest]:.2f} or more in each layer, least in {lowest}"
    if not known:
        facts["mask"] = "given by hand: no calibration recorded"
    return {name: value for name, value in facts.items() if value not in (None, {}, "")}


def _share(summary: AdapterSummary) -> str:
    text = f"{summary.expert_parameters:,}"
    if summary.all_experts_parameters:
        share = summary.expert_parameters / summary.all_experts_parameters
        text += f" ({share:.1%} of the {summary.all_experts_parameters:,} of all experts)"
    return text


def _plain(value: Any) -> Text:
    """Not as rich's markup: a path may hold brackets."""
    from rich.text import Text

    return Text(str(value))
