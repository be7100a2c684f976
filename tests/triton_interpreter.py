"""Triton's interpreter, which runs kernels on the CPU, without the faults that its version 3.6 has."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def repair() -> None:
    """Bounds of loops fail under NumPy 2.4; bfloat16 is multiplied by bit patterns, and made by cutting off."""
    import triton
    from triton.runtime import interpreter

    builder, patch = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    dot, cast = builder.create_dot, builder.cast_impl

    def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, triton.language.float32)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return dot(self, widened(a), widened(b), *args)

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (triton.language.float32, triton.language.bfloat16):
            return cast(self, source, dtype)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), triton.language.bfloat16)

    interpreter._patch_lang_tensor = _patch_lang_tensor
    builder.create_dot = create_dot
    builder.cast_impl = builder.create_fp_trunc = cast_impl
