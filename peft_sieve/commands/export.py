"""Write a sparse adapter so that it loads without this package.

By default as plain LoRA (experts without an adapter get zeros), which PEFT, vLLM, SGLang and llama.cpp's converter
read; no base weights are needed, only the base model's configuration. With --merge as a full checkpoint in the base
model's own format, which any program that runs the base model can run.
"""

from __future__ import annotations

import argparse

from ..errors import SieveError

NAME = "export"
HELP = "write an adapter as plain LoRA, or merged into its base model"
EXAMPLES = """\
  peft-sieve export out/adapter out/lora
  peft-sieve export me/adapter out/lora --layout stacked --base-model allenai/OLMoE-1B-7B-0924
  peft-sieve export out/adapter out/merged --merge
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("adapter", help="path or Hub id of a saved sparse adapter")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--base-model", help="path or Hub id of the base model (default: what the adapter names)")
    parser.add_argument(
        "--layout",
        choices=("auto", "per_expert", "stacked", "shared_outer"),
        default="auto",
        help="how plain LoRA has the experts' factors (default: what the servers of this model read); shared_outer is "
        "for adapters with share_outer in SGLang and vLLM",
    )
    parser.add_argument(
        "--without-router",
        action="store_true",
        help="leave the router's adapter out, which changes what is computed; for servers without LoRA on routers",
    )
    parser.add_argument("--merge", action="store_true", help="write a full checkpoint instead of plain LoRA")


def run(args: argparse.Namespace) -> int:
    """Export, and say what a server needs to know."""
    if args.merge:
        from ..adapters.checkpoint.merge import merge_checkpoint

        if args.layout != "auto" or args.without_router:
            raise SieveError(
                "--merge cannot be combined with --layout or --without-router: a checkpoint has one layout and holds "
                "the router. Leave them out."
            )
        print(f"merged checkpoint in {merge_checkpoint(args.adapter, args.base_model, args.output)}")
        return 0
    from ..adapters.plain.export import export_lora

    written = export_lora(
        args.adapter,
        args.output,
        base_model=args.base_model,
        layout=args.layout,
        include_router=not args.without_router,
    )
    print(
        f"plain LoRA in {written.path}: layout {written.layout}, rank {written.r}, {written.num_parameters:,} numbers; "
        f"servers must allow rank {written.max_rank}"
    )
    return 0
