"""What the inputs of a batch that comes ready for the model can be at all."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import must_be


def check_values(item: Any, where: str) -> None:
    """Refuse inputs that no forward can take: names that are not str, arrays without numbers, tensors without values.

    Args:
        item: the batch; anything but a mapping passes.
        where: names it in errors.

    Raises:
        SieveError: there is one.
    """
    if not isinstance(item, Mapping):
        return
    for name, value in item.items():
        if not isinstance(name, str):
            raise must_be(f"The name of an input of {where}", "a str", name)
        array = isinstance(value, Tensor | np.ndarray)
        if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
            raise must_be(f"`{name}` of {where}", "an array of numbers", value.dtype)
        if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            kind = "meta device" if value.is_meta else str(value.layout)
            raise must_be(f"`{name}` of {where}", "a dense tensor with values", kind)
        if name == "input_ids" and array and (torch.as_tensor(value).is_complex() or "bool" in str(value.dtype)):
            raise must_be(f"`{name}` of {where}", "integers", value.dtype)
        kinds = list | tuple | str if name == "position_ids" else list | tuple
        if name in ("attention_mask", "position_ids") and (isinstance(value, kinds) or (array and value.ndim == 0)):
            raise must_be(f"`{name}` of {where}", "a tensor with a number for each token", value)
