"""What counts as a linear layer that LoRA can be put around."""

from __future__ import annotations

from torch import nn


def is_linear(module: object) -> bool:
    """Whether LoRA's forward fits: a linear layer, quantised or not, but none with a forward from the model's own file
    (phimoe's router, deepseek_v4's grouped projection)."""
    from_model_file = ".modeling_" in type(module).__module__
    if isinstance(module, nn.Linear):
        return not (from_model_file and type(module).forward is not nn.Linear.forward)
    # Those of HQQ, GPTQ, AWQ and the like derive from nn.Module alone; PEFT has a layer for each.
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, nn.Module) and not from_model_file and all(isinstance(width, int) for width in widths)


def is_state_space(module: nn.Module) -> bool:
    """Whether a module is a Mamba mixer, whose kernels take its linear layers' weights instead of calling them."""
    return hasattr(module, "A_log") and hasattr(module, "D")
