"""Expert adapters added to the weights of their experts, and taken off again bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ....errors import SieveError
from ....moe.placement import is_offloaded, onloaded_for_change
from ....moe.storage import quantisation_of


class ExpertMerging:
    """The part of an expert layer that merges."""

    path: str
    family: Any
    shape: Any
    plans: dict[str, Any]
    get_base_layer: Any
    full_delta: Any
    expert_factors: Any
    merged_adapters: list[str]
    # (projection, expert) -> the weight before merging, bit for bit.
    _before_merge: dict[tuple[str, int], torch.Tensor]

    def expert_weight(self, projection: str, expert: int) -> torch.Tensor:
        """The base weight of one projection of one expert: a view, (out, in)."""
        return self.family.expert_weight(self.get_base_layer(), projection, expert)

    def get_delta_weight(self, adapter_name: str, projection: str, expert: int) -> torch.Tensor:
        """What the adapter adds to one projection of one adapted expert: (out, in), in float32 or wider."""
        full = self.full_delta(adapter_name, projection)
        if full is not None:
            weight, scaling = full
            slot = self.plans[adapter_name].slot_of[expert]
            return scaling * weight[slot].detach().to(torch.promote_types(weight.dtype, torch.float32))
        factors = self.expert_factors(adapter_name, projection, expert)
        assert factors is not None
        a, b, scaling = factors
        dtype = torch.promote_types(a.dtype, torch.float32)
        return scaling * (b.detach().to(dtype).T @ a.detach().to(dtype))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weights of their experts; the weights before it are kept for `unmerge`.

        Raises:
            SieveError: the weights take no sum (`check_mergeable`), or `safe_merge` and a merged weight is not finite;
                nothing was changed then.
        """
        self.check_mergeable()
        layer: Any = self
        for adapter_name in check_adapters_to_merge(layer, adapter_names):
            if adapter_name in self.plans:
                with onloaded_for_change(layer):
                    self._merge_one(adapter_name, safe_merge)

    def check_mergeable(self) -> None:
        """Refuse to merge into quantised weights, where the sum would be rounded to what little they can say, and into
        offloaded ones of several modules, which nobody would write back.

        Raises:
            SieveError: the experts are either.
        """
        experts = self.get_base_layer()
        method = quantisation_of(experts)
        if method is not None:
            raise SieveError(
                f"The experts of {self.path} are quantised ({method}), and merging would round the sum to what little "
                "their type can say. Load the adapter on the model without quantisation and merge there."
            )
        names = self.family.parameter_names(experts, list(self.shape.projections))
        if is_offloaded(experts) and any("." in name for name in names):
            raise SieveError(
                f"The experts of {self.path} are in separate modules that are offloaded, where nobody would write the "
                "sum back. Load the model without offload and merge there."
            )

    def _merge_one(self, adapter_name: str, safe_merge: bool) -> None:
        plan = self.plans[adapter_name]
        slices = [(projection, expert) for projection in plan.ranks for expert in plan.adapted]
        if safe_merge:
            for key in slices:
                self._check_finite(key, adapter_name)
        for key in slices:
            weight = self.expert_weight(*key)
            # In main memory: a quarter of the experts would not fit on the device a second time.
            self._before_merge.setdefault(key, weight.detach().to("cpu", copy=True))
            weight.copy_(self._merged(weight, adapter_name, key))
        self.merged_adapters.append(adapter_name)

    def _merged(self, weight: torch.Tensor, adapter_name: str, key: tuple[str, int]) -> torch.Tensor:
        delta = self.get_delta_weight(adapter_name, *key)
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def _check_finite(self, key: tuple[str, int], adapter_name: str) -> None:
        weight = self.expert_weight(*key)
        if not torch.isfinite(self._merged(weight, adapter_name, key)).all():
            raise SieveError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken. Merging "
                f"'{adapter_name}' gives values that are not finite in {key[0]} of expert {key[1]} of {self.path}."
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weights back, bit for bit."""
        layer: Any = self
        with onloaded_for_change(layer):
            for key, weight in self._before_merge.items():
                self.expert_weight(*key).copy_(weight)
        self._before_merge.clear()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts module without adapters, with their weights added if `merge`."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._before_merge.clear()
        return self.get_base_layer()
