"""Find the MoE layers of a model: experts, router and shared experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..errors import SieveError
from .families.family import ExpertsShape, MoEFamily
from .families.registry import family_of
from .linear import is_linear, is_state_space
from .storage import refuse_packed
from .unadaptable import why_not
from .wrappers import innermost


@dataclass(frozen=True)
class Router:
    """The trainable part of a router.

    Attributes:
        path: the module that holds it.
        parameter: name of its weight if that is a bare parameter, None if `path` is a linear layer.
    """

    path: str
    parameter: str | None


@dataclass(frozen=True)
class MoELayer:
    """One layer of routed experts.

    Attributes:
        path: where an adapter layer stands, as `named_modules` of the base model calls it (adapter layers left out):
            the experts module, or the child of it that its family names.
        experts: the experts module, without adapters around it.
        family: its layout.
        shape: number of experts and widths.
        routers: what of the router can be adapted.
        shared_linears: paths of the linear layers of the shared experts (their gate left out).
    """

    path: str
    experts: nn.Module
    family: MoEFamily
    shape: ExpertsShape
    routers: tuple[Router, ...]
    shared_linears: tuple[str, ...]

    @property
    def num_experts(self) -> int:
        return self.shape.num_experts

    @property
    def experts_path(self) -> str:
        """Path of the experts module."""
        child = self.family.adapted_child
        return self.path if child is None else self.path.removesuffix(f".{child}")

    @property
    def linears(self) -> dict[tuple[str, int], str]:
        """(projection, expert) -> path of the linear layer that holds that matrix; empty if none does."""
        return {key: f"{self.experts_path}.{name}" for key, name in self.family.names(self.experts).items()}


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of `model`, in the order of its modules.

    Adapters may already be around them: paths and modules are those of the base model. A block that is in several
    places is one layer, in the first of them.

    Raises:
        SieveError: the model has none, or some that are kept packed.
    """
    modules = base_modules(model)
    refuse_packed(modules.items())
    layers = []
    seen: set[tuple[nn.Module, str]] = set()
    for path, module in modules.items():
        family = family_of(module)
        if family is None or path == "":
            continue
        if family.adapted_child is not None:
            path = f"{path}.{family.adapted_child}"
        block, _, name = path.rpartition(".")
        if not family.is_block(modules[block]) or (modules[block], name) in seen:
            continue
        seen.add((modules[block], name))
        routers, shared = _routers(modules, block, family), _shared(modules, block, family)
        layers.append(MoELayer(path, module, family, family.shape(module), routers, shared))
    if not layers:
        for path, module in modules.items():
            reason = why_not(module)
            if reason is not None:
                raise SieveError(f"The model {type(model).__name__} has {path} ({type(module).__name__}), {reason}")
        raise SieveError(
            f"The model {type(model).__name__} has no Mixture-of-Experts layer of a known layout. Pass a MoE model, or "
            "describe its layout with peft_sieve.register_moe_family (docs/custom-architectures.md)."
        )
    return layers


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`named_modules` as the model has them without adapters and wrappers: they are replaced by what they wrap.

    PEFT's wrappers around what is trained whole are replaced by what a forward now uses, which is an adapter's own copy
    where that is active.
    """
    return {path: _unadapted(module) for path, module in standing_modules(model)}


def standing_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path in the base model, what stands there now) for all modules of the base model."""
    yield path, model
    for name, child in _unadapted(model).named_children():
        yield from standing_modules(child, f"{path}.{name}" if path else name)


def read_weights(model: nn.Module, layers: list[MoELayer]) -> list[str]:
    """Paths of the linear layers whose weights a model reads, always or in some kernel, instead of calling them."""
    found = [router.path for layer in layers if layer.family.reads_router_weight for router in layer.routers]
    for path, module in base_modules(model).items():
        if is_state_space(module):
            found += [f"{path}.{name}" for name, child in module.named_children() if is_linear(_unadapted(child))]
    return found


def _unadapted(module: nn.Module) -> nn.Module:
    module = innermost(module)
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _unadapted(_in_use(module))
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base if base is module else _unadapted(base)  # those of PERFT wrap nothing


def _in_use(wrapper: AuxiliaryTrainingWrapper) -> nn.Module:
    if isinstance(wrapper, ModulesToSaveWrapper) and not wrapper.disable_adapters:
        for name in wrapper.active_adapters:
            if name in wrapper.modules_to_save:
                return wrapper.modules_to_save[name]
    original: nn.Module = wrapper.original_module
    return original


def _routers(modules: dict[str, nn.Module], block: str, family: MoEFamily) -> tuple[Router, ...]:
    for name in family.router_names:
        path = f"{block}.{name}"
        router = modules.get(path)
        if router is None:
            continue
        if is_linear(router):
            return (Router(path, None),)
        weight = getattr(router, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            return (Router(path, "weight"),)
        inner = [p for p, m in modules.items() if p.startswith(path + ".") and is_linear(m)]
        return tuple(Router(p, None) for p in inner)
    return ()


def _shared(modules: dict[str, nn.Module], block: str, family: MoEFamily) -> tuple[str, ...]:
    prefix = block + "."
    linears = (p for p, m in modules.items() if p.startswith(prefix) and is_linear(m))
    # shared_expert_gate is not an expert: it has one output, and the paper leaves it alone.
    return tuple(p for p in linears if re.fullmatch(family.shared_experts, p[len(prefix) :].split(".")[0]))
