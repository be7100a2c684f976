"""Pictures, and small vision-language models with their processors; neither needs torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaProcessor,
    AutoTokenizer,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.architectures.tiny import tiny_config
from tests.models import TINY_OLMOE

_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}" + PLACEHOLDER + "{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


class ImagesOnly(Qwen3VLProcessor):
    """Without the processor of videos, which torchvision has to be there for."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        super().__init__(image_processor, tokenizer, None, chat_template)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def picture(seed: int, width: int = 28, height: int = 20) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def qwen_processor() -> ImagesOnly:
    tokenizer = AutoTokenizer.from_pretrained(TINY_OLMOE)
    tokenizer.add_tokens(_TOKENS, special_tokens=True)
    size = {"shortest_edge": 64, "longest_edge": 1024}
    images = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=size)
    return ImagesOnly(images, tokenizer, CHAT_TEMPLATE)


def qwen_model(processor: ImagesOnly) -> Qwen3VLMoeForConditionalGeneration:
    """Two layers of 8 experts, top-2, with random weights."""
    start, end, image, video = processor.tokenizer.convert_tokens_to_ids(_TOKENS)
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 24,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def aria_model(folder: str) -> AriaForConditionalGeneration:
    """A model whose processor is saved in its folder."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_OLMOE, extra_special_tokens={"image_token": "<|img|>"})
    template = CHAT_TEMPLATE.replace(PLACEHOLDER, "<|img|>")
    AriaProcessor(AriaImageProcessorPil(max_image_size=490), tokenizer, chat_template=template).save_pretrained(folder)
    config = tiny_config(AriaConfig)
    config.text_config.vocab_size, config.image_token_index = len(tokenizer), tokenizer.image_token_id
    config.vision_config.image_size, config.vision_config.patch_size = 490, 14
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = AriaForConditionalGeneration(config).eval()
    model.name_or_path = folder
    return model
