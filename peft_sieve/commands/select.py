"""Select the experts to adapt from a routing profile, and show what they cover.

The file that -o writes is the `selected_experts` of a SieveLoraConfig: layer names to expert ids.
"""

from __future__ import annotations

import argparse
import json

from ..files import write_file
from .options import add_json, add_selection, selection_options
from .output import check_folder_of, plain_warnings, print_json, print_table

NAME = "select"
HELP = "select the experts to adapt from a routing profile"
EXAMPLES = """\
  peft-sieve select profile.safetensors
  peft-sieve select profile.safetensors --strategy coverage --coverage 0.7 -o mask.json
  peft-sieve select chat.safetensors code.safetensors --top-k 8 --score mass --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "profile", nargs="+", help="file that `peft-sieve profile` wrote; several of one model are added up"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the selection there as JSON")
    parser.add_argument("--ids", action="store_true", help="also list the ids of the experts")
    add_json(parser)
    add_selection(parser)


def run(args: argparse.Namespace) -> int:
    """Select, write and show."""
    from functools import reduce

    from ..report.tables import layer_table, mean_coverage
    from ..routing.profile import RoutingProfile
    from ..routing.selection import select_experts

    if args.output:
        check_folder_of(args.output)
    profile = reduce(lambda one, other: one + other, map(RoutingProfile.load, args.profile))
    with plain_warnings(NAME):
        selection = select_experts(profile, **selection_options(args))
    # As calibration fills the mask in: a layer without experts is not named.
    mask = {layer: ids for layer, ids in selection.to_dict().items() if ids}
    if args.output:
        write_file(args.output, f"{json.dumps(mask)}\n".encode(), "selection")
    if args.json:
        coverage = selection.coverage(profile, score=args.score)
        print_json(
            {
                "profiles": args.profile,
                "options": selection_options(args),
                "num_selected": sum(map(len, mask.values())),
                "num_experts": sum(map(len, profile.counts.values())),
                "mean_coverage": mean_coverage(profile, selection, args.score),
                "coverage": {layer: coverage[layer] for layer in mask},
                "selected_experts": mask,
            }
        )
        return 0
    print_table(layer_table(profile, selection, score=args.score))
    if args.ids:
        print_table(selection.to_table())
    if args.output:
        print(f"selected experts in {args.output}")
    return 0
