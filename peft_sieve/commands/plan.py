"""Count what training would cost, for several numbers of experts, from the model's configuration alone.

No weights are read: the model is built without memory, and the adapter put into it. Adapter, gradients and optimizer
states are in the type that PEFT gives the adapter (float32 for models in half precision). With --profile, also the
share of the routing that the hottest experts of a layer get, mean and lowest over layers.
"""

from __future__ import annotations

import argparse

from .options import add_json
from .output import plain_warnings, print_json, print_table

NAME = "plan"
HELP = "count parameters and memory for several numbers of experts, without weights"
EXAMPLES = """\
  peft-sieve plan allenai/OLMoE-1B-7B-0924
  peft-sieve plan out/model/config.json --top-k 4 8 16 --rank 16
  peft-sieve plan out/model --top-k-frac 0.25 --cold-experts shared --share-outer --rank 60
  peft-sieve plan out/model --profile profile.safetensors --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", help="path or Hub id of a model, or path of its config.json")
    parser.add_argument("--profile", metavar="FILE", help="routing of this model, for the coverage")
    parser.add_argument("--top-k", type=int, nargs="+", default=[], metavar="K", help="experts a layer")
    parser.add_argument(
        "--top-k-frac",
        type=float,
        nargs="+",
        default=[],
        metavar="SHARE",
        help="the same as shares (default: 1/16, 1/8, 1/4, 1/2); all experts always come last",
    )
    add_json(parser)
    adapter = parser.add_argument_group("the adapter")
    adapter.add_argument("-r", "--rank", type=int, default=32, help="default: 32")
    adapter.add_argument("--score", default="count", metavar="NAME", help="of the coverage: count (default) or mass")
    adapter.add_argument(
        "--expert-projections", nargs="+", metavar="NAME", help="some of gate_proj, up_proj, down_proj (default: all)"
    )
    adapter.add_argument(
        "--cold-experts",
        choices=("frozen", "shared"),
        default="frozen",
        help="what the other experts get: nothing (default), or one adapter per layer together",
    )
    adapter.add_argument(
        "--share-outer", action="store_true", help="one A of gate and up, and one B of down, per layer for all experts"
    )
    for what, text in (("attention", "attention"), ("router", "the router"), ("shared-experts", "shared experts")):
        adapter.add_argument(f"--no-{what}", action="store_true", help=f"do not adapt {text}")


def run(args: argparse.Namespace) -> int:
    """Count and show."""
    from ..planning import plan_training
    from ..routing.profile import RoutingProfile
    from ..tuners.sieve.config import SieveLoraConfig

    config = SieveLoraConfig(
        r=args.rank,
        score=args.score,
        expert_projections=args.expert_projections,
        cold_experts=args.cold_experts,
        share_outer=args.share_outer,
        train_attention=not args.no_attention,
        train_router=not args.no_router,
        train_shared_experts=not args.no_shared_experts,
    )
    profile = RoutingProfile.load(args.profile) if args.profile else None
    with plain_warnings(NAME):
        plan = plan_training(args.model, top_k=args.top_k, top_k_frac=args.top_k_frac, config=config, profile=profile)
    if args.json:
        print_json(plan.to_dict())
        return 0
    layers = len(plan.num_experts)
    cold = ", one adapter per layer for all other experts" if plan.cold_experts == "shared" else ""
    outer = ", outer factors one per layer" if plan.share_outer else ""
    size = f"{plan.model_parameters:,} parameters, {layers} layers with experts"
    print(f"{plan.model}: {size}; rank {plan.r}{cold}{outer}")
    print_table(plan.to_table())
    return 0
