"""`EpngModel`: the sieve's tuner, whose expert layers count the routing and move ranks by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import SieveError
from ...moe.topology import MoELayer
from ..common.experts.by_family import layer_class_of
from ..common.experts.factors import BOOKKEEPING_KEY
from ..common.optimizers import remember_optimizers
from ..common.patterns import ranks_and_alphas
from ..sieve.model import SieveLoraModel
from .config import EpngConfig
from .layer import EpngExpertLayer, block_ranks, epng_class
from .traffic import EpngTraffic
from .update import epng_layers, show_states, update_and_allocate


@dataclass(frozen=True)
class LedgerEntry:
    """What one update moved.

    Attributes:
        step: of the optimizer.
        pruned: experts-module path -> the experts that lost their adapter.
        grown: experts-module path -> expert -> its rank from then on.
        parameters: numbers in the experts' factors after it.
        budget: numbers that were there at the beginning.
    """

    step: int
    pruned: dict[str, list[int]]
    grown: dict[str, dict[int, int]]
    parameters: int
    budget: int


class EpngModel(SieveLoraModel):
    """A model with LoRA on experts, of ranks that follow the routing during training.

    Made by `get_peft_model` or `PeftModel.from_pretrained`; the arguments are those of `peft.LoraModel`. Training calls
    `update_and_allocate` after each optimizer step, or has an `EpngCallback` do so.
    """

    no_weighted_sum = (
        "EPnG adapters have no weighted sum: their ranks differ by expert. Activate several at once with set_adapter, "
        "or merge one after the other."
    )

    def update_and_allocate(self, global_step: int, optimizer: Any = None) -> None:
        """Take account of one optimizer step, and move ranks if the schedule has an update there.

        To be called after every `optimizer.step()`, and before saving:

            loss.backward()
            optimizer.step()
            model.update_and_allocate(step)
            optimizer.zero_grad()

        The states of every optimizer that has taken a step and holds the factors follow them. Under several processes
        each must call it.

        Args:
            global_step: the optimizer's, counted from 1 as the Trainer does.
            optimizer: the one in use, or accelerate's wrapper of it. Needed only where an update may come before its
                first step in this process, as after loading its states when a gradient scaler skips the step.

        Raises:
            SieveError: no adapter is trained or it is merged; or an update is due, and no routing was counted, the
                parameters are sharded, or the optimizer's states cannot follow. No rank was moved then.
        """
        update_and_allocate(self.model, self.peft_config, global_step, optimizer)

    def ledger(self, adapter_name: str | None = None) -> list[LedgerEntry]:
        """What every update of an adapter moved, by step, and how many parameters there were after it.

        Where a saved adapter was trained again, the steps of the first run come before those of the second.

        Args:
            adapter_name: None for the active one.
        """
        name = next(iter(self.active_adapters), "") if adapter_name is None else adapter_name
        layers = {path: layer for path, layer in epng_layers(self.model).items() if name in layer.plans}
        if not layers:
            raise SieveError(
                f"the ledger of adapter {name!r} was asked for, expected one of "
                f"{sorted(self.peft_config)}: pass its name"
            )
        config = self.peft_config[name]
        assert isinstance(config, EpngConfig)
        books = [_Book(layer, name, config) for layer in layers.values()]
        budget = sum(book.parameters() for book in books)
        entries = []
        for run, step in sorted({moment for book in books for moment in book.events}):
            pruned, grown = {}, {}
            for book in books:
                changes = book.play(run, step)
                pruned[book.path] = [expert for expert, blocks in changes.items() if not blocks]
                grown[book.path] = {e: blocks * config.rank_block for e, blocks in changes.items() if blocks}
            entries.append(
                LedgerEntry(
                    step,
                    {path: ids for path, ids in pruned.items() if ids},
                    {path: ranks for path, ranks in grown.items() if ranks},
                    sum(book.parameters() for book in books),
                    budget,
                )
            )
        return entries

    # Before injection

    def _prepare_adapter_config(self, peft_config: EpngConfig, model_config: dict[str, Any]) -> EpngConfig:
        if peft_config.selected_experts is None and not peft_config.calibrates:
            _, wanted = self._checked_layers(peft_config)
            peft_config.selected_experts = {layer.path: list(range(layer.num_experts)) for layer in wanted}
        super()._prepare_adapter_config(peft_config, model_config)
        mask = peft_config.selected_experts or {}
        for name in ("expert_blocks", "ledger"):
            held = getattr(peft_config, name)
            if held is not None:
                setattr(peft_config, name, {path: value for path, value in held.items() if path in mask})
        return peft_config

    def _checked_layers(self, config: EpngConfig) -> tuple[list[MoELayer], list[MoELayer]]:
        layers, wanted = super()._checked_layers(config)
        for layer in wanted:
            ranks, _ = ranks_and_alphas(config, layer.path, layer.family, layer.shape, layer.experts)
            block_ranks(ranks, config, layer.path)
        return layers, wanted

    # Injection

    @staticmethod
    def _layer_class(layer: MoELayer) -> type[EpngExpertLayer]:
        return epng_class(layer_class_of(layer))

    def _inject_parameters(
        self,
        peft_config: EpngConfig,
        model: nn.Module,
        adapter_name: str,
        low_cpu_mem_usage: bool,
    ) -> list[str]:
        injected = super()._inject_parameters(peft_config, model, adapter_name, low_cpu_mem_usage)
        remember_optimizers()
        EpngTraffic(model)
        return injected

    # Loading

    @classmethod
    @contextmanager
    def _fitted(
        cls, model: nn.Module, config: Any, adapter_name: str, given: Mapping[str, torch.Tensor]
    ) -> Iterator[None]:
        """A checkpoint is loaded into the adapter that a new run began with: its ranks may have come from those."""
        layers = [layer for layer in epng_layers(model).values() if adapter_name in layer.plans]
        before = [(layer, layer.saved_state(adapter_name)) for layer in layers]
        found = [(layer, layer.state_in(adapter_name, _bookkeeping(given, layer.path))) for layer in layers]
        try:
            for layer, state in found:
                if state is not None:
                    layer.set_state(adapter_name, *state)
            yield
        except Exception:
            for layer, own in before:
                layer.set_state(adapter_name, *own)
            raise
        configs: Any = model.peft_config
        show_states(configs, adapter_name, {layer.path: state for layer, state in found if state is not None})


def _bookkeeping(given: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """What saved weights say of one layer's experts, by attribute and key."""
    prefix = path + BOOKKEEPING_KEY
    return {key.removeprefix(f"{path}."): value for key, value in given.items() if key.startswith(prefix)}


class _Book:
    """The blocks of one layer's experts, from the beginning on."""

    def __init__(self, layer: EpngExpertLayer, name: str, config: EpngConfig) -> None:
        plan, ledger = layer.saved_state(name)
        self.path = layer.path
        self.events: dict[tuple[int, int], dict[int, int]] = {}  # (run, step) -> expert -> its blocks from then on
        run = before = 0
        for step, expert, blocks in ledger.tolist():
            run += step < before  # steps fall only where another run begins
            before = step
            self.events.setdefault((run, step), {})[expert] = blocks
        first = {*plan.experts, *(expert for changes in self.events.values() for expert in changes)}
        self.blocks = dict.fromkeys(sorted(first), config.first_blocks)
        self.block_parameters = sum(
            rank * sum(layer.shape.projections[projection]) for projection, rank in plan.block_ranks.items()
        )

    def play(self, run: int, step: int) -> dict[int, int]:
        """Expert -> its blocks, of those that the update of this step changed."""
        changes = self.events.get((run, step), {})
        self.blocks |= changes
        return changes

    def parameters(self) -> int:
        return sum(self.blocks.values()) * self.block_parameters
