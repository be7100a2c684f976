"""Experts whose weights are stored in fewer bits: which ways of storing can take adapters, and how to read them.

The frozen products of an adapted layer run on a copy in the model's type that lives for one pass, so a layer at a time
is as large as it would be without quantisation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import SieveError
from .linear import is_linear

# Values dequantised at a time, so that the float32 copy in between stays small.
_CHUNK_VALUES = 2**26
# Experts that transformers keeps packed, with kernels of their own: how to load the model so that they are not.
_PACKED = {
    "Mxfp4GptOssExperts": ("MXFP4", "pass quantization_config=Mxfp4Config(dequantize=True) to from_pretrained"),
    "GgufExperts": ("GGUF", "pass quantization_config=GgufConfig(dequantize=True) to from_pretrained"),
    "FbgemmFp8Llama4TextExperts": ("FBGEMM FP8", "name the experts in FbgemmFp8Config(modules_to_not_convert=...)"),
}


def quantisation_of(experts: nn.Module) -> str | None:
    """How a module of experts stores its weights, stacks or linear layers, in fewer bits; None for plainly."""
    methods = [_method(experts, name) for name in _stack_names(experts)]
    methods += [linear_quantisation(module) for module in experts.modules() if is_linear(module)]
    return next((method for method in methods if method is not None), None)


def linear_quantisation(linear: nn.Module) -> str | None:
    """As `quantisation_of`, of a linear layer."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return type(linear).__name__
    if _library(weight) != "torch":
        return _library(weight)  # a tensor of its own kind
    return None if _is_plain(weight) else type(linear).__name__


def plain_stack(experts: nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A stack of weights as an ordinary tensor: itself, or a dequantised copy.

    Args:
        dtype: of a copy whose stored form does not say what it was quantised from.
    """
    stack: torch.Tensor = getattr(experts, name).detach()  # a parametrised one dequantises itself
    method = _method(experts, name)
    if method == "torchao":
        return stack.dequantize()
    if method == "fine-grained FP8":
        scales = getattr(experts, f"{name}_scale_inv").detach()
        return _dequantised(stack, scales, getattr(experts, "block_size", None), dtype)
    return stack


def refuse_storage(experts: nn.Module, path: str, dequantises: bool) -> None:
    """Refuse experts whose weights cannot take an adapter as they are stored. Linear layers can, whatever they store:
    they multiply by themselves.

    Args:
        dequantises: whether the stacks of these experts are read with `plain_stack`.

    Raises:
        SieveError: naming the method, and how to load the model instead.
    """
    advice = "Load the model without quantisation of its experts"
    if dequantises:
        names = [n for n in _stack_names(experts) if _method(experts, n) not in ("torchao", "fine-grained FP8")]
        stacks = [getattr(experts, name) for name in names]
        advice += ", or with one of bitsandbytes' replace_parameter_4bit, torchao and FP8 with scales"
    else:
        owners = (module for module in experts.modules() if not is_linear(module))
        stacks = [parameter for module in owners for parameter in module.parameters(recurse=False)]
    for stack in stacks:
        if not _is_plain(stack):
            raise SieveError(
                f"The experts of {path} are stored as {stack.dtype} ({type(stack).__name__} in "
                f"{type(experts).__name__}), which takes no adapter. {advice}."
            )


def refuse_packed(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse a model in which transformers has put packed experts in the place of those it takes adapters on.

    Raises:
        SieveError: naming the method, and how to load the model instead.
    """
    for path, module in modules:
        name = type(module).__name__
        if name in _PACKED:
            method, advice = _PACKED[name]
            raise SieveError(
                f"The experts of {path} are packed in {method} ({name}), through which no gradient flows. To load them "
                f"in a floating-point type, {advice}."
            )


def _stack_names(experts: nn.Module) -> list[str]:
    """The weights with a matrix an expert, and whatever else is kept for them in 3-D, scales left out."""
    parametrised = list(getattr(experts, "parametrizations", ()))
    own = [name for name, p in experts.named_parameters(recurse=False) if p.dim() == 3]
    return [name for name in (*own, *parametrised) if not name.endswith(("_scale_inv", "_scale"))]


def _method(experts: nn.Module, name: str) -> str | None:
    if parametrize.is_parametrized(experts, name):
        parametrisations: Any = experts.parametrizations
        return _library(parametrisations[name][0])
    stack = getattr(experts, name)
    if _library(stack) == "torchao":
        return "torchao"
    is_fp8 = stack.is_floating_point() and stack.dtype.itemsize == 1
    if is_fp8 and isinstance(getattr(experts, f"{name}_scale_inv", None), torch.Tensor):
        return "fine-grained FP8"
    return None


def _is_plain(weight: torch.Tensor) -> bool:
    return _library(weight) == "torch" and weight.is_floating_point() and weight.dtype.itemsize > 1


def _library(value: object) -> str:
    """Where the class of a tensor comes from: as PEFT tells them, without importing what may not be there."""
    return type(value).__module__.partition(".")[0]


def _dequantised(stack: torch.Tensor, scales: torch.Tensor, block_size: Any, dtype: torch.dtype) -> torch.Tensor:
    """(num_experts, rows, columns) in FP8, and a scale for each block of a matrix, as `dtype`."""
    num_experts, rows, columns = stack.shape
    block_rows, block_columns = block_size or (rows // scales.shape[1], columns // scales.shape[2])
    plain = torch.empty(stack.shape, dtype=dtype, device=stack.device)
    step = max(1, _CHUNK_VALUES // (rows * columns))
    for start in range(0, num_experts, step):
        part = slice(start, start + step)
        # float32 also for scales that are powers of two in eight bits, which have no product of their own.
        scale = scales[part].to(torch.float32)
        scale = scale.repeat_interleave(block_rows, -2)[:, :rows].repeat_interleave(block_columns, -1)[..., :columns]
        plain[part] = scale.mul_(stack[part].to(torch.float32))
    return plain
