"""The section that an adapter of this package adds to its model card."""

from __future__ import annotations

import os
import re
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .methods import adapters_of_package

START, END = "<!-- peft_sieve -->", "<!-- /peft_sieve -->"
# PEFT ends a card with its list of versions.
_VERSIONS = "### Framework versions"
_TEMPLATE_TITLE = "# Model Card for Model ID"
# What transformers fills in.
_TEMPLATE_DESCRIPTION = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."

_LOADING = """Loading needs the package (`pip install peft-sieve`), and it imported, before PEFT reads the adapter:

```python
import peft_sieve  # registers the adapter type with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("REPO_OR_PATH_OF_THIS_ADAPTER")
```
"""


def add_to_card(model: Any, path: str, *, for_hub: bool) -> None:
    """Write a section for each adapter of this package into the card of a `PeftModel`, in place of earlier ones.

    Args:
        for_hub: the Hub is to take it, which refuses a card whose base model is a local folder.
    """
    adapters = adapters_of_package(model)
    card = ModelCard.load(path)
    tags = {tag for _, _, method in adapters for tag in method.tags}
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *tags, "peft_sieve"})
    if for_hub and not _is_repository(str(card.data.get("base_model", "org/name"))):
        card.data.pop("base_model")
        card.data["tags"] = [tag for tag in card.data["tags"] if not tag.startswith("base_model:")]
    described = [
        section(model, name, method.title, f"{method.title} for {base_link(model)}")
        if method.describe is None
        else method.describe(model, name, config)
        for name, config, method in adapters
    ]
    block = "\n\n".join([START, *described, END])
    text = re.sub(re.escape(START) + ".*?" + re.escape(END), "", card.text, flags=re.DOTALL).strip()
    before, versions, after = text.partition(_VERSIONS)
    if _is_blank(before):
        # It says nothing that the section does not.
        before = f"# {adapters[0][2].title} for {_base_name(model)}"
    card.text = f"\n{before.rstrip()}\n\n{block}\n\n{versions}{after}".rstrip() + "\n"
    card.save(path)


def section(model: Any, adapter_name: str, title: str, what: str, *more: str) -> str:
    """A section of a card: what the adapter is, how large, how it is loaded.

    Args:
        title: of the section, without the adapter's name.
        what: a sentence, without "made with" and its full stop.
        more: lines at the end.
    """
    named = "" if adapter_name == "default" else f" (`{adapter_name}`)"
    parameters = [p for n, p in model.named_parameters() if f".{adapter_name}." in n]
    size = sum(p.numel() * p.element_size() for p in parameters) / 1e6
    counted = f"{sum(p.numel() for p in parameters):,} parameters, {size:.1f} MB"
    return "\n".join([f"## {title}{named}", "", f"{what}, made with `peft_sieve`. {counted}.", "", _LOADING, *more])


def base_link(model: Any) -> str:
    """The name of a model's base, with a link if it is a repository."""
    name = _base_name(model)
    return f"[{name}](https://huggingface.co/{name})" if _is_repository(name) else f"`{name}`"


def _base_name(model: Any) -> str:
    return getattr(model.get_base_model(), "name_or_path", "") or "the base model"


def _is_repository(name: str) -> bool:
    """Whether `name` can be a repository id: a path on disk of the same form is taken for what it is."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not os.path.exists(name)


def _is_blank(text: str) -> bool:
    """Whether `text` is the Hub's template with every blank left blank."""
    if _TEMPLATE_TITLE not in text:
        return False
    lines = {line for line in text.splitlines() if not line.startswith(_TEMPLATE_DESCRIPTION)}
    return lines <= set(ModelCard.from_template(ModelCardData()).text.splitlines())
