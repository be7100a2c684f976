"""`SieveLoraModel`: LoRA's tuner, with calibration before and expert layers in the injection."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.model import LoraModel, _get_encoder
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import _get_submodules
from peft.utils.integrations import init_empty_weights
from torch import nn

from ...errors import SieveError
from ...hf.injection import injecting, values_follow
from ...moe.placement import onloaded
from ...moe.storage import linear_quantisation, refuse_storage
from ...moe.topology import MoELayer, base_modules, find_moe_layers, read_weights
from ...routing.distributed import check_agreement, on_every_rank
from ..common.calibrate import calibrate
from ..common.exact_unmerge import ExactLinear, exact_layer
from ..common.experts.by_family import layer_class_of
from ..common.experts.layer import SieveExpertLayer, expert_layers
from ..common.hooks import take_down
from ..common.mask import check_mask, shape_of
from ..common.mixed_batch import mixed_batch
from ..common.patterns import UNMATCHED_IN_PEFT, by_pattern, expert_names, warn_of_unmatched_patterns
from ..common.process_agreement import ProcessAgreement
from ..common.targets import resolve_targets, router_parameters, wanted_layers
from ..common.tied import mark_shared_weights, refuse_shared_modules
from ..common.trained_whole import refuse_adapting
from ..common.tuner import MethodTuner, refuse_if
from .combination import COMBINATION_TYPES
from .config import SieveLoraConfig
from .weighted import fill_weighted, weighted_config


class SieveLoraModel(MethodTuner, LoraModel):
    """A model with LoRA on selected experts, and on attention, router and shared experts.

    Made by `get_peft_model` or `PeftModel.from_pretrained`; the arguments are those of `peft.LoraModel`.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Adapters that have been injected on the meta device, and are to get memory there.
        self._without_values: set[str] = set()
        self._bare_routers: set[str] = set()
        super().__init__(model, *args, **kwargs)

    # Before injection: everything that can go wrong, goes wrong here

    def _check_new_adapter_config(self, config: SieveLoraConfig) -> None:
        # LoraModel also wants all adapters to target the same parameters. Here they need not: one layer holds them all.
        BaseTuner._check_new_adapter_config(self, config)

    def _prepare_adapter_config(self, peft_config: SieveLoraConfig, model_config: dict[str, Any]) -> SieveLoraConfig:
        """Make the mask, or check the one given, and resolve what else is adapted. The model is not changed."""
        # Loading for inference may well happen in one process of several.
        together = not peft_config.inference_mode
        run = on_every_rank if together else lambda function: function()
        layers, wanted = run(lambda: self._checked_layers(peft_config))
        if together:
            check_agreement(
                "sources of the mask (selected_experts or calib_dataset)", peft_config.selected_experts is None
            )
            for name in ("cold_experts", "share_outer"):
                check_agreement(name, getattr(peft_config, name))
        if peft_config.selected_experts is None:
            calibrate(peft_config, self.model, wanted)
        given = peft_config.selected_experts or {}
        mask = peft_config.selected_experts = {path: given[path] for path in given if path in {w.path for w in wanted}}
        if together:
            check_agreement("selected_experts", {path: list(ids) for path, ids in mask.items()})
        peft_config.expert_shapes = {layer.path: shape_of(layer) for layer in layers if layer.path in mask}
        resolve_targets(peft_config, self.model, layers)
        routers = [router for layer in layers for router in layer.routers]
        self._bare_routers = {router.path for router in routers if router.parameter is not None}
        return peft_config

    def _checked_layers(self, config: SieveLoraConfig) -> tuple[list[MoELayer], list[MoELayer]]:
        """The MoE layers of the model, and those of them whose experts may be adapted."""
        layers = find_moe_layers(self.model)
        for layer in layers:
            self._check_layer_class(layer)
            _refuse_parallel(layer)
            refuse_storage(layer.experts, layer.path, layer.family.dequantises)
        if config.selected_experts is not None:
            check_mask(config, layers)
        wanted = wanted_layers(config, layers)
        refuse_adapting(self.model, _adapted_paths(config, self.model, wanted))
        return layers, wanted

    # Injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", UNMATCHED_IN_PEFT)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT notes what target_modules names; of a router it is the weight that is adapted.
        self.targeted_module_names = [name for name in self.targeted_module_names if name not in self._bare_routers]
        mark_shared_weights(self.model)
        warn_of_unmatched_patterns(self.peft_config[adapter_name], _names_in_patterns(self.model, adapter_name))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if adapter_name in self._without_values:
            # Only now is their type known.
            self._without_values.discard(adapter_name)
            for _, layer in expert_layers(self.model):
                layer.allocate(adapter_name)

    def _inject_parameters(
        self, peft_config: SieveLoraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        context = init_empty_weights if low_cpu_mem_usage else nullcontext
        if values_follow() and not low_cpu_mem_usage:
            self._without_values.add(adapter_name)
        mask = peft_config.selected_experts or {}
        layers = find_moe_layers(model)
        injected = []
        with context():
            for layer in layers:
                if layer.path in mask and peft_config.adapts(mask[layer.path]):
                    self._inject_experts(peft_config, model, adapter_name, layer)
                    injected.append(layer.path)
            for router in router_parameters(peft_config, layers):
                key = f"{router.path}.{router.parameter}"
                parent, target, name = _get_submodules(model, router.path)
                self._create_and_replace(
                    _router_config(peft_config, [key, router.path]),
                    adapter_name,
                    target,
                    name,
                    parent,
                    current_key=key,
                    parameter_name=router.parameter,
                )
                injected.append(key)
            for path in read_weights(model, layers):
                linear = model.get_submodule(path)
                if isinstance(linear, ExactLinear):
                    linear.shows_in_weight = True
        ProcessAgreement(model)
        return injected

    def _inject_experts(self, config: SieveLoraConfig, model: nn.Module, adapter_name: str, layer: MoELayer) -> None:
        parent, target, name = _get_submodules(model, layer.path)
        experts = config.selected_experts[layer.path]  # type: ignore[index]
        without_values = adapter_name in self._without_values
        if isinstance(target, SieveExpertLayer):
            target.update_layer(adapter_name, experts, config, without_values)
            return
        wrapper = self._layer_class(layer)(target, layer)
        setattr(parent, name, self._updated(wrapper, adapter_name, experts, config, without_values))

    def _check_layer_class(self, layer: MoELayer) -> None:
        layer_class, module = self._layer_class(layer), self.model.get_submodule(layer.path)
        if isinstance(module, SieveExpertLayer) and type(module) is not layer_class:
            raise SieveError(
                f"The experts of {layer.path} hold an adapter of another method (a {type(module).__name__}). Load this "
                "one on a base model of its own."
            )

    @staticmethod
    def _layer_class(layer: MoELayer) -> type[SieveExpertLayer]:
        """The adapter layer for the experts of `layer`."""
        return layer_class_of(layer)

    def _create_and_replace(
        self, lora_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        if kwargs["current_key"] in self._bare_routers:
            return  # which `_inject_parameters` adapts by its weight
        # PEFT puts an adapter where the base weights are, which for offloaded ones is nowhere.
        with onloaded(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target):
            super()._create_and_replace(lora_config, adapter_name, target, *args, **kwargs)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        # PEFT's dispatchers have no place for a layer that is to be preferred to their own.
        layer = exact_layer(target, adapter_name, lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs) if layer is None else layer

    # Use

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        num_beams = kwargs.get("num_beams") or 1
        with mixed_batch(self.model, _get_encoder(self.model), names, list(self.peft_config), num_beams):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a weighted sum of others, on the union of their experts and modules.

        It has `cold_experts="shared"` if one of them has, and `share_outer` if all of them have.

        Args:
            adapters: names; their experts, ranks and projections may differ ("linear" wants one rank).
            weights: one for each, of either sign.
            adapter_name: of the sum. As in PEFT, nothing happens if there is one of that name.
            combination_type: "cat" is the exact sum and has the sum of the ranks; "svd" is the closest to it with
                `svd_rank`, the highest of the ranks by default; "linear" adds up the factors, which is the exact sum
                on experts that only one of the adapters has, unless all of them have `share_outer`.
            svd_rank: of the result of "svd".
            svd_clamp: refused, since it would change the sum.
            svd_full_matrices: changes nothing here, since no matrix of a weight's size is decomposed.
            svd_driver: changes nothing here, either.
            density: of combination types that are refused.
            majority_sign_method: of combination types that are refused.

        Raises:
            SieveError: these adapters have no such sum; the model was not changed.
        """
        refuse_if(self.no_weighted_sum)
        if adapter_name in self.peft_config:
            return
        if svd_clamp is not None:
            raise SieveError("svd_clamp is not supported: it would change the sum.")
        if len(adapters) == 1:
            combination_type = "linear" if combination_type in COMBINATION_TYPES else combination_type
        config = weighted_config(self.model, self.peft_config, adapters, weights, combination_type, svd_rank)
        with injecting(self.model, self, adapter_name):
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            fill_weighted(self.model, adapters, weights, adapter_name, combination_type)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        refuse_shared_modules(self.model)
        mark_shared_weights(self.model)  # which may have been tied since
        for _, layer in expert_layers(self.model):
            layer.check_mergeable()
        for path, module in self.model.named_modules():
            # PEFT merges into those that it has a layer of its own for; to others it would add as if they were plain.
            method = linear_quantisation(module.get_base_layer()) if isinstance(module, ExactLinear) else None
            if method is not None:
                raise SieveError(
                    f"merging was asked for, and {path} is quantised ({method}), expected weights in a floating-point "
                    "type: load the adapter on the model without quantisation and merge there"
                )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, in all layers or in none: when one refuses, the others are as before."""
        layers = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except Exception:
            for layer, names in zip(layers, before, strict=True):
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        for module in self.model.modules():
            take_down(module)
        if not (merge and safe_merge):
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        # Before any layer is taken out: one of them may refuse.
        self.merge_adapter(adapter_names, safe_merge)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The base model without adapters, and without what was merged into it."""
        if any(getattr(module, "merged", False) for module in self.modules()):
            self.unmerge_adapter()
        return super().unload()


def _adapted_paths(config: SieveLoraConfig, model: nn.Module, layers: list[MoELayer]) -> Iterator[str]:
    """What an adapter on the experts of `layers` is on or around, and routers."""
    experts = tuple(layer.path for layer in layers)
    yield from (path for path in base_modules(model) if path.startswith(experts))
    yield from (router.path for router in router_parameters(config, layers))


def _names_in_patterns(model: nn.Module, adapter_name: str) -> Iterator[str]:
    """All names that `rank_pattern` and `alpha_pattern` may know what an adapter has by."""
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or adapter_name not in module._get_available_adapters():
            continue
        yield path
        if isinstance(module, ParamWrapper):
            yield f"{path}.{module.parameter_name}"
        elif isinstance(module, SieveExpertLayer):
            for projection in module.plans[adapter_name].ranks:
                yield from expert_names(path, module.family, module.get_base_layer(), projection)


def _router_config(config: SieveLoraConfig, names: list[str]) -> SieveLoraConfig:
    """The settings for a router's weight, which goes by its own name or by its module's."""
    own = copy.copy(config)
    own.r = by_pattern(config.rank_pattern, names, config.r)
    own.lora_alpha = by_pattern(config.alpha_pattern, names, config.lora_alpha)
    own.rank_pattern, own.alpha_pattern = {}, {}
    # The weight is wrapped whole, so dropout on its input has no place there.
    own.lora_dropout = 0.0
    return own


def _refuse_parallel(layer: MoELayer) -> None:
    """Experts of which a process has only some."""
    if getattr(layer.experts, "_is_expert_parallel", False):
        raise SieveError(
            f"The experts of {layer.path} are spread over processes (expert parallelism), which is not supported. Load "
            "the model without a distributed_config that enables it."
        )
