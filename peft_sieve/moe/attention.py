"""Find the attention around the MoE layers of a model."""

from __future__ import annotations

import re

from torch import nn

from .linear import is_linear, is_state_space
from .topology import MoELayer, base_modules

# The second kind is T5's: SelfAttention, EncDecAttention.
_ATTENTION = re.compile(r"(^|_)(attn|attention|mixer)$|^[A-Z][A-Za-z]*Attention$")
_BLOCK_INDEX = re.compile(r"^(.*?\.)?\d+(?=\.)")


def attention_linears(model: nn.Module, layers: list[MoELayer]) -> list[str]:
    """Paths of the linear layers inside attention modules, in the stacks of blocks that have MoE layers.

    Linear-attention and state-space mixers count as attention; a vision tower, which is another stack, does not. Where
    attention has experts of its own, they and their router do not, either. The last layer of a state-space mixer is
    left out: kernels read its weight, so that PEFT has no LoRA on it, and could not load one.
    """
    modules = base_modules(model)
    routed = {router.path for layer in layers for router in layer.routers}
    inside_experts = tuple(f"{layer.path}." for layer in layers)
    stacks = {match.group(1) or "" for layer in layers if (match := _BLOCK_INDEX.match(layer.path))}
    found = []
    for path, module in modules.items():
        if not is_linear(module) or path in routed or path.startswith(inside_experts):
            continue
        match = _BLOCK_INDEX.match(path)
        if match is None or (match.group(1) or "") not in stacks:
            continue
        parents = path[match.end() + 1 :].split(".")[:-1]
        # An indexer picks keys without gradients: an adapter in it would never learn.
        if not any(_ATTENTION.search(part) for part in parents) or "indexer" in parents:
            continue
        mixer, _, name = path.rpartition(".")
        if not (name == "out_proj" and is_state_space(modules[mixer])):
            found.append(path)
    return found


def holds_attention(module: nn.Module) -> bool:
    """Whether attention is a direct part of `module`, as of a whole block of a transformer."""
    return any(_ATTENTION.search(name) for name, _ in module.named_children())


def inside_attention(path: str) -> bool:
    """Whether the module at `path` is a part of attention."""
    return any(_ATTENTION.search(part) for part in path.split(".")[:-1])
