"""Narrow an ordinary LoRA on all experts to a sparse adapter of the experts that a task uses.

The result computes what the LoRA does on the experts kept, and nothing on the others. The share of the LoRA's norm
that is kept says how much that leaves out.
"""

from __future__ import annotations

import argparse
import json

from ..checks import one_line
from ..errors import SieveError
from .options import add_selection, selection_options

NAME = "narrow"
HELP = "narrow a LoRA on all experts to some of them"
EXAMPLES = """\
  peft-sieve narrow me/lora out/sparse --profile profile.safetensors --top-k-frac 0.25
  peft-sieve narrow out/lora out/sparse --mask mask.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("lora", help="path or Hub id of a LoRA with factors for all experts")
    parser.add_argument("output", help="folder to write")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--mask", help="JSON file: experts-module path -> expert ids, or an adapter_config.json")
    which.add_argument("--profile", help="routing profile to select from")
    parser.add_argument("--base-model", help="path or Hub id of the base model (default: what the LoRA names)")
    # A mask takes none of them, so it matters which were given.
    add_selection(parser, defaults=False)


def run(args: argparse.Namespace) -> int:
    """Narrow, and say how much is kept."""
    from ..adapters.plain.narrow import narrow_lora
    from ..routing.profile import RoutingProfile

    given = {name: value for name, value in selection_options(args).items() if value is not None}
    experts = RoutingProfile.load(args.profile) if args.profile else _read_mask(args.mask)
    narrowed = narrow_lora(args.lora, args.output, experts, base_model=args.base_model, **given)
    print(
        f"sparse adapter in {narrowed.path}: {narrowed.num_kept} of {narrowed.num_experts} experts, "
        f"{narrowed.kept_norm:.1%} of the norm kept"
    )
    return 0


def _read_mask(path: str) -> dict[str, list[int]]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise SieveError(
            f"The mask cannot be read from {path!r} ({one_line(error)}). Pass a JSON file with experts-module path -> "
            "expert ids."
        ) from error
    mask: dict[str, list[int]] = content.get("selected_experts", content) if isinstance(content, dict) else content
    return mask
