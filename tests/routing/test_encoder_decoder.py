"""What encoder-decoders read while they are profiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaForBlockDiffusion

from peft_sieve import SieveError, profile_routing
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing.encoder_decoder import decoder_layers, with_decoder_inputs
from tests.architectures.tiny import tiny_model as tiny_of_class
from tests.models import tiny_model, token_batch
from tests.module_models import nllb_moe, switch_transformers

ENCODER, DECODER = "encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts"


def block_diffusion() -> Any:
    model = tiny_of_class(DiffusionGemmaForBlockDiffusion)
    model.config.canvas_length = 14
    return model


def test_the_decoder_reads_what_training_shows_it() -> None:
    model = switch_transformers()
    seen = []
    model.decoder.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    labels = torch.tensor([[7, 8, 1, -100], [9, 1, -100, -100], [4, 5, 6, 1]])
    batch = {**token_batch(model), "labels": labels}
    with torch.no_grad():
        model(**batch)
    profile = profile_routing(model, [batch])
    assert torch.equal(*seen)
    assert profile.counts[ENCODER].sum() <= 36
    assert profile.counts[DECODER].sum() <= 9  # labels that are ignored are no tokens


def test_text_is_read_on_both_sides() -> None:
    model = nllb_moe()
    batch = token_batch(model, batch=2)
    batch["attention_mask"][0, 9:] = 0
    inputs, mask = with_decoder_inputs(model, batch)
    assert torch.equal(mask, batch["attention_mask"])
    assert torch.equal(inputs["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
    assert (inputs["decoder_input_ids"][:, 0] == model.config.decoder_start_token_id).all()
    assert "decoder_input_ids" not in batch


def test_given_decoder_inputs_stay() -> None:
    model = switch_transformers()
    batch = token_batch(model)
    given = {"decoder_input_ids": batch["input_ids"][:, :5], "decoder_attention_mask": torch.ones(3, 5).tril(2)}
    inputs, mask = with_decoder_inputs(model, {**batch, **given})
    assert inputs.keys() == {*batch, *given}
    assert mask is given["decoder_attention_mask"]
    profile = profile_routing(model, [{**batch, **given}])
    assert profile.counts[DECODER].sum() <= 3 + 4 + 5


def test_labels_are_nothing_to_a_decoder_alone() -> None:
    model = tiny_model("olmoe")
    batch = token_batch(model)
    inputs, mask = with_decoder_inputs(model, {**batch, "labels": batch["input_ids"]})
    assert inputs.keys() == batch.keys() and mask is None
    assert decoder_layers(model, [layer.path for layer in find_moe_layers(model)]) == set()


def test_no_token_to_start_with() -> None:
    model = switch_transformers(decoder_start_token_id=None, pad_token_id=None)
    with pytest.raises(SieveError, match="neither decoder_start_token_id nor pad_token_id"):
        profile_routing(model, [token_batch(model)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_that_reads_the_padding_of_its_encoder(side: str) -> None:
    """Block diffusion: of as many tokens as the batch has, too, none of the decoder's is padding."""
    model = block_diffusion()
    rows = [torch.randint(4, 128, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 14)]
    torch.manual_seed(0)  # the model draws what the decoder reads
    expected = profile_routing(model, [{"input_ids": row[None]} for row in rows])
    top_k = expected.num_experts_per_tok
    for path, counts in expected.counts.items():
        assert counts.sum() == top_k * (3 * 14 if "decoder" in path else 28), path
    assert any("decoder" in path for path in expected.counts)
    batch = {"input_ids": torch.zeros(3, 14, dtype=torch.long), "attention_mask": torch.zeros(3, 14, dtype=torch.long)}
    for row, ids in enumerate(rows):
        place = slice(0, len(ids)) if side == "right" else slice(14 - len(ids), 14)
        batch["input_ids"][row, place], batch["attention_mask"][row, place] = ids, 1
    torch.manual_seed(0)
    profile = profile_routing(model, [batch])
    assert (profile.num_tokens, profile.num_samples) == (28, 3)
    for path, counts in expected.counts.items():
        assert torch.equal(profile.counts[path], counts), path
        assert torch.allclose(profile.sample_mass[path], expected.sample_mass[path], rtol=1e-4), path


def test_a_decoder_that_is_told_what_padding_is() -> None:
    model = block_diffusion()
    batch = token_batch(model, batch=2, length=10)
    batch["attention_mask"][0, 7:] = 0
    batch["decoder_input_ids"] = batch["input_ids"][:, :6]
    batch["decoder_attention_mask"] = torch.cat((batch["attention_mask"], torch.ones(2, 6, dtype=torch.long)), 1)
    profile = profile_routing(model, [batch])
    alone = [{"input_ids": batch["input_ids"][[0], :7], "decoder_input_ids": batch["decoder_input_ids"][[0]]}]
    alone += [{name: batch[name][[1]] for name in ("input_ids", "decoder_input_ids")}]
    for path, counts in profile_routing(model, alone).counts.items():
        assert counts.sum() == profile.num_experts_per_tok * (12 if "decoder" in path else 17), path
        assert profile.counts[path].sum() == counts.sum(), path
