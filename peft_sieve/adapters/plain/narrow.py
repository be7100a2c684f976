"""An ordinary LoRA on all experts, narrowed to the experts that a task uses."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from ...checks import must_be
from ...errors import SieveError
from ...moe.topology import find_moe_layers
from ...routing.profile import RoutingProfile
from ...routing.selection import ExpertSelection, select_experts
from ...routing.strategies import SelectionOptions
from ...tuners.common.config import checked_mask
from ...tuners.common.mask import check_mask
from ...tuners.common.provenance import provenance
from ...tuners.sieve.config import SieveLoraConfig
from ..reading import assign, refuse_settings
from .factors import embedding_tensors
from .full_lora import ExpertPairs, open_full_lora, read_factors
from .sparse_lora import sparse_config, sparse_tensors


@dataclass(frozen=True)
class NarrowedLora:
    """What `narrow_lora` wrote.

    Attributes:
        path: the folder.
        kept_norm: Frobenius norm of what the kept experts' factors add to their weights, over that of all experts'.
        kept_norm_by_layer: the same for each layer with kept experts.
        num_experts, num_kept: experts of the model, and of the mask.
    """

    path: str
    kept_norm: float
    kept_norm_by_layer: dict[str, float]
    num_experts: int
    num_kept: int


def narrow_lora(
    lora: Any,
    output_dir: str | os.PathLike[str],
    experts: Mapping[str, Iterable[int]] | RoutingProfile,
    *,
    base_model: Any = None,
    **selection: Any,
) -> NarrowedLora:
    """Write an ordinary LoRA as a sparse adapter of some experts, which computes the same on those.

    Factors outside the experts are taken over whole, and so are embeddings that came with the LoRA. Base weights are
    not read.

    Args:
        lora: a `PeftModel` with a LoRA on its experts, or the path or Hub id of a saved one, stacked (PEFT's
            `target_parameters`) or with a pair of factors per expert and projection.
        output_dir: folder to write, as `save_pretrained` does.
        experts: the mask (experts-module path -> expert ids), or a profile to select from.
        base_model: for a saved LoRA: the base model, or its path or Hub id, of which the configuration is read; None
            takes what the LoRA names.
        selection: with a profile, the options of `select_experts`.

    Returns:
        The share of the norm that is kept.

    Raises:
        SieveError: the LoRA has no factors for a selected expert, or holds what a sparse adapter cannot; nothing was
            written.
    """
    mask, calibration = _mask_of(experts, selection)
    full = open_full_lora(lora, base_model, mask, _refuse_what_is_whole)
    name = str(full.model.active_adapter)
    config = full.model.peft_config[name]
    assert isinstance(config, LoraConfig)
    layers = {layer.path: layer for layer in find_moe_layers(full.new_skeleton())}
    pairs, others = read_factors(full, layers)
    probe = SieveLoraConfig(selected_experts=mask)
    check_mask(probe, list(layers.values()))
    mask = {path: ids for path, ids in (probe.selected_experts or {}).items() if ids}
    _require_factors(mask, pairs)
    kept = _norms({path: {k: f for k, f in of.items() if k[1] in mask.get(path, ())} for path, of in pairs.items()})
    whole = _norms(pairs)
    share = math.sqrt(sum(kept.values()) / sum(whole.values())) if sum(whole.values()) else 1.0
    if calibration is not None:
        calibration |= {
            "narrowed_from": f"a LoRA for {full.base_name}" if isinstance(lora, PeftModel) else str(lora),
            "kept_norm": round(share, 4),
        }
    base = full.new_skeleton()
    narrowed = PeftModel(base, sparse_config(config, mask, pairs, others, base, calibration))
    tensors = sparse_tensors(narrowed, pairs, others, name)
    tensors |= {key: make() for key, (_, make) in embedding_tensors(full.embeddings, others).items()}
    assign(narrowed, tensors)
    # Those that have values: of the embeddings, too, only what the LoRA brought.
    state = {key: value for key, value in narrowed.state_dict().items() if not value.is_meta}
    options: dict[str, Any] = {"state_dict": state, "save_embedding_layers": bool(full.embeddings)}
    lost = sorted(tensors.keys() - get_peft_model_state_dict(narrowed, **options))
    if lost:
        raise SieveError(
            f"PEFT does not save {lost[0]} of an adapter that is on the other end of the model. Train with both "
            "embed_tokens and lm_head in target_modules, or neither."
        )
    narrowed.save_pretrained(os.fspath(output_dir), **options)
    return NarrowedLora(
        path=os.fspath(output_dir),
        kept_norm=share,
        kept_norm_by_layer={p: math.sqrt(kept[p] / whole[p]) if whole[p] else 1.0 for p in mask},
        num_experts=sum(layer.num_experts for layer in layers.values()),
        num_kept=sum(map(len, mask.values())),
    )


def _mask_of(experts: Any, selection: dict[str, Any]) -> tuple[dict[str, list[int]], dict[str, Any] | None]:
    """The mask, and where it comes from if that is a profile."""
    if isinstance(experts, RoutingProfile):
        chosen = select_experts(experts, **selection)
        known = {name: experts.metadata.get(name, "unknown") for name in ("dataset", "fingerprint", "samples")}
        options = SelectionOptions(**selection)
        calibration = provenance(chosen, experts, options, **known, tokens=experts.num_tokens or 0)
        return chosen.to_dict(), calibration
    if selection:
        raise SieveError(f"{', '.join(selection)} cannot go with a mask, only with a routing profile. Leave them out.")
    mask = checked_mask(experts.to_dict() if isinstance(experts, ExpertSelection) else experts)
    if mask is None:
        raise must_be("experts", "a mask or a routing profile", None)
    return mask, None


def _refuse_what_is_whole(config: LoraConfig) -> None:
    names = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "bias")
    refuse_settings(config, names, "and only low-rank factors are narrowed. Pass a LoRA without it.")


def _require_factors(mask: dict[str, list[int]], pairs: ExpertPairs) -> None:
    projections = {projection for of in pairs.values() for projection, _ in of}
    for path, ids in mask.items():
        without = [e for e in ids if not projections or any((p, e) not in pairs.get(path, {}) for p in projections)]
        if without:
            raise SieveError(
                f"The LoRA does not have factors for all selected experts of {path} (none for {without[0]}, "
                f"{len(without)} such in all). Pass a LoRA on the experts (target_parameters, or a pair per expert), "
                "or a mask of those that it is on."
            )


def _norms(pairs: ExpertPairs) -> dict[str, float]:
    """Squared Frobenius norms of what the experts of each layer get."""
    return {path: sum(pair.squared_norm() for pair in of.values()) for path, of in pairs.items()}
