"""`hellora_config`: a `SieveLoraConfig` as HELLoRA has it, from a profile of the warm-up."""

from __future__ import annotations

from typing import Any

from ..errors import SieveError
from ..routing.profile import RoutingProfile, check_profile
from ..routing.selection import select_experts
from .common.provenance import provenance
from .sieve.config import SieveLoraConfig

HELLORI_DENSITY = 0.1


def hellora_config(profile: RoutingProfile, *, hellori: bool = False, **options: Any) -> SieveLoraConfig:
    """The configuration of HELLoRA (arXiv 2605.18795): LoRA on each layer's k most used experts, k the router's top-k.

    Args:
        profile: what the router did during the warm-up (`warm_up_profile`).
        hellori: HELLoRI: A frozen, and a fixed random tenth of B trained (`hellori_density`, which `options` may set).
            Attention, router and shared experts get no adapter then unless `options` say so.
        options: fields of `SieveLoraConfig`. `top_k`, `strategy`, `score` and the other fields that select experts
            select from `profile`; `top_k` is the router's if neither it nor `top_k_frac` is given.

    Returns:
        The configuration with its mask, which is not calibrated any more.

    Raises:
        SieveError: the profile does not know the router's top-k, an option cannot hold, or the mask is given, too.
    """
    check_profile(profile)
    for name in ("selected_experts", "calib_dataset"):
        if options.get(name) is not None:
            raise SieveError(
                f"hellora_config was given {name}, expected the profile alone to say which experts are adapted: leave "
                "it out, or make a SieveLoraConfig of it"
            )
    if options.get("top_k") is None and "top_k_frac" not in options:
        if profile.num_experts_per_tok is None:
            raise SieveError(
                "received a profile without num_experts_per_tok, expected the router's top-k, which is how many "
                "experts HELLoRA adapts: pass top_k"
            )
        options["top_k"] = profile.num_experts_per_tok
    if hellori:
        always_active = ("train_attention", "train_router", "train_shared_experts")
        options = {"hellori_density": HELLORI_DENSITY, **dict.fromkeys(always_active, False), **options}
    checked = SieveLoraConfig(**options)
    selection = select_experts(profile, **checked.selection_options())
    mask = {path: ids for path, ids in selection.to_dict().items() if checked.adapts(ids)}
    known = ("dataset", "fingerprint", "samples", "tokens")
    calibration = None
    if all(name in profile.metadata for name in known):
        source = {name: profile.metadata[name] for name in (*known, "warm_up") if name in profile.metadata}
        calibration = provenance(selection, profile, checked, **source)
    return SieveLoraConfig(**options, selected_experts=mask, calibration=calibration)
