"""Samples with images: found in rows, put into messages, and made into batches by the model's processor.

As by TRL's vision collator, so that the router is profiled on the tokens of text and images that training shows it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from transformers import AutoProcessor

from ...checks import one_line, quoted
from ...errors import SieveError, out_of_memory
from .chats import ChatRenderer
from .conversations import Conversation
from .tokenizer_settings import settings_restored

IMAGE_COLUMNS = ("images", "image")
_PAYLOADS = ("image", "url", "path", "base64")  # where transformers looks for the image of a part
_OTHER_PARTS = ("image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio")


@dataclass(frozen=True)
class Captioned:
    """A text with placeholders, and the images for them."""

    text: str
    images: list[Any]
    where: str


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The images beside a row's text; an empty list if there are none."""
    return [image for column in IMAGE_COLUMNS for image in _listed(row.get(column))]


def _listed(value: Any) -> list[Any]:
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if item is not None]


def with_images(conversation: Conversation, images: list[Any]) -> Conversation:
    """The conversation with an image in every placeholder; without placeholders, they precede the user's first words.

    Raises:
        SieveError: there are more or fewer placeholders than images, or parts that are neither text nor an image.
    """
    messages = list(conversation.messages)
    for part in (part for message in messages for part in _parts(message)):
        if part.get("type") in _OTHER_PARTS:
            unread = f"a part of the type {part['type']!r}, which calibration does not read"
            raise SieveError(f"{conversation.where} has {unread}. Pass batches that the model's processor made.")
    if images and not wants_images(conversation):
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if first is not None and isinstance(messages[first].get("content"), str):
            text = {"type": "text", "text": messages[first]["content"]}
            messages[first] = {**messages[first], "content": [*({"type": "image"} for _ in images), text]}
    places = sum(map(_is_placeholder, _all_parts(messages)))
    if places != len(images):
        raise SieveError(
            f"{conversation.where} has {len(images)} images in its columns {quoted(IMAGE_COLUMNS)}, and its messages "
            f"have {places} placeholders for images. The numbers must be the same."
        )
    left = iter(images)
    for i, message in enumerate(messages):
        if any(map(_is_placeholder, _parts(message))):
            filled = [{**p, "image": next(left)} if _is_placeholder(p) else p for p in message["content"]]
            messages[i] = {**message, "content": filled}
    return replace(conversation, messages=messages)


def wants_images(conversation: Conversation) -> bool:
    """Whether its messages have placeholders."""
    return any(map(_is_placeholder, _all_parts(conversation.messages)))


def has_images(sample: Any) -> TypeGuard[Captioned | Conversation]:
    """Whether a sample is one for the processor."""
    if isinstance(sample, Conversation):
        return any(part.get("type") == "image" for part in _all_parts(sample.messages))
    return isinstance(sample, Captioned)


def image_batches(
    samples: Sequence[Captioned | Conversation],
    tokenizer: Any,
    max_length: int,
    batch_size: int,
    dtype: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """Batches for the model, `batch_size` samples each, in their order, padded on the right.

    Args:
        samples: those with images.
        tokenizer: the model's processor, or its tokenizer, beside which the processor was saved.
        max_length: tokens of a sample, those of its images included.
        batch_size: samples per batch.
        dtype: floating type of what is made of images; None leaves it.

    Raises:
        SieveError: there is no processor, it failed, or the chat template does not show a turn.
    """
    if not samples:
        return []
    processor = _find_processor(tokenizer, samples[0].where)
    renderer = ChatRenderer(processor, tokenizer if processor is not tokenizer else processor.tokenizer)
    options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": max_length}
    batches = []
    with settings_restored(processor.tokenizer):
        for start in range(0, len(samples), batch_size):
            chosen = samples[start : start + batch_size]
            texts = [sample.text if isinstance(sample, Captioned) else renderer.text(sample) for sample in chosen]
            images = [sample.images if isinstance(sample, Captioned) else _images_in(sample) for sample in chosen]
            try:
                # The template has put the special tokens.
                made = processor(text=texts, images=images, return_tensors="pt", add_special_tokens=False, **options)
            except Exception as error:
                if out_of_memory(error):
                    raise
                rows = " to ".join(dict.fromkeys((chosen[0].where, chosen[-1].where)))
                raise SieveError(
                    f"The processor {type(processor).__name__} failed on {rows}. "
                    f"{type(error).__name__}: {one_line(error)}. If a sample was cut within an image, raise max_length "
                    f"(calib_max_length), which is {max_length}."
                ) from error
            batches.append({name: _cast(value, dtype) for name, value in made.items()})
    renderer.warn()
    return batches


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    # Not every vision tower casts its input to the type of its weights.
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() and dtype else value


def _find_processor(tokenizer: Any, where: str) -> Any:
    """The processor: the one given, or the one saved with the tokenizer."""
    if getattr(tokenizer, "image_processor", None) is not None:
        return tokenizer
    cause: Exception | None = None
    name = getattr(tokenizer, "name_or_path", None)
    if name:
        try:
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            # One that was changed since does not have the tokens of the processor's.
            if hasattr(processor, "image_processor") and processor.tokenizer.get_vocab() == tokenizer.get_vocab():
                return processor
        except Exception as error:  # transformers raises whatever it meets, as an AttributeError without torchvision
            cause = error
    reader = "there is no tokenizer" if tokenizer is None else f"{type(tokenizer).__name__} reads text only"
    problem = f" The processor of {name!r} cannot be loaded: {one_line(cause)}." if cause else ""
    raise SieveError(
        f"{where} has images, but {reader}.{problem} Pass the model's processor (AutoProcessor.from_pretrained) as "
        "tokenizer, which is calib_tokenizer in a configuration, or leave the images out."
    ) from cause


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _all_parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (part for message in messages for part in _parts(message))


def _is_placeholder(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image" and not any(key in part for key in _PAYLOADS)


def _images_in(conversation: Conversation) -> list[Any]:
    images = (part for part in _all_parts(conversation.messages) if part.get("type") == "image")
    return [next(part[key] for key in _PAYLOADS if key in part) for part in images]
