"""Positions of tokens: the model's business wherever it finds them itself, also on the left of padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import pad
from transformers import RobertaConfig, RobertaModel

from peft_sieve import profile_routing
from peft_sieve.moe.topology import find_moe_layers
from peft_sieve.routing.model_inputs import backbone_forward
from tests.architectures.recount import recounted
from tests.architectures.tiny import tiny_model

IMAGE, IMAGE_TOKENS = 4, 6


def samples_with_images(model: Any) -> list[dict[str, torch.Tensor]]:
    """Three of different lengths, each with an image of 2 x 3 tokens in its midst."""
    vision, generator = model.config.vision_config, torch.Generator().manual_seed(3)
    height, width = 2 * vision.spatial_merge_size, 3 * vision.spatial_merge_size
    channels = getattr(vision, "in_channels", 3) * vision.patch_size**2 * vision.temporal_patch_size
    samples = []
    for before, after in ((3, 4), (6, 8), (9, 5)):
        ids = torch.randint(5, 128, (1, before + IMAGE_TOKENS + after), generator=generator)
        ids[:, before : before + IMAGE_TOKENS] = IMAGE
        samples.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == IMAGE).long(),
                "image_grid_thw": torch.tensor([[1, height, width]]),
                "pixel_values": torch.randn(height * width, channels, generator=generator),
            }
        )
    return samples


def together(samples: list[dict[str, torch.Tensor]], side: str) -> dict[str, torch.Tensor]:
    width = max(sample["input_ids"].shape[1] for sample in samples)
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name.endswith(("_ids", "_mask")):
            missing = [width - value.shape[1] for value in values]
            values = [pad(v, (n, 0) if side == "left" else (0, n)) for v, n in zip(values, missing, strict=True)]
        batch[name] = torch.cat(values)
    return batch


@pytest.mark.parametrize(
    "name",
    [
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration",
        "Qwen4ExpForConditionalGeneration",
    ],
)
def test_padding_beside_images_does_not_move_them(name: str) -> None:
    model = tiny_model(getattr(transformers, name))
    model.config.image_token_id = IMAGE
    samples = samples_with_images(model)
    with torch.no_grad(), recounted(model, {x.path: x.num_experts for x in find_moe_layers(model)}) as expected:
        for sample in samples:
            model(**sample)
    model.model.rope_deltas = before = torch.tensor([[7]])
    for side in ("left", "right"):
        profile = profile_routing(model, [together(samples, side)])
        for path, counts in expected.items():
            assert torch.equal(profile.counts[path], counts), (side, path)
    assert model.model.rope_deltas is before  # of the prompt that is being answered


def test_positions_that_a_model_counts_from_its_padding_token() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    torch.manual_seed(0)
    model = RobertaModel(RobertaConfig(vocab_size=32, max_position_embeddings=16, **sizes)).eval()
    ids = torch.tensor([[1, 1, 5, 6], [7, 8, 9, 10]])
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    embedded: list[torch.Tensor] = []
    model.embeddings.register_forward_hook(lambda module, args, output: embedded.append(output))
    with torch.no_grad():
        model(**batch)
        backbone_forward(model)(batch)
    assert torch.equal(*embedded)
