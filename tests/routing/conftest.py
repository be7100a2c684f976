"""The telemetry that several tests read."""

from pathlib import Path

import numpy as np
import pytest

from peft_sieve.routing.profile import RoutingProfile


@pytest.fixture(scope="session")
def olmoe() -> dict[str, RoutingProfile]:
    """The telemetry of OLMoE-1B-7B on ten data sets."""
    arrays = np.load(Path(__file__).parents[1] / "data" / "olmoe_1b_7b.npz")
    names = sorted({key.split(".")[0] for key in arrays})
    return {
        name: RoutingProfile.from_arrays(arrays[f"{name}.counts"], arrays[f"{name}.mass"], num_experts_per_tok=8)
        for name in names
    }
