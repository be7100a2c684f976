"""The card of what was written from an adapter: a plain LoRA, or a merged checkpoint."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .reading import OpenedAdapter


def write_card(opened: OpenedAdapter, path: Path, text: str, *, library_name: str, tags: list[str]) -> None:
    """Write a card that names the base model, if that is on the Hub.

    Args:
        text: with the title.
    """
    data = ModelCardData(base_model=opened.base_repository, library_name=library_name, tags=tags)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)
