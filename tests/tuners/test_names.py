"""Names of adapters that saving would mistake for parts of keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, SieveError, SieveLoraConfig
from peft_sieve.tuners.common.names import check_adapter_names
from tests.models import randomize_adapters, tiny_model
from tests.tuners.perft.adapted import randomize

MASK = {"model.layers.0.mlp.experts": [1, 2]}
CONFIGS: dict[str, Any] = {
    "sieve": lambda: SieveLoraConfig(r=2, selected_experts=MASK),
    "full": lambda: SieveLoraConfig(r=2, selected_experts=MASK, expert_tuning="full"),
    "epng": lambda: EpngConfig(r=2),
    "perft": lambda: PerftConfig(r=2),
    "bottleneck": lambda: PerftConfig(r=2, variant="E", form="bottleneck", selected_experts=MASK),
    "lora_moe": lambda: LoraMoeConfig(r=2, num_experts=4),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_every_part_of_every_key_is_refused(method: str) -> None:
    """What is saved in full included, and what an adapter has only as a buffer."""
    config = CONFIGS[method]()
    config.modules_to_save = ["lm_head"]
    keys = get_peft_model(tiny_model("olmoe"), config, adapter_name="mine").state_dict()
    for part in {part for key in keys for part in key.split(".")} - {"mine"}:
        with pytest.raises(SieveError, match=f"named '{part}'"):
            check_adapter_names(tiny_model("olmoe"), [part])


@pytest.mark.parametrize("name", ["lora_sql", "perft_sql", "my-adapter_1", "experts2"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_name_that_is_like_a_part_of_keys_is_saved_beside_another(method: str, name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("olmoe"), CONFIGS[method](), adapter_name=name)
    model.add_adapter("second", CONFIGS[method]())
    randomize_adapters(model)
    randomize(model)
    model.save_pretrained(tmp_path)
    for adapter in (name, "second"):
        want = get_peft_model_state_dict(model, adapter_name=adapter)
        loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / adapter, adapter_name=adapter)
        found = get_peft_model_state_dict(loaded, adapter_name=adapter)
        assert want and want.keys() == found.keys() and all(torch.equal(found[key], want[key]) for key in want)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_name_that_is_part_of_keys_is_refused(method: str) -> None:
    with pytest.raises(SieveError, match="named 'experts'"):
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
