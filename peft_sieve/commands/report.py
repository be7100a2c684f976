"""Draw what routing profiles show: a page that needs no other file, and its pictures as PNG files.

Layer-by-expert heat maps, coverage against the number of experts, cold experts by depth, stability of smaller samples,
and, of several profiles, their overlap. All profiles must be of one model; give one for each data set, and smaller
samples of one to see how many tokens are enough.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_json, add_selection, selection_options
from .output import plain_warnings, print_json, print_table

NAME = "report"
HELP = "draw a page and pictures from routing profiles"
EXAMPLES = """\
  peft-sieve report profile.safetensors -o out/report
  peft-sieve report gsm8k.safetensors code=runs/7/profile.safetensors -o out/report --top-k 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "profile",
        nargs="+",
        help="file that `peft-sieve profile` wrote, shown by its name without suffix, or as NAME in NAME=FILE",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where to write, made if missing")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    add_json(parser)
    add_selection(parser)


def run(args: argparse.Namespace) -> int:
    """Draw, and say where."""
    from tqdm.auto import tqdm

    from ..report.page import write_report
    from ..report.tables import mean_coverage, profiles_table
    from ..routing.profile import RoutingProfile
    from ..routing.selection import select_experts
    from ..routing.statistics import routing_statistics

    profiles = {name: RoutingProfile.load(path) for name, path in _files_by_name(args.profile).items()}
    options = selection_options(args)
    # None: no bar unless a terminal is watching.
    with plain_warnings(NAME), tqdm(desc="Drawing", unit="figure", disable=args.quiet or None) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        files = write_report(profiles, args.output, on_progress=on_progress, **options)
        selections = {name: select_experts(profile, **options) for name, profile in profiles.items()}
    if not args.json:
        print_table(profiles_table(profiles, selections, score=args.score))
        print(f"report in {files[0]}, {len(files) - 1} pictures beside it")
        return 0
    measured = {name: routing_statistics(profile) for name, profile in profiles.items()}
    print_json(
        {
            "page": str(files[0]),
            "pictures": [str(path) for path in files[1:]],
            "options": options,
            "profiles": {
                name: {
                    "num_tokens": profile.num_tokens,
                    "mean_layer_cv": measured[name].mean_layer_cv,
                    "global_cv": measured[name].global_cv,
                    "mean_cold_fraction": measured[name].mean_cold_fraction,
                    "num_selected": sum(map(len, selections[name].values())),
                    "mean_coverage": mean_coverage(profile, selections[name], args.score),
                }
                for name, profile in profiles.items()
            },
        }
    )
    return 0


def _files_by_name(words: list[str]) -> dict[str, str]:
    """Name to show -> file: the name before "=", or the file's without suffix, or its path where that is not enough."""
    pairs = []
    for word in words:
        name, equals, path = word.partition("=")
        # A file's own name may have a "=" in it.
        pairs.append((name, path) if equals and name and not Path(word).exists() else (Path(word).stem, word))
    names = [name for name, _ in pairs]
    return {path if names.count(name) > 1 else name: path for name, path in pairs}
