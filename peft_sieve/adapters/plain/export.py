"""A sparse adapter as plain LoRA, for programs that do not have this package: all experts, zeros where it has none."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ...checks import choice, must_be
from ...errors import SieveError
from ...files import replaced_when_done
from ...hf.methods import methods
from ...moe.topology import MoELayer
from ...tuners.sieve.config import SieveLoraConfig
from ..new_card import write_card
from ..reading import OpenedAdapter, open_adapter, refuse_settings
from ..stack_layout import is_stack, parameters_of
from .larger_model import for_both, larger_model
from .layouts import LAYOUTS, PlainLora

# Model types whose adapters vLLM reads stacked (its `is_3d_moe_weight`).
STACKED_IN_VLLM = (
    "gpt_oss",
    "interns1_pro",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_omni_moe",
    "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
)

_CHECKPOINT = "Write a whole checkpoint instead (peft-sieve export --merge)"


@dataclass(frozen=True)
class ExportedLora:
    """What `export_lora` wrote.

    Attributes:
        layout: "per_expert", "stacked" or "shared_outer".
        r: rank in the configuration; every pair of factors has it, those of a stacked `gate_up_proj` twice that.
        max_rank: the largest rank that a server must allow.
        num_parameters: numbers in the file, the zeros included.
        path: the folder.
    """

    layout: str
    r: int
    max_rank: int
    num_parameters: int
    path: str


def export_lora(
    adapter: Any,
    output_dir: str | os.PathLike[str],
    *,
    base_model: Any = None,
    layout: str = "auto",
    adapter_name: str | None = None,
    include_router: bool = True,
) -> ExportedLora:
    """Write a sparse adapter as plain LoRA that PEFT, vLLM, SGLang and llama.cpp's converter load without this package.

    It computes the same as the adapter: experts without factors get zeros, factors that experts share are there for
    each of them, the scaling is folded into B (`lora_alpha = r`), factors of lower rank are padded with zeros.
    Embeddings of a resized vocabulary, and those saved with the adapter, go along as in PEFT's own files. Where the
    base model is the text part of a larger model, loaded from its checkpoint (`AutoModelForCausalLM` of one that sees),
    each tensor is there under the names of both, so that the file loads on both; a warning says so if only the text
    model can load it. Base weights are not read.

    Args:
        adapter: a `PeftModel`, or the path or Hub id of a saved adapter.
        output_dir: folder for `adapter_config.json`, `adapter_model.safetensors` and `README.md`; the files in it
            are replaced together or not at all.
        base_model: for a saved adapter: the base model, or its path or Hub id, of which the configuration is read;
            None takes what the adapter names.
        layout: "per_expert" (a pair of factors per expert and projection, named as in the base model's checkpoint),
            "stacked" (PEFT's `target_parameters`: a pair per stack of experts), "auto" (one of these two: what the
            servers of this model read) or "shared_outer" (for adapters with `share_outer`: A of gate and up and B of
            down once per layer, for SGLang with `experts_shared_outer_loras` and vLLM with `enable_moe_shared_loras`;
            PEFT does not load it).
        adapter_name: which adapter of the model; needed if it holds several sieve adapters.
        include_router: False leaves the router's adapter out, which changes what is computed; for servers that have
            no LoRA on routers.

    Returns:
        The layout chosen and the rank to allow.

    Raises:
        SieveError: the adapter holds what plain LoRA or its servers cannot, or the layout cannot be loaded for this
            base model; nothing was written.
    """
    choice("layout", layout, ("auto", *LAYOUTS))
    output = _checked_output(output_dir)
    opened = open_adapter(adapter, base_model, adapter_name, _refuse_what_is_no_lora)
    layers = opened.moe_layers()
    _refuse_layouts_without_lora(layers)
    if layout == "shared_outer":
        _refuse_own_outer_factors(opened.config)
    layouts = _layouts_to_try(layout, opened, layers)
    routers = {router.path for layer in layers for router in layer.routers}
    others = {path: layer for path, layer in opened.other_layers() if include_router or path not in routers}
    _refuse_routers_read_by_weight(layers, others)
    plain, chosen = _laid_out(layouts, opened, layers, others)
    rank = plain.config.r
    with replaced_when_done(output, "LoRA") as staging:
        tensors = {key: make().contiguous() for key, (_, make) in plain.tensors.items()}
        save_file(tensors, os.path.join(staging, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        _write_config(plain.config, Path(staging, CONFIG_NAME))
        text, library = _card_text(opened, layers, plain, chosen), "peft" if plain.for_peft else None
        write_card(opened, staging, "LoRA for {}", text, library=library, tags=["lora", "mixture-of-experts"])
    max_rank = max([rank, *(plain.config.rank_pattern or {}).values()])
    return ExportedLora(chosen, rank, max_rank, sum(t.numel() for t in tensors.values()), str(output))


def _checked_output(output_dir: str | os.PathLike[str]) -> Path:
    if not isinstance(output_dir, str | os.PathLike):
        raise must_be("output_dir", "a folder's path", output_dir)
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise SieveError(f"output_dir {str(output)!r} is a file. Pass a folder, or a path for one.")
    config = output / CONFIG_NAME
    text = config.read_text(errors="replace") if config.exists() else ""
    if any(f'"{method.name}"' in text for method in methods()):
        raise SieveError(
            f"output_dir {str(output)!r} holds an adapter of this package, which the export would replace. Pass "
            "another folder."
        )
    return output


def _refuse_what_is_no_lora(config: SieveLoraConfig) -> None:
    problem = "and servers load low-rank factors only."
    whole = ("modules_to_save", "trainable_token_indices", "bias")
    refuse_settings(config, whole, f"{problem} Load the model, call merge_and_unload() and save it.")
    refuse_settings(config, ("expert_tuning",), f"{problem} {_CHECKPOINT}.")


def _refuse_layouts_without_lora(layers: list[MoELayer]) -> None:
    for layer in layers:
        if layer.linears:
            continue
        if not layer.family.in_stacks:
            raise SieveError(
                f"The experts of {layer.path} have the layout {layer.family.name!r}, and plain LoRA takes only modules "
                f"and stacks of weights. {_CHECKPOINT}."
            )
        for parameter in parameters_of(layer):
            if not is_stack(layer, parameter):
                raise SieveError(
                    f"The experts of {layer.path} have their weights one below the other in {parameter}, a single "
                    f"matrix, for which plain LoRA has one pair of factors. {_CHECKPOINT}."
                )


def _refuse_routers_read_by_weight(layers: list[MoELayer], others: dict[str, LoraLayer]) -> None:
    for layer in layers:
        for router in layer.routers:
            if layer.family.reads_router_weight and router.path in others:
                raise SieveError(
                    f"The model reads the weight of {router.path} instead of calling it, so plain LoRA on this router "
                    f"has no effect. {_CHECKPOINT}, or leave the router's adapter out (include_router=False)."
                )


def _refuse_own_outer_factors(config: SieveLoraConfig) -> None:
    if not config.share_outer:
        raise SieveError(
            "layout='shared_outer' does not fit this adapter, whose experts have own outer factors "
            "(share_outer=False). Pass 'auto'."
        )


def _layouts_to_try(layout: str, opened: OpenedAdapter, layers: list[MoELayer]) -> list[str]:
    if layout == "shared_outer":
        return [layout]
    if any(layer.linears for layer in layers):
        if layout == "stacked":
            raise SieveError(
                "layout='stacked' does not fit a model whose experts are separate modules. Pass 'per_expert' or 'auto'."
            )
        return ["per_expert"]
    if layout != "auto":
        return [layout]
    config = opened.base.config
    types = {config.model_type, config.get_text_config().model_type}
    # What PEFT cannot load a pair of factors per expert for, it can load stacked.
    return ["stacked"] if types.intersection(STACKED_IN_VLLM) else ["per_expert", "stacked"]


def _laid_out(
    layouts: list[str], opened: OpenedAdapter, layers: list[MoELayer], others: dict[str, LoraLayer]
) -> tuple[PlainLora, str]:
    """The first layout that can be loaded, preferably by all that load the base model's checkpoint."""
    rank, larger = _common_rank(opened, others), larger_model(opened.base, opened.base_name, opened.new_skeleton)
    found, errors = [], []
    for layout in layouts:
        try:
            found.append((LAYOUTS[layout](opened, layers, others, rank), layout))
            return (for_both(found[-1][0], larger) if larger else found[-1][0]), layout
        except SieveError as error:
            errors.append(error)
    if not found:
        raise errors[-1]
    assert larger is not None
    text = type(opened.base).__name__
    warnings.warn(
        f"The LoRA loads on {text} only, not on {larger.name}, for which the base model's checkpoint is. "
        f"{errors[-1]} Pass another layout, or train on {larger.name}.",
        stacklevel=3,
    )
    return found[0]


def _common_rank(opened: OpenedAdapter, others: dict[str, LoraLayer]) -> int:
    """One rank for all: servers allocate one, and padding with zeros changes nothing."""
    ranks = [rank for layer in opened.expert_layers().values() for rank in layer.plans[opened.name].ranks.values()]
    return max(ranks + [layer.r[opened.name] for layer in others.values()])


def _write_config(config: LoraConfig, path: Path) -> None:
    # PEFT's own order of a set differs from run to run.
    content = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _card_text(opened: OpenedAdapter, layers: list[MoELayer], plain: PlainLora, layout: str) -> str:
    plans = [layer.plans[opened.name] for layer in opened.expert_layers().values()]
    own, shared = (sum(len(getattr(plan, which)) for plan in plans) for which in ("experts", "cold"))
    together = f"; {shared} others use one adapter per layer together" if shared else ""
    readers = "with PEFT, and with servers that read LoRA for this model, without any plugin"
    if not plain.for_peft:
        readers = "in SGLang (`--experts-shared-outer-loras`) and vLLM (`--enable-moe-shared-loras`), not in PEFT"
    return (
        f"A sparse expert adapter ({own} of {sum(layer.num_experts for layer in layers)} routed experts{together}) "
        f"written as plain LoRA by `peft_sieve`, layout `{layout}`. The factors of experts without an adapter are "
        f"zeros; the scaling is folded into B. It loads {readers}."
    )
