"""The section that an adapter of this package adds to its model card."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from ..tuners.epng.config import EpngConfig
from ..tuners.lora_moe.config import LoraMoeConfig
from ..tuners.perft.config import PerftConfig
from ..tuners.sieve.config import SieveLoraConfig

START, END = "<!-- peft_sieve -->", "<!-- /peft_sieve -->"
# PEFT ends a card with its list of versions.
VERSIONS = "### Framework versions"
TEMPLATE_TITLE = "# Model Card for Model ID"
# What transformers fills in.
TEMPLATE_DESCRIPTION = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."

LOADING = (
    "Loading needs the package (`pip install peft-sieve`), and it imported, before PEFT reads the adapter:",
    "",
    "```python",
    "import peft_sieve  # registers the adapter type with PEFT",
    "from peft import AutoPeftModelForCausalLM",
    "",
    'model = AutoPeftModelForCausalLM.from_pretrained("REPO_OR_PATH_OF_THIS_ADAPTER")',
    "```",
    "",
)


@dataclass(frozen=True)
class _Kind:
    """What the cards of one configuration class have: tags, a title, and a section for each adapter."""

    tags: tuple[str, ...]
    title: str
    section: Callable[[PeftModel, str, Any], str]


def add_to_card(model: PeftModel, path: str) -> None:
    """Write the section into the card at `path`, in place of an earlier one."""
    card = ModelCard.load(path)
    found = [(name, config, kind) for name, config in model.peft_config.items() if (kind := _kind(config))]
    tags = {tag for _, _, kind in found for tag in kind.tags}
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *tags, "peft_sieve"})
    if not _is_repository(str(card.data.get("base_model", "org/name"))):
        # The Hub refuses a card whose base model is a local folder.
        card.data.pop("base_model")
        card.data["tags"] = [tag for tag in card.data["tags"] if not tag.startswith("base_model:")]
    sections = [kind.section(model, name, config) for name, config, kind in found]
    block = "\n\n".join([START, *sections, END])
    text = re.sub(re.escape(START) + ".*?" + re.escape(END), "", card.text, flags=re.DOTALL).strip()
    before, versions, after = text.partition(VERSIONS)
    if _is_blank(before):
        # It says nothing that the section does not.
        before = f"# {found[0][2].title} for {_base_name(model)}"
    card.text = f"\n{before.rstrip()}\n\n{block}\n\n{versions}{after}".rstrip() + "\n"
    card.save(path)


def _kind(config: Any) -> _Kind | None:
    return next((kind for config_type, kind in _KINDS.items() if isinstance(config, config_type)), None)


def _is_blank(text: str) -> bool:
    """Whether `text` is the Hub's template with every blank left blank."""
    if TEMPLATE_TITLE not in text:
        return False
    lines = {line for line in text.splitlines() if not line.startswith(TEMPLATE_DESCRIPTION)}
    return lines <= set(ModelCard.from_template(ModelCardData()).text.splitlines())


def _section(model: PeftModel, adapter_name: str, config: SieveLoraConfig) -> str:
    mask = config.selected_experts or {}
    adapted, total = sum(map(len, mask.values())), sum(shape[0] for shape in (config.expert_shapes or {}).values())
    lines = [
        f"## Sparse expert adapter{_suffix(adapter_name)}",
        "",
        f"{_method(config)} for {_linked(_base_name(model))} on {adapted} of {total} routed experts, "
        f"{_choice(config)}, made with `peft_sieve`. "
        f"{_size(model, adapter_name)}.",
        "",
        *LOADING,
        *_selection(config),
    ]
    return "\n".join(lines)


def _method(config: SieveLoraConfig) -> str:
    return f"LoRA ({_ranks(config)})" if config.expert_tuning == "lora" else "Full tuning"


def _perft_section(model: PeftModel, adapter_name: str, config: PerftConfig) -> str:
    total = sum(shape[0] for shape in (config.expert_shapes or {}).values())
    mask = config.selected_experts
    share = "each expert" if mask is None else f"each of {sum(map(len, mask.values()))} of {total} experts"
    kinds = {
        "R": f"{config.num_adapters} adapters, of which a router picks {config.num_adapters_per_tok} for each token,",
        "E": f"an adapter for {share},",
        "D": f"{config.num_adapters} adapters",
        "S": "one adapter",
    }
    lines = [
        f"## PERFT adapter{_suffix(adapter_name)}",
        "",
        f"PERFT-{config.variant} ([arXiv 2508.02587](https://arxiv.org/abs/2508.02587)) for "
        f"{_linked(_base_name(model))}: {kinds[config.variant]} beside each MoE block "
        f"({config.form}, rank {config.r}), made with `peft_sieve`. "
        f"{_size(model, adapter_name)}.",
        "",
        *LOADING,
        *(_selection(config) if config.selected_experts else ()),
    ]
    return "\n".join(lines)


def _lora_moe_section(model: PeftModel, adapter_name: str, config: LoraMoeConfig) -> str:
    kept = config.kept_experts or {}
    pruned = ""
    if kept:
        left, total = sum(map(len, kept.values())), len(kept) * config.num_experts
        pruned = f", of which pruning left {left} of {total} in {len(kept)} layers"
    lines = [
        f"## LoRA experts{_suffix(adapter_name)}",
        "",
        f"{config.num_experts} LoRA experts of rank {config.r} and a router, which picks {config.top_k} of them for "
        f"each token, around each adapted linear layer of {_linked(_base_name(model))}{pruned} (DMEP, "
        "[arXiv 2604.26340](https://arxiv.org/abs/2604.26340)), made with `peft_sieve`. "
        f"{_size(model, adapter_name)}.",
        "",
        *LOADING,
    ]
    return "\n".join(lines)


def _suffix(adapter_name: str) -> str:
    return "" if adapter_name == "default" else f" (`{adapter_name}`)"


def _size(model: PeftModel, adapter_name: str) -> str:
    parameters = [p for n, p in model.named_parameters() if f".{adapter_name}." in n]
    count = sum(p.numel() for p in parameters)
    return f"{count:,} parameters, {sum(p.numel() * p.element_size() for p in parameters) / 1e6:.1f} MB"


def _selection(config: SieveLoraConfig | PerftConfig) -> list[str]:
    """Where the experts come from, and the table of them."""
    rows = [_row(config, path) for path in config.selected_experts or {}]
    return [*_calibration(config), "| layer | experts | coverage |", "| --- | --- | --- |", *rows]


def _ranks(config: SieveLoraConfig) -> str:
    if not isinstance(config, EpngConfig) or not config.expert_blocks:
        return f"rank {config.r}"
    ranks = [n * config.rank_block for path in config.selected_experts or {} for n in config.blocks_in(path)]
    return f"rank {min(ranks)} to {max(ranks)}, {config.r} at the start"


def _choice(config: SieveLoraConfig) -> str:
    """How the experts and their ranks came about."""
    if isinstance(config, EpngConfig):
        return (
            "pruned and grown by the routing during training at a fixed number of parameters (EPnG, "
            "[arXiv 2607.01789](https://arxiv.org/abs/2607.01789))"
        )
    return (
        "chosen by how often the task routes to them (MoE-Sieve, [arXiv 2603.24044](https://arxiv.org/abs/2603.24044))"
    )


def _base_name(model: PeftModel) -> str:
    return getattr(model.get_base_model(), "name_or_path", "") or "the base model"


def _linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _is_repository(name) else f"`{name}`"


def _is_repository(name: str) -> bool:
    """Whether `name` can be a repository id: a path on disk of the same form is taken for what it is."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not os.path.exists(name)


def _calibration(config: SieveLoraConfig | PerftConfig) -> list[str]:
    known: dict[str, Any] = config.calibration or {}
    if not known:
        if isinstance(config, EpngConfig):
            return []
        return ["The experts were given by hand or by an earlier calibration.", ""]
    text = (
        f"Calibrated on {known.get('samples')} samples ({known.get('tokens'):,} tokens) of `{known.get('dataset')}`, "
        f"score `{known.get('score')}`, strategy `{known.get('strategy')}`. Coverage is the share of a layer's routed "
        "tokens (or gate weight, by the score) that its adapted experts received."
    )
    return [text, ""]


def _row(config: SieveLoraConfig | PerftConfig, path: str) -> str:
    ids = (config.selected_experts or {})[path]
    num_experts = (config.expert_shapes or {}).get(path, [0])[0]
    coverage = ((config.calibration or {}).get("coverage") or {}).get(path)
    return f"| {path} | {len(ids)} of {num_experts} | {'' if coverage is None else f'{coverage:.1%}'} |"


_KINDS = {
    SieveLoraConfig: _Kind(("lora", "mixture-of-experts"), "Sparse LoRA", _section),
    PerftConfig: _Kind(("perft", "mixture-of-experts"), "PERFT adapters", _perft_section),
    LoraMoeConfig: _Kind(("lora-moe",), "LoRA experts", _lora_moe_section),
}
