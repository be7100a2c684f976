"""Names of adapters that saving would mistake for parts of keys."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveError, SieveLoraConfig
from tests.models import tiny_model

MASK = {"model.layers.0.mlp.experts": [1, 2]}
CONFIGS: dict[str, Any] = {
    "sieve": lambda: SieveLoraConfig(r=2, selected_experts=MASK),
    "epng": lambda: EpngConfig(r=2),
    "perft": lambda: PerftConfig(r=2),
    "lora_moe": lambda: LoraMoeConfig(r=2, num_experts=4),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_name_that_is_part_of_keys_is_refused(method: str) -> None:
    with pytest.raises(SieveError, match="named 'experts', which is a part of the names of weights"):
        get_peft_model(tiny_model("olmoe"), CONFIGS[method](), adapter_name="experts")
    model = get_peft_model(tiny_model("olmoe"), CONFIGS[method]())
    for name in ("mlp", "0", "weight", "gate_up_proj", "experts", "lora_A", "perft_A"):
        before = [path for path, _ in model.named_modules()]
        with pytest.raises(SieveError, match=f"named '{name}'"):
            model.add_adapter(name, CONFIGS[method]())
        assert [path for path, _ in model.named_modules()] == before and list(model.peft_config) == ["default"]
    model.add_adapter("router_of_mlp", CONFIGS[method]())
    model.delete_adapter("default")
    model.add_adapter("default", CONFIGS[method]())
