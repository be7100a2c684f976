"""Which tokens are real, in every form of mask that models take: padding never counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_sieve import RoutingProfile, SieveError, profile_routing
from peft_sieve.routing.encoder_decoder import IGNORED
from peft_sieve.routing.masks import real_tokens
from peft_sieve.training.warm_up import _with_labels
from tests.models import tiny_model, token_batch
from tests.module_models import switch_transformers

LENGTHS = [(8, 7), (12, 8)]  # samples of two rows of 30 tokens: 35 are real
WIDTH = 30


def rows_of_samples() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(2, 30) tokens, and the samples in them."""
    ids = torch.randint(3, 128, (2, WIDTH), generator=torch.Generator().manual_seed(0))
    samples = [part for row, n in zip(ids, LENGTHS, strict=True) for part in row[: sum(n)].split(list(n))]
    return ids, samples


def block_diagonal(padding: bool = False, causal: bool = True) -> torch.Tensor:
    """(2, 1, 30, 30): which tokens attend to which; `padding` attends to itself."""
    blocks = torch.zeros(2, 1, WIDTH, WIDTH, dtype=torch.bool)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            block = torch.ones(length, length, dtype=torch.bool)
            blocks[row, 0, start : start + length, start : start + length] = block.tril() if causal else block
            start += length
    return blocks | torch.eye(WIDTH, dtype=torch.bool) if padding else blocks


def additive(attends: torch.Tensor, low: float) -> torch.Tensor:
    return torch.zeros(attends.shape).masked_fill(~attends, low)


def one_by_one(model: Any, samples: list[torch.Tensor], **inputs: Any) -> RoutingProfile:
    return profile_routing(model, [{"input_ids": sample[None], **inputs} for sample in samples])


def same(profile: RoutingProfile, expected: RoutingProfile) -> None:
    assert (profile.num_tokens, profile.num_samples) == (expected.num_tokens, expected.num_samples)
    for path, counts in expected.counts.items():
        assert torch.equal(profile.counts[path], counts), path
        assert torch.allclose(profile.sample_mass[path], expected.sample_mass[path], rtol=1e-4), path


@pytest.mark.parametrize(
    "mask",
    [
        block_diagonal(),
        block_diagonal(padding=True),
        block_diagonal().expand(2, 4, WIDTH, WIDTH),
        additive(block_diagonal(), torch.finfo(torch.float32).min),
        additive(block_diagonal(padding=True), float("-inf")),
        additive(block_diagonal(), -1e4).half(),
    ],
    ids=["boolean", "padding attends to itself", "heads", "additive", "infinite", "half"],
)
def test_packed_samples_with_padding_behind_them(mask: torch.Tensor) -> None:
    model = tiny_model("olmoe")
    ids, samples = rows_of_samples()
    expected = one_by_one(model, samples)
    assert expected.num_tokens == 35
    same(profile_routing(model, [{"input_ids": ids, "attention_mask": mask}]), expected)
    assert real_tokens(mask).sum() == 35


def test_masks_for_kinds_of_layers() -> None:
    model = tiny_model("gpt_oss", sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ids, samples = rows_of_samples()
    full = block_diagonal()
    masks = {"full_attention": full, "sliding_attention": full.triu(-3)}
    masks = {kind: additive(mask, torch.finfo(torch.float32).min) for kind, mask in masks.items()}
    profile = profile_routing(model, [{"input_ids": ids, "attention_mask": masks}])
    same(profile, one_by_one(model, samples))
    masks["sliding_attention"] = masks["sliding_attention"].roll(1, -1)
    with pytest.raises(SieveError, match="item 0 .*do not agree on which tokens are padding"):
        profile_routing(model, [{"input_ids": ids, "attention_mask": masks}])


def test_what_a_mask_adds_stays() -> None:
    """Distances, as ALiBi has them; another slope in each head."""
    model = tiny_model("olmoe")
    ids, samples = rows_of_samples()
    place = torch.arange(WIDTH)
    distances = (place[:, None] - place).clamp(min=0)[None, None] * torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1)
    mask = additive(block_diagonal(), -1e9) - distances
    profile = profile_routing(model, [{"input_ids": ids, "attention_mask": mask}])
    alone = []
    for sample in samples:
        later = torch.full((len(sample), len(sample)), -1e9).triu(1)
        own = later - distances[..., : len(sample), : len(sample)]
        alone.append({"input_ids": sample[None], "attention_mask": own})
    same(profile, profile_routing(model, alone))
    assert profile != one_by_one(model, samples)


def test_what_attends_in_both_directions_keeps_its_mask() -> None:
    model = tiny_model("olmoe")
    ids, samples = rows_of_samples()
    profile = profile_routing(model, [{"input_ids": ids, "attention_mask": block_diagonal(causal=False)}])
    alone = [
        {"input_ids": s[None], "attention_mask": torch.ones(1, 1, len(s), len(s), dtype=torch.bool)} for s in samples
    ]
    expected = profile_routing(model, alone)
    same(profile, expected)
    assert profile != one_by_one(model, samples)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("nothing_empty", [False, True])
def test_one_sample_a_row(side: str, nothing_empty: bool) -> None:
    """As transformers makes such masks of padding: each query attends to what is no padding before it."""
    model = tiny_model("olmoe")
    ids = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 10, dtype=torch.bool)
    real[1, slice(0, 4) if side == "left" else slice(6, None)] = False
    mask = torch.ones(10, 10, dtype=torch.bool).tril() & real[:, None, None]
    if nothing_empty:  # some kernels give nan for a query that attends to nothing
        mask |= ~mask.any(-1, keepdim=True)
    assert torch.equal(real_tokens(mask), real)
    profile = profile_routing(model, [{"input_ids": ids, "attention_mask": mask}])
    same(profile, one_by_one(model, [ids[0], ids[1][real[1]]]))
    labels = _with_labels({"input_ids": ids, "attention_mask": mask})["labels"]
    assert torch.equal(labels != IGNORED, real)


def test_a_mask_for_all_rows() -> None:
    model = tiny_model("olmoe")
    ids = torch.randint(3, 128, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[6:] = False
    profile = profile_routing(model, [{"input_ids": ids, "attention_mask": mask[None, None]}])
    same(profile, one_by_one(model, list(ids[:, :6])))


def test_kinds_of_attention_without_padding() -> None:
    whole = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    image_at_the_end = whole.tril()
    image_at_the_end[..., 3:, 3:] = True
    for mask in (whole, whole.tril(), whole.tril().triu(-1), image_at_the_end, whole[..., :1, :1]):
        assert real_tokens(mask).all()
    assert real_tokens(None) is None
    assert real_tokens({"full_attention": None}) is None


def test_masks_of_a_decoder() -> None:
    model = switch_transformers()
    batch = token_batch(model)
    batch["decoder_input_ids"] = batch["input_ids"][:, :5]
    with pytest.raises(SieveError, match=r"`decoder_attention_mask` of item 0.*torch.int64"):
        profile_routing(model, [{**batch, "decoder_attention_mask": torch.ones(3, 1, 5, 5).long()}])
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, :, 3:] = False
    profile = profile_routing(model, [{**batch, "decoder_attention_mask": additive(mask, -1e9)}])
    two = torch.tensor([5, 3, 5])[:, None] > torch.arange(5)
    expected = profile_routing(model, [{**batch, "decoder_attention_mask": two.long()}])
    assert profile.counts.keys() == expected.counts.keys()
    for path, counts in expected.counts.items():
        assert torch.equal(profile.counts[path], counts), path


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(2, 30, 30), r"has the shape \(2, 30, 30\), in which padding cannot be told"),
        (torch.ones(30), r"has the shape \(30,\)"),
        ("causal", "has the type str"),
        (block_diagonal().long(), "values of type torch.int64 that are neither"),
        (block_diagonal().float(), "values of type torch.float32 that are neither"),
        (block_diagonal()[..., :20, :], r"has the shape \(2, 1, 20, 30\) and `input_ids` the shape \(2, 30\)"),
        ({"full_attention": torch.ones(2, 30, 30)}, r"\['full_attention'\] has the shape"),
        (additive(torch.ones(2, 30).bool().tril(), -1e4), r"of shape \(2, 30\) has negative values"),
    ],
)
def test_what_cannot_be_read_is_refused(mask: Any, text: str) -> None:
    ids, _ = rows_of_samples()
    with pytest.raises(SieveError, match=f"`attention_mask` of item 0.*{text}"):
        profile_routing(tiny_model("olmoe"), [{"input_ids": ids, "attention_mask": mask}])
