"""Run a model over a data set and write down which experts its routers choose.

Nothing is trained. The file is the input of `select`, `report` and `plan --profile`, and of RoutingProfile.load.
"""

from __future__ import annotations

import argparse
import string
from typing import Any

from ..errors import SieveError
from .options import add_json
from .output import check_folder_of, plain_warnings, print_json, print_table

NAME = "profile"
HELP = "measure a model's routing on a data set"
EXAMPLES = """\
  peft-sieve profile allenai/OLMoE-1B-7B-0924 --data train.jsonl -o profile.safetensors
  peft-sieve profile out/model --data me/chats --split train_sft --max-samples 256 -o profile.safetensors
  peft-sieve profile out/model --data gsm8k.jsonl --template 'Q: {question}\\nA: {answer}' -o profile.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; those of the data are named as in `profile_routing`."""
    parser.add_argument("model", help="path or Hub id of a Mixture-of-Experts model")
    parser.add_argument(
        "--data",
        required=True,
        help="a .jsonl, .json, .csv, .parquet or .txt file, a folder, or the Hub id of a data set; rows with `text`, "
        "`messages`, `prompt` and `completion`, `input_ids` or `conversations`, or others with --template",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the profile to write (.safetensors)")
    add_json(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    data = parser.add_argument_group("what is read")
    data.add_argument("--split", default="train", help="split of the data set (default: train)")
    data.add_argument(
        "--template", metavar="TEXT", help="a sample's text, with {COLUMN} for its columns and \\n for a line break"
    )
    data.add_argument(
        "--max-samples", type=int, default=512, metavar="N", help="samples at most, drawn by --seed (default: 512)"
    )
    data.add_argument(
        "--max-length", type=int, default=2048, metavar="N", help="tokens of a sample at most (default: 2048)"
    )
    data.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    model = parser.add_argument_group("how it runs")
    model.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples a forward pass (default: 8)")
    model.add_argument("--tokenizer", metavar="NAME", help="path or Hub id of a tokenizer (default: the model's)")
    model.add_argument(
        "--device",
        help='where, such as "cuda:1"; "auto" spreads a large model over all devices, with accelerate (default: the '
        "first GPU, or the CPU)",
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the weights (default: auto, as they are saved)",
    )
    model.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def run(args: argparse.Namespace) -> int:
    """Profile, write and show."""
    from ..routing.profiling import profile_routing
    from ..routing.statistics import routing_statistics

    check_folder_of(args.output)
    with plain_warnings(NAME):
        from .loading import load_model, load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer or args.model, args.trust_remote_code, required=bool(args.tokenizer))
        model = load_model(args.model, args.device, args.dtype, args.trust_remote_code, progress=not args.quiet)
        profile = profile_routing(
            model,
            args.data,
            tokenizer=tokenizer,
            max_samples=args.max_samples,
            max_length=args.max_length,
            batch_size=args.batch_size,
            formatting_func=_formatter(args.template) if args.template else None,
            progress=not args.quiet,
            split=args.split,
            seed=args.seed,
        )
    profile.save(args.output)
    statistics = routing_statistics(profile)
    if args.json:
        print_json(
            {
                "profile": args.output,
                **profile.metadata,
                "num_experts_per_tok": profile.num_experts_per_tok,
                "layers": {
                    name: {"num_experts": counts.numel(), "routed": int(counts.sum()), **vars(statistics.layers[name])}
                    for name, counts in profile.counts.items()
                },
                "global_cv": statistics.global_cv,
                "mean_layer_cv": statistics.mean_layer_cv,
            }
        )
        return 0
    print_table(statistics.to_table())
    samples = profile.metadata["samples"]
    print(f"{profile.num_tokens:,} tokens of {samples:,} samples of {profile.metadata['dataset']}")
    print(f"profile in {args.output}")
    return 0


def _formatter(template: str) -> Any:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise SieveError(f"--template {template!r} is not valid ({error}). Write {{COLUMN}} for a column.") from error
    if not fields:
        raise SieveError(
            f"--template {template!r} names no column, so every sample would be the same. Write {{COLUMN}} for those "
            "that a sample's text is made of."
        )
    # A shell passes backslash and n as they are typed.
    return template.replace("\\n", "\n").format_map
