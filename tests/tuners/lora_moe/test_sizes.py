"""The parameter counts of DMEP (arXiv 2604.26340) before pruning, on the meta device."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from peft_sieve import LoraMoeConfig

_QWEN3_06B = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072}
_QWEN3_8B = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288}
_EIGHT = list(range(8))


@pytest.mark.parametrize(("sizes", "millions"), [(_QWEN3_06B, 42.7), (_QWEN3_8B, 185.2)], ids=["0.6B", "8B"])
def test_trainable_parameters(sizes: dict[str, int], millions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(num_key_value_heads=8, head_dim=128, **sizes))
        full = get_peft_model(model, LoraMoeConfig(num_experts=8, r=8, task_type="CAUSAL_LM"))
    trainable = full.get_nb_trainable_parameters()[0]
    assert round(trainable / 1e6, 1) == millions
    paths = full.base_model.targeted_module_names
    assert len(paths) == 7 * sizes["num_hidden_layers"]
    # All factors and router rows belong to one expert, so 5 of 8 experts are 5/8 of the parameters.
    kept = dict.fromkeys(paths, _EIGHT[:5])
    with torch.device("meta"):
        pruned = get_peft_model(full.unload(), LoraMoeConfig(kept_experts=kept, task_type="CAUSAL_LM"))
    assert pruned.get_nb_trainable_parameters()[0] * 8 == trainable * 5
