"""Profiles of real routing, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peft_sieve import RoutingProfile

TELEMETRY = Path(__file__).parents[1] / "data" / "olmoe_1b_7b.npz"


def write_profiles(folder: Path, *names: str) -> list[str]:
    """Those of OLMoE-1B-7B on the named data sets; their paths."""
    paths = []
    with np.load(TELEMETRY) as arrays:
        for name in names:
            profile = RoutingProfile.from_arrays(
                arrays[f"{name}.counts"],
                arrays[f"{name}.mass"],
                num_experts_per_tok=8,
                layer_names=[f"model.layers.{layer}.mlp.experts" for layer in range(16)],
            )
            paths.append(str(folder / f"{name}.safetensors"))
            profile.save(paths[-1])
    return paths
