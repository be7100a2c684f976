"""An ordinary LoRA on all experts, read: the factors of each expert's matrices, and PEFT's layers on all else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from transformers import PreTrainedModel

from ...checks import first_line, must_be
from ...errors import SieveError
from ...moe.topology import MoELayer, find_moe_layers
from ..reading import KEY_PREFIX, assign, lora_factors, lora_layers, saved_config, saved_settings, saved_weights
from ..skeleton import Maker, maker_like, skeleton_maker
from ..stack_layout import matrix_in, parameter_of
from ..vocabulary import Embeddings, live_embeddings, with_vocabulary_of
from .larger_model import larger_model, without_larger
from .other_files import Matrix, in_pefts_order, refuse_shared_outer, with_absent_experts


@dataclass(frozen=True)
class Pair:
    """Factors of one matrix: A (rank, in), B (out, rank), and the scaling."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def squared_norm(self) -> float:
        """Of scaling * B A, without making it."""
        a, b = self.a.double(), self.b.double()
        return self.scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())

    def half(self, which: int) -> Pair:
        """The first or the second half of the ranks."""
        count = self.b.shape[1] // 2
        ranks = slice(which * count, (which + 1) * count)
        return Pair(self.a[ranks], self.b[:, ranks], self.scaling)


# Layer -> (projection, expert) -> factors.
ExpertPairs = dict[str, dict[tuple[str, int], Pair]]


@dataclass(frozen=True)
class FullLora:
    """An ordinary LoRA to read.

    Attributes:
        model: it on a base model, its active adapter; only the adapter's own tensors are sure to have values.
        new_skeleton: makes the base model on the meta device.
        base_name: name or path of the base model, "" if not known.
        embeddings: weights of the base model that the LoRA has values of its own for, by paths of modules.
        absent: matrices of experts that have no factors in the file, and zeros here.
    """

    model: PeftModel
    new_skeleton: Maker
    base_name: str
    embeddings: Embeddings
    absent: frozenset[Matrix] = frozenset()


def open_full_lora(lora: Any, base_model: Any, paths: Iterable[str], check: Callable[[LoraConfig], None]) -> FullLora:
    """Open an ordinary LoRA of a model, or a saved one; no base weights are read.

    Args:
        lora: a `PeftModel` with one LoRA, or the path or Hub id of a saved one.
        base_model, check: as for `open_adapter`.
        paths: modules of the base model, by which its class is told from others that load the same checkpoint.

    Raises:
        SieveError: no LoRA can be read there.
    """
    if isinstance(lora, PeftModel):
        check(_as_lora(lora.peft_config[lora.active_adapter], "The model"))
        base = lora.get_base_model()
        make, base_name = maker_like(base)
        assert isinstance(base, PreTrainedModel)
        return FullLora(lora, make, base_name, live_embeddings(base, base_name))
    if not isinstance(lora, str | os.PathLike):
        raise must_be("lora", "a PeftModel, or the path or Hub id of a saved LoRA", lora)
    path = os.fspath(lora)
    config = _as_lora(saved_config(path), path)
    check(config)
    try:
        make, base_name = skeleton_maker(base_model, config, list(paths))
    except SieveError:  # the mask is compared with the model later, in words of its own
        make, base_name = skeleton_maker(base_model, config, [])
    tensors = saved_weights(path)
    refuse_shared_outer(tensors, path)
    # An export for a text model has the names of the model around it, too.
    tensors = without_larger(tensors, larger_model(make(), base_name, make))
    make = with_vocabulary_of(make, tensors, KEY_PREFIX)
    config.inference_mode = True
    try:
        model = PeftModel(make(), config)
    except ValueError as error:
        raise SieveError(
            f"The LoRA {path!r} does not fit {base_name!r} ({first_line(error)}). Pass the base model that it was "
            "trained on as base_model."
        ) from error
    tensors = in_pefts_order(tensors, model, saved_settings(path))
    tensors, absent = with_absent_experts(tensors, model, make, find_moe_layers(make()))
    try:
        # Files with a pair of factors per expert and projection become those of PEFT's parameters, as in its loading.
        tensors = convert_peft_adapter_state_dict_for_transformers(model, config, tensors)
    except (ValueError, RuntimeError, KeyError) as error:
        raise SieveError(
            f"PEFT cannot stack the factors of the experts in {path!r} ({first_line(error)}). Pass a LoRA of one rank, "
            "with A and B of each projection that PEFT keeps in one stack."
        ) from error
    return FullLora(model, make, base_name, assign(model, tensors), frozenset(absent))


def read_factors(full: FullLora, layers: dict[str, MoELayer]) -> tuple[ExpertPairs, dict[str, LoraLayer]]:
    """The factors of all experts that have some, and PEFT's layers on everything else, by path in the base model.

    Args:
        layers: the MoE layers of the model, by path.
    """
    model, name = full.model, str(full.model.active_adapter)
    pairs: ExpertPairs = {}
    others: dict[str, LoraLayer] = {}
    in_modules = {linear: (path, key) for path, layer in layers.items() for key, linear in layer.linears.items()}
    for path, module in lora_layers(model.get_base_model(), name):
        path = path.replace(".base_layer", "")
        if path in layers and isinstance(module, ParamWrapper):
            pairs.setdefault(path, {}).update(_of_stack(layers[path], module, name))
        elif path in in_modules:
            layer_path, key = in_modules[path]
            pairs.setdefault(layer_path, {})[key] = Pair(*lora_factors(module, name), module.scaling[name])
        else:
            others[path] = module
    _drop_foreign_ranks(pairs)
    for path, projection, expert in full.absent:
        pairs[path].pop((projection, expert), None)
    return pairs, others


def _as_lora(config: PeftConfig, where: str) -> LoraConfig:
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        raise SieveError(
            f"{where} holds an adapter of type {getattr(config.peft_type, 'value', config.peft_type)}, not LORA. Pass "
            "an ordinary LoRA with factors for all experts."
        )
    return config


def _of_stack(layer: MoELayer, module: ParamWrapper, name: str) -> dict[tuple[str, int], Pair]:
    num_experts = layer.num_experts
    a, b = lora_factors(module, name)
    a = a.reshape(num_experts, -1, a.shape[-1])  # (experts, rank, in)
    b = b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)  # (experts, out, rank)
    stack = b.transpose(1, 2) if layer.experts.is_transposed else b
    return {
        (projection, expert): Pair(a[expert], matrix_in(layer, stack, projection, expert), module.scaling[name])
        for projection in layer.shape.projections
        if parameter_of(layer, projection) == module.parameter_name
        for expert in range(num_experts)
    }


def _drop_foreign_ranks(pairs: ExpertPairs) -> None:
    """Where gate and up have ranks of their own in one stack (as when PEFT loads a pair each), leave out the others'.

    They are rows of A that meet columns of zeros in B.
    """
    halves = {"gate_proj": 0, "up_proj": 1}
    first = [(path, key, pair) for path, of in pairs.items() for key, pair in of.items() if key[0] in halves]
    if any(pair.b.shape[1] % 2 or bool(pair.half(1 - halves[key[0]]).b.any()) for _, key, pair in first):
        return
    for path, key, pair in first:
        pairs[path][key] = pair.half(halves[key[0]])
