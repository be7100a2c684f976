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
    for name, value in item.items() if isinstance(item, Mapping) else ():
        if not isinstance(name, str):
            raise must_be(f"The name of an input of {where}", "a str", name)
        if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
            raise must_be(f"`{name}` of {where}", "an array of numbers", value.dtype)
        if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            kind = "meta device" if value.is_meta else str(value.layout)
            raise must_be(f"`{name}` of {where}", "a dense tensor with values", kind)
    ids = item.get("input_ids") if isinstance(item, Mapping) else None
    if isinstance(ids, Tensor | np.ndarray) and (torch.as_tensor(ids).is_complex() or "bool" in str(ids.dtype)):
        raise must_be(f"`input_ids` of {where}", "integers", ids.dtype)
    mask = item.get("attention_mask") if isinstance(item, Mapping) else None
    if isinstance(mask, list | tuple) or (isinstance(mask, Tensor | np.ndarray) and mask.ndim == 0):
        raise must_be(f"`attention_mask` of {where}", "a tensor with a number for each token", mask)
