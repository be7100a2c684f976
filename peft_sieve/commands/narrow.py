"""Narrow an ordinary LoRA on all experts to a sparse adapter of the experts that a task uses.

The result computes what the LoRA does on the experts kept, and nothing on the others. The share of the LoRA's norm
that is kept says how much that leaves out.
"""

from __future__ import annotations

import argparse
import json

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
    # Given on to select_experts, which checks them and has the defaults.
    parser.add_argument("--top-k-frac", type=float, help="share of each layer's experts to keep")
    parser.add_argument("--top-k", type=int, help="experts to keep per layer; wins over --top-k-frac")
    parser.add_argument("--strategy", help="uniform, greedy, coverage, cumulative or random")
    parser.add_argument("--score", help="count (tokens), mass (gate weight), esft_token or esft_gate")
    parser.add_argument("--coverage", type=float, help="target of --strategy coverage")
    parser.add_argument("--top-p", type=float, help="target of --strategy cumulative")
    parser.add_argument("--seed", type=int, help="of --strategy random")


def run(args: argparse.Namespace) -> int:
    """Narrow, and say how much is kept."""
    from ..adapters.plain.narrow import narrow_lora
    from ..routing.profile import RoutingProfile

    options = ("top_k_frac", "top_k", "strategy", "score", "coverage", "seed", "top_p")
    selection = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    experts = RoutingProfile.load(args.profile) if args.profile else _mask(args.mask)
    narrowed = narrow_lora(args.lora, args.output, experts, base_model=args.base_model, **selection)
    print(
        f"sparse adapter in {narrowed.path}: {narrowed.num_kept} of {narrowed.num_experts} experts, "
        f"{narrowed.kept_norm:.1%} of the norm kept"
    )
    return 0


def _mask(path: str) -> dict[str, list[int]]:
    from ..errors import SieveError

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise SieveError(
            f"the mask cannot be read from {path!r} ({error}), expected a JSON file with experts-module path -> expert "
            "ids: pass one"
        ) from error
    mask: dict[str, list[int]] = content.get("selected_experts", content) if isinstance(content, dict) else content
    return mask
