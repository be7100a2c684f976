"""An ordinary LoRA on all experts, narrowed to the experts that a task uses."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import _find_minimal_target_modules

from ...errors import SieveError
from ...moe.families.modules import ModuleExperts
from ...moe.topology import MoELayer, find_moe_layers
from ...routing.profile import RoutingProfile
from ...routing.selection import ExpertSelection, select_experts
from ...tuners.common.config import checked_mask
from ...tuners.common.experts.factors import SLOTS_KEY, slots_of
from ...tuners.common.experts.layer import expert_layers
from ...tuners.common.mask import check_mask
from ...tuners.common.provenance import _package_version as package_version
from ...tuners.sieve.config import SieveLoraConfig
from ..reading import assign, open_plain_lora
from ..stack_layout import matrix_in, parameter_of

_PREFIX = "base_model.model."
_GROUPS = {"lora_gate_up": ("gate_proj", "up_proj"), "lora_down": ("down_proj",)}
_REFUSED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication")


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


@dataclass(frozen=True)
class _Pair:
    """Factors of one matrix: A (rank, in), B (out, rank), and the scaling."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def squared_norm(self) -> float:
        """Of scaling * B A, without making it."""
        a, b = self.a.double(), self.b.double()
        return self.scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())

    def columns(self, ranks: slice) -> _Pair:
        return _Pair(self.a[ranks], self.b[:, ranks], self.scaling)


# (projection, expert) -> factors, for one layer
_OfLayer = dict[tuple[str, int], _Pair]


def narrow_lora(
    lora: Any,
    output_dir: str | os.PathLike[str],
    experts: Mapping[str, Iterable[int]] | RoutingProfile,
    *,
    base_model: Any = None,
    **selection: Any,
) -> NarrowedLora:
    """Write an ordinary LoRA as a sparse adapter of some experts, which computes the same on those.

    Factors outside the experts are taken over whole. Base weights are not read.

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
    mask, calibration = _mask(experts, selection)
    model, make, base_name = open_plain_lora(lora, base_model, _refuse)
    name = str(model.active_adapter)
    config = model.peft_config[name]
    assert isinstance(config, LoraConfig)
    layers = {layer.path: layer for layer in find_moe_layers(make())}
    factors, others = _read(model, name, layers)
    probe = SieveLoraConfig(selected_experts=mask)
    check_mask(probe, list(layers.values()))
    mask = {path: ids for path, ids in (probe.selected_experts or {}).items() if ids}
    _require_factors(mask, factors, layers)
    _drop_foreign_ranks(factors)
    kept = _norms({path: {k: f for k, f in of.items() if k[1] in mask.get(path, ())} for path, of in factors.items()})
    whole = _norms(factors)
    share = math.sqrt(sum(kept.values()) / sum(whole.values())) if sum(whole.values()) else 1.0
    if calibration is not None:
        calibration |= {
            "narrowed_from": f"a LoRA for {base_name}" if isinstance(lora, PeftModel) else str(lora),
            "kept_norm": round(share, 4),
        }
    sieve = _sieve_config(config, mask, factors, others, layers, make().named_modules(), calibration)
    narrowed = PeftModel(make(), sieve)
    assign(narrowed, {**_expert_tensors(narrowed, factors), **_other_tensors(narrowed, others, name)})
    narrowed.save_pretrained(os.fspath(output_dir), save_embedding_layers=False)
    return NarrowedLora(
        path=os.fspath(output_dir),
        kept_norm=share,
        kept_norm_by_layer={p: math.sqrt(kept[p] / whole[p]) if whole[p] else 1.0 for p in mask},
        num_experts=sum(layer.num_experts for layer in layers.values()),
        num_kept=sum(map(len, mask.values())),
    )


def _mask(experts: Any, selection: dict[str, Any]) -> tuple[dict[str, list[int]], dict[str, Any] | None]:
    if isinstance(experts, RoutingProfile):
        chosen = select_experts(experts, **selection)
        score = selection.get("score", "count")
        coverage = chosen.coverage(experts, score=score)
        calibration = {
            "dataset": experts.metadata.get("dataset", "unknown"),
            "fingerprint": experts.metadata.get("fingerprint", "unknown"),
            "samples": experts.metadata.get("samples", "unknown"),
            "tokens": experts.num_tokens or 0,
            "score": score,
            "strategy": selection.get("strategy", "uniform"),
            "coverage": {path: round(share, 4) for path, share in coverage.items() if chosen[path]},
            "peft_sieve_version": package_version(),
        }
        return chosen.to_dict(), calibration
    if selection:
        raise SieveError(
            f"received {', '.join(selection)} with a mask, expected them with a routing profile only: leave them out"
        )
    mask = checked_mask(experts.to_dict() if isinstance(experts, ExpertSelection) else experts)
    if mask is None:
        raise SieveError("received no experts, expected a mask or a routing profile to know which to keep: pass one")
    return mask, None


def _refuse(config: LoraConfig) -> None:
    for option in _REFUSED:
        if getattr(config, option, None):
            raise SieveError(
                f"the LoRA has {option}={getattr(config, option)}, expected plain low-rank factors, since those of an "
                "expert can be kept or left out: narrow one without it"
            )
    if config.bias != "none":
        raise SieveError(f"the LoRA has bias={config.bias!r}, expected 'none': narrow one without trained biases")


# --- reading --------------------------------------------------------------------------------------------------------


def _read(model: PeftModel, name: str, layers: dict[str, MoELayer]) -> tuple[dict[str, _OfLayer], dict[str, LoraLayer]]:
    """The factors of all experts, and PEFT's layers on everything else, by path in the base model."""
    factors: dict[str, _OfLayer] = {}
    others: dict[str, LoraLayer] = {}
    in_modules = {
        f"{layer.path}.{inside}": (layer.path, key)
        for layer in layers.values()
        if isinstance(layer.family, ModuleExperts)
        for key, inside in layer.family.names(layer.experts).items()
    }
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or name not in {**module.lora_A, **module.lora_embedding_A}:
            continue
        path = path.replace(".base_layer", "")
        if path in layers and isinstance(module, ParamWrapper):
            factors.setdefault(path, {}).update(_of_stack(layers[path], module, name))
        elif path in in_modules:
            layer, key = in_modules[path]
            factors.setdefault(layer, {})[key] = _Pair(*_weights(module, name), module.scaling[name])
        else:
            others[path] = module
    return factors, others


def _weights(module: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B."""
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return a.detach(), b.detach()


def _of_stack(layer: MoELayer, module: ParamWrapper, name: str) -> _OfLayer:
    num_experts = layer.num_experts
    a, b = _weights(module, name)
    a = a.reshape(num_experts, -1, a.shape[-1])  # (experts, rank, in)
    b = b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)  # (experts, out, rank)
    stack = b.transpose(1, 2) if layer.experts.is_transposed else b
    return {
        (projection, expert): _Pair(a[expert], matrix_in(layer, stack, projection, expert), module.scaling[name])
        for projection in layer.shape.projections
        if parameter_of(layer, projection) == module.parameter_name
        for expert in range(num_experts)
    }


def _require_factors(mask: dict[str, list[int]], factors: dict[str, _OfLayer], layers: dict[str, MoELayer]) -> None:
    projections = {projection for of in factors.values() for projection, _ in of}
    for path, ids in mask.items():
        missing = [(p, e) for p in sorted(projections) for e in ids if (p, e) not in factors.get(path, {})]
        if missing or not projections:
            raise SieveError(
                f"the LoRA has no factors for the experts of {path}, expected them for all that are kept: pass a LoRA "
                "on the experts (target_parameters, or a pair per expert), or a mask without that layer"
            )


def _drop_foreign_ranks(factors: dict[str, _OfLayer]) -> None:
    """Where gate and up have ranks of their own in one stack (as when PEFT loads a pair each), leave out the others'.

    They are rows of A that meet columns of zeros in B.
    """
    halves = {"gate_proj": 0, "up_proj": 1}
    pairs = {(path, key): pair for path, of in factors.items() for key, pair in of.items() if key[0] in halves}
    for (_, (projection, _)), pair in pairs.items():
        rank = pair.b.shape[1]
        foreign = _half(rank, 1 - halves[projection])
        if rank % 2 or bool(pair.b[:, foreign].any()):
            return
    for (path, key), pair in pairs.items():
        factors[path][key] = pair.columns(_half(pair.b.shape[1], halves[key[0]]))


def _half(rank: int, which: int) -> slice:
    return slice(which * (rank // 2), (which + 1) * (rank // 2))


def _norms(factors: dict[str, _OfLayer]) -> dict[str, float]:
    return {path: sum(pair.squared_norm() for pair in of.values()) for path, of in factors.items()}


# --- the sparse adapter ---------------------------------------------------------------------------------------------


def _sieve_config(
    config: LoraConfig,
    mask: dict[str, list[int]],
    factors: dict[str, _OfLayer],
    others: dict[str, LoraLayer],
    layers: dict[str, MoELayer],
    modules: Iterable[tuple[str, Any]],
    calibration: dict[str, Any] | None,
) -> SieveLoraConfig:
    name = next(iter(others.values())).active_adapters[0] if others else ""
    # What each thing adapted has: (rank, scaling).
    settings = {f"{path}.{p}": (f.a.shape[0], f.scaling) for path in mask for (p, _), f in factors[path].items()}
    routers = {router.path for layer in layers.values() for router in layer.routers if router.parameter is not None}
    settings |= {path: (module.r[name], module.scaling[name]) for path, module in others.items()}
    (rank, scaling), *_ = settings.values()
    linears = set(others) - routers
    names = {path for path, _ in modules if path}
    return SieveLoraConfig(
        r=rank,
        lora_alpha=_alpha(rank, scaling),  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        rank_pattern={path: r for path, (r, _) in settings.items() if r != rank},
        alpha_pattern={path: _alpha(r, s) for path, (r, s) in settings.items() if (r, s) != (rank, scaling)},
        selected_experts=mask,
        expert_projections=sorted({projection for of in factors.values() for projection, _ in of}),
        train_attention=False,
        train_shared_experts=False,
        train_router=bool(routers & set(others)),
        target_modules=sorted(_find_minimal_target_modules(linears, names - linears)) if linears else [],
        calibration=calibration,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _alpha(rank: int, scaling: float) -> float:
    alpha = rank * scaling
    return int(alpha) if alpha == int(alpha) else alpha


def _expert_tensors(model: PeftModel, factors: dict[str, _OfLayer]) -> dict[str, torch.Tensor]:
    tensors = {}
    for path, layer in expert_layers(model.get_base_model()):
        ids = layer.plans["default"].experts
        for group, projections in _GROUPS.items():
            inside = [p for p in projections if (p, ids[0]) in factors[path]]
            if inside:
                pairs = [[factors[path][p, e] for p in inside] for e in ids]
                a = torch.stack([torch.cat([pair.a for pair in row]) for row in pairs])
                b = torch.stack([torch.cat([pair.b.T for pair in row]) for row in pairs])
                tensors[f"{_PREFIX}{path}.{group}_A.weight"] = a.detach().cpu().contiguous()
                tensors[f"{_PREFIX}{path}.{group}_B.weight"] = b.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{path}{SLOTS_KEY}"] = slots_of(layer.shape.num_experts, ids)
    return tensors


def _other_tensors(model: PeftModel, others: dict[str, LoraLayer], name: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or not (
            "default" in module.lora_A or "default" in module.lora_embedding_A
        ):
            continue
        given = others.get(path)
        if "default" in module.lora_embedding_A:
            assert given is not None
            for side in "AB":
                value = getattr(given, f"lora_embedding_{side}")[name]
                tensors[f"{_PREFIX}{path}.lora_embedding_{side}"] = value.detach().cpu()
            continue
        for side in "AB":
            own = getattr(module, f"lora_{side}")["default"].weight
            # All routers get an adapter or none: that of a router that the LoRA left alone adds zero.
            value = torch.zeros(own.shape) if given is None else _weights(given, name)["AB".index(side)]
            tensors[f"{_PREFIX}{path}.lora_{side}.weight"] = value.cpu()
    return tensors
