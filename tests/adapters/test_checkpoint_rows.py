"""Where rows of a model's weights lie in its checkpoints: compared with what transformers writes of random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Ernie4_5_VLMoeForConditionalGeneration, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.inkling2.modeling_inkling2 import Inkling2ForCausalLM
from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration

from peft_sieve import SieveError
from peft_sieve.adapters.checkpoint import rows as checkpoint_rows
from peft_sieve.adapters.checkpoint.rows import own_rows, row_maps
from tests.architectures.tiny import tiny_model

CASES: dict[str, tuple[type[PreTrainedModel], list[str]]] = {
    "renamed": (Step3p7ForConditionalGeneration, ["mlp.experts.down_proj"]),
    "split": (Step3p7ForConditionalGeneration, ["mlp.experts.gate_up_proj"]),
    "interleaved": (Inkling2ForCausalLM, ["mlp.experts.gate_up_proj"]),
    "transposed": (Ernie4_5_VLMoeForConditionalGeneration, ["mlp.text_moe.gate.weight"]),
    "a matrix each, of two stacks": (
        Ernie4_5_VLMoeForConditionalGeneration,
        ["mlp.text_moe.experts.down_proj", "mlp.vision_moe.experts.down_proj"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_found_where_transformers_writes_them(case: str) -> None:
    model_class, endings = CASES[case]
    model = tiny_model(model_class)
    block = next(name for name, _ in model.named_parameters() if name.endswith(endings[0])).removesuffix(endings[0])
    weights = {block + ending: model.get_parameter(block + ending).detach() for ending in endings}
    written = revert_weight_conversion(model, dict(weights))
    maps = row_maps(model, {name: (tuple(weight.shape), weight.dim() - 1) for name, weight in weights.items()})
    for name, weight in weights.items():
        rows = weight.flatten(0, -2)
        wanted = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: len(rows) // 2]
        places = maps[name].where(wanted)
        assert places and {part.key for part, _, _ in places} <= set(written)
        found = torch.full_like(rows[wanted], torch.nan)
        for part, inside, chosen in places:
            found[chosen] = written[part.key].movedim(part.columns, -1)[inside]
        assert torch.equal(found, rows[wanted])


def test_rows_that_follow_each_other_are_a_slice_of_their_tensor() -> None:
    rows = own_rows("w", (4, 6, 5), 2)
    ((part, inside, chosen),) = rows.where(torch.arange(6, 12))
    assert (part.key, part.shape, inside, chosen) == ("w", (4, 6), (1, slice(0, 6, 1)), (slice(0, 6, 1),))


def test_what_transformers_cannot_write_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("no way back")

    monkeypatch.setattr(checkpoint_rows, "revert_weight_conversion", fail)
    with pytest.raises(SieveError, match=r"does not say where.*no way back.*merge_and_unload\(\)"):
        row_maps(tiny_model(Inkling2ForCausalLM), {"lm_head.weight": ((128, 32), 1)})
