"""Plain LoRA for a MoE model in the layouts there are, and what PEFT makes of its configuration.

`stacked` has the keys of PEFT's `target_parameters`: what its layers are called on the model. `per_expert` has a pair
of factors per matrix, named as in the base model's checkpoint; PEFT turns those into its own when it loads them.
`shared_outer` has the factors that experts share once, for servers; PEFT has no place for it.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from transformers import PreTrainedModel

from ...checks import first_line
from ...errors import SieveError
from ...moe.topology import MoELayer
from ...tuners.common.patterns import UNMATCHED_IN_PEFT
from ..checkpoint.names import experts_names, matrix_names, module_names
from ..reading import KEY_PREFIX, OpenedAdapter, lora_factors, lora_layers
from ..stack_layout import parameters_of
from .factors import Tensors, embedding_tensors, linear_factors, plain_factors
from .naming import name_matrices, name_modules, name_stacks


@dataclass(frozen=True)
class PlainLora:
    """A plain LoRA before it is written.

    Attributes:
        config, tensors: what its two files hold.
        for_peft: whether PEFT loads it, too, and not only servers.
    """

    config: LoraConfig
    tensors: Tensors
    for_peft: bool = True


def stacked(opened: OpenedAdapter, layers: list[MoELayer], others: dict[str, LoraLayer], rank: int) -> PlainLora:
    """PEFT's own layout for stacks of experts: keys are what its layers are called once they are on the model."""
    config = _plain_config(opened, rank)
    skeleton = opened.new_skeleton()
    name_modules(config, skeleton, others)
    name_stacks(config, layers)
    plain = injected(config, skeleton)
    experts = plain_factors(opened, layers, rank)
    stacks = {f"{layer.experts_path}.{name}": (layer.path, name) for layer in layers for name in parameters_of(layer)}
    tensors: Tensors = {}
    placed = set()
    for path, module in lora_layers(plain.get_base_model(), "default"):
        base_path = path.replace(".base_layer", "")
        stack = f"{base_path}.{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
        placed.add(stack if stack in stacks else base_path)
        if stack in stacks:
            layer_path, parameter = stacks[stack]
            of, (a, b) = experts[layer_path], lora_factors(module, "default")
            tensors[f"{KEY_PREFIX}{path}.lora_A.weight"] = tuple(a.shape), partial(of.stacked_a, parameter)
            tensors[f"{KEY_PREFIX}{path}.lora_B.weight"] = tuple(b.shape), partial(of.stacked_b, parameter)
        elif base_path in others:
            tensors |= linear_factors(f"{KEY_PREFIX}{path}", others[base_path], opened.name, rank)
    wrong = sorted(placed ^ {*stacks, *others})
    if wrong:
        raise SieveError(
            f"Plain PEFT cannot tell {wrong[0]} of {type(skeleton).__name__} from other modules by names ({len(wrong)} "
            "in all). Write a whole checkpoint instead (peft-sieve export --merge)."
        )
    return PlainLora(config, tensors | embedding_tensors(opened.embeddings, others))


def per_expert(opened: OpenedAdapter, layers: list[MoELayer], others: dict[str, LoraLayer], rank: int) -> PlainLora:
    """A pair of factors per matrix, named as the base model's checkpoint names it."""
    skeleton = opened.new_skeleton()
    names = module_names(skeleton, others)
    tensors: Tensors = {}
    for path, other in others.items():
        tensors |= linear_factors(f"{KEY_PREFIX}{names[path]}", other, opened.name, rank)
    factors = plain_factors(opened, layers, rank)
    matrices = matrix_names(skeleton, layers)
    for layer in layers:
        if layer.path not in matrices:
            raise SieveError(
                f"Nothing would load layout='per_expert': checkpoints of {opened.base_name or type(skeleton).__name__} "
                "hold the experts in stacks. Pass 'stacked' or 'auto'."
            )
        for (projection, expert), name in matrices[layer.path].items():
            of, (in_features, out_features) = factors[layer.path], layer.shape.projections[projection]
            tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = (rank, in_features), partial(of.a, projection, expert)
            tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = (out_features, rank), partial(of.b, projection, expert)
    config = _plain_config(opened, rank)
    name_modules(config, skeleton, others, {name for layer in layers for name in layer.linears.values()})
    in_stacks = [layer for layer in layers if not layer.linears]
    if in_stacks:
        name_matrices(config, skeleton, in_stacks, others)
    plain = PlainLora(config, tensors | embedding_tensors(opened.embeddings, others))
    check_loadable(plain, opened.new_skeleton(), " Pass 'stacked' or 'auto'.")
    return plain


def shared_outer(opened: OpenedAdapter, layers: list[MoELayer], others: dict[str, LoraLayer], rank: int) -> PlainLora:
    """Three pairs of factors per layer, each with a dimension of experts before the others, of size 1 if all share it.

    vLLM takes it with `enable_moe_shared_loras` and these names only; SGLang (`experts_shared_outer_loras`) takes them,
    too, and sees by the sizes what is shared.
    """
    skeleton = opened.new_skeleton()
    names, places = module_names(skeleton, others), experts_names(skeleton, layers)
    tensors: Tensors = {}
    for path, other in others.items():
        tensors |= linear_factors(f"{KEY_PREFIX}{names[path]}", other, opened.name, rank)
    factors, adapted = plain_factors(opened, layers, rank), opened.expert_layers()
    for layer in layers:
        if layer.path in adapted:
            _check_servers_know(layer, places[layer.path], type(skeleton).__name__)
            for projection, name in _NAMES_IN_SERVERS.items():
                key = f"{KEY_PREFIX}{places[layer.path]}.{name}"
                tensors |= factors[layer.path].shared_outer(key, projection)
    config = _plain_config(opened, rank)
    name_modules(config, skeleton, others)
    # By their last words SGLang knows what to make room for.
    config.target_modules = sorted({*(config.target_modules or ()), *_NAMES_IN_SERVERS})
    return PlainLora(config, tensors | embedding_tensors(opened.embeddings, others), for_peft=False)


# What servers call the projections of all experts.
_NAMES_IN_SERVERS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _check_servers_know(layer: MoELayer, name: str, model: str) -> None:
    problem = None
    if not name.endswith(".experts"):
        problem = f"are called {name} in checkpoints of {model}, and servers look for names that end in '.experts'"
    elif layer.shape.projections.keys() != _NAMES_IN_SERVERS.keys():
        problem = f"have {', '.join(layer.shape.projections)} only, and vLLM wants {', '.join(_NAMES_IN_SERVERS)}"
    if problem:
        raise SieveError(
            f"layout='shared_outer' is not supported here: the experts of {layer.path} {problem}. Pass 'auto'."
        )


# Name -> what builds it of (the opened adapter, all MoE layers, PEFT's layers by path, the common rank).
LAYOUTS = {"per_expert": per_expert, "stacked": stacked, "shared_outer": shared_outer}


def _plain_config(opened: OpenedAdapter, rank: int) -> LoraConfig:
    config = opened.config
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=[],
        target_parameters=[],
        task_type=config.task_type,
        base_model_name_or_path=opened.base_name or config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def injected(config: LoraConfig, skeleton: PreTrainedModel) -> PeftModel:
    """Plain LoRA on the meta device, as any PEFT would set it up from the configuration."""
    with warnings.catch_warnings():
        # PEFT looks for patterns among modules only, and says that those of parameters were ignored: they are not.
        warnings.filterwarnings("ignore", UNMATCHED_IN_PEFT)
        try:
            return PeftModel(skeleton, copy.deepcopy(config))
        except ValueError as error:
            raise SieveError(
                f"Plain PEFT does not take such a LoRA on {type(skeleton).__name__} ({first_line(error)}). Train with "
                "exclude_modules, or write a whole checkpoint (peft-sieve export --merge)."
            ) from error


def check_loadable(plain: PlainLora, skeleton: PreTrainedModel, advice: str) -> None:
    """Refuse files in which PEFT would not find a tensor a place of its shape: tried on the meta device."""
    model = injected(plain.config, skeleton)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected |= {key: value for key, value in model.state_dict().items() if key in plain.tensors}  # embeddings
    given = {key: torch.empty(shape, device="meta") for key, (shape, _) in plain.tensors.items()}
    found = convert_peft_adapter_state_dict_for_transformers(model, plain.config, given)
    shapes = [{(key, tuple(value.shape)) for key, value in tensors.items()} for tensors in (expected, found)]
    wrong = sorted(shapes[0] ^ shapes[1])
    if wrong:
        raise SieveError(
            f"PEFT would not find a place for all factors in {type(model.get_base_model()).__name__} "
            f"({wrong[0][0]}, {len(wrong)} in all).{advice}"
        )
