"""What encoder-decoders read while they are profiled."""

from __future__ import annotations

import pytest
import torch

from peft_sieve import SieveError, profile_routing
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing.encoder_decoder import decoder_layers, with_decoder_inputs
from tests.models import tiny_model, token_batch
from tests.module_models import nllb_moe, switch_transformers

ENCODER, DECODER = "encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts"


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
