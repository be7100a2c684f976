"""The card of what was written from an adapter: a plain LoRA, or a merged checkpoint."""

from __future__ import annotations

import os

from huggingface_hub import ModelCard, ModelCardData

from .reading import OpenedAdapter


def write_card(
    opened: OpenedAdapter, folder: str, title: str, text: str, *, library: str | None, tags: list[str]
) -> None:
    """Write `README.md`, which names the base model if that is on the Hub.

    Args:
        title: with `{}` in the place of the base model.
        library: that loads it, None for servers alone.
    """
    on_hub = opened.base_name if opened.base_name and not os.path.exists(opened.base_name) else None
    data = ModelCardData(base_model=on_hub, library_name=library, tags=tags)
    title = title.format(on_hub or ("A" if title.startswith("{") else "a") + " Mixture-of-Experts model")
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n").save(os.path.join(folder, "README.md"))
