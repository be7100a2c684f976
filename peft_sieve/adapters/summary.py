"""What a saved adapter holds, as records and as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..table import UNKNOWN, Table


@dataclass(frozen=True)
class LayerSummary:
    """The adapted experts of one layer.

    Attributes:
        path: the experts module.
        experts: ids of those with an adapter of their own, ascending.
        num_experts: how many there are, None if not recorded.
        coverage: share of the layer's score that they received at calibration, None if not recorded.
        ranks: "gate_up" (both together) and "down" -> rank, those that are adapted; the highest where experts differ,
            and the output width where they are fully tuned.
        num_parameters: numbers in the factors, or in the differences of full size.
        lowest_ranks: as `ranks`, the lowest.
        all_experts_parameters: numbers in the factors if all experts had some of their own; None if the number of
            experts is not recorded.
    """

    path: str
    experts: tuple[int, ...]
    num_experts: int | None
    coverage: float | None
    ranks: dict[str, int]
    num_parameters: int
    lowest_ranks: dict[str, int]
    all_experts_parameters: int | None


@dataclass(frozen=True)
class ModuleSummary:
    """Plain LoRA on modules of one name (attention, router, shared experts).

    Attributes:
        name: what follows the index of the block.
        count: blocks that have it.
        ranks: the ranks that occur.
        num_parameters: numbers in all of them.
    """

    name: str
    count: int
    ranks: tuple[int, ...]
    num_parameters: int


@dataclass(frozen=True)
class AdapterSummary:
    """What a saved sieve adapter holds.

    Attributes:
        adapter: its path or Hub id.
        base_model, revision, task_type: of the model that it was trained on.
        r, lora_alpha, use_rslora, lora_dropout, rank_pattern, alpha_pattern, expert_projections: LoRA's settings.
        layers: the adapted experts, a layer each.
        modules: the rest, by name.
        other_tensors: numbers in tensors that are no factors (`modules_to_save` and the like).
        num_parameters: numbers in all tensors.
        num_bytes: size of the weights file.
        dtypes: the types of the tensors.
        all_experts_parameters: numbers in the experts' factors if all experts of these layers had some of their own;
            None if the number of experts is not recorded.
        calibration: where the mask came from, {} if not recorded.
        update_steps: the optimizer steps at which training moved ranks from expert to expert (EPnG).
        cold_experts, share_outer: what experts share (see `SieveLoraConfig`).
    """

    adapter: str
    base_model: str | None
    revision: str | None
    task_type: str | None
    r: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    expert_projections: tuple[str, ...]
    layers: tuple[LayerSummary, ...]
    modules: tuple[ModuleSummary, ...]
    other_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    all_experts_parameters: int | None
    calibration: dict[str, Any]
    update_steps: tuple[int, ...] = ()
    cold_experts: str = "frozen"
    share_outer: bool = False

    @property
    def expert_parameters(self) -> int:
        """Numbers in the experts' factors."""
        return sum(layer.num_parameters for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {**asdict(self), "expert_parameters": self.expert_parameters}

    def to_tables(self) -> tuple[Table, ...]:
        """Facts by name; one row a layer of adapted experts; one row a kind of other modules, if there are any."""
        facts = Table(("adapter", self.adapter), list(self._facts().items()), wrapped=(1,))
        layers = [
            (
                layer.path,
                f"{len(layer.experts)} of {'?' if layer.num_experts is None else layer.num_experts}",
                UNKNOWN if layer.coverage is None else f"{layer.coverage:.1%}",
                ", ".join(f"{group} {_range(layer.lowest_ranks[group], rank)}" for group, rank in layer.ranks.items()),
                f"{layer.num_parameters:,}",
                " ".join(map(str, layer.experts)),
            )
            for layer in self.layers
        ]
        tables = [facts, Table(("layer", "experts", "coverage", "ranks", "parameters", "ids"), layers, wrapped=(5,))]
        if self.modules:
            modules = [
                (m.name, str(m.count), ", ".join(map(str, m.ranks)), f"{m.num_parameters:,}") for m in self.modules
            ]
            tables.append(Table(("module", "layers", "rank", "parameters"), modules))
        return tuple(tables)

    def _repr_html_(self) -> str:
        return "\n".join(table.to_html() for table in self.to_tables())

    def _facts(self) -> dict[str, str]:
        scaling = f"alpha {self.lora_alpha}, dropout {self.lora_dropout}" + (", rslora" if self.use_rslora else "")
        facts = {
            "base model": self.base_model or "not recorded",
            "revision": self.revision,
            "task": self.task_type,
            "LoRA": f"rank {self.r}, {scaling}",
            "ranks moved": f"at steps {', '.join(map(str, self.update_steps))}" if self.update_steps else None,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "projections": ", ".join(self.expert_projections),
            "shared": self._shared_text(),
            "parameters": f"{self.num_parameters:,} ({', '.join(self.dtypes)}), {self.num_bytes / 1e6:.1f} MB",
            "in experts": self._share_text(),
            "in other tensors": f"{self.other_tensors:,}" if self.other_tensors else None,
        }
        # The layers' coverage is in their table.
        facts |= {name.replace("_", " "): value for name, value in self.calibration.items() if name != "coverage"}
        if stability := self.calibration.get("stability"):
            lowest = min(stability, key=stability.get)
            facts["stability"] = f"{stability[lowest]:.2f} or more in each layer, least in {lowest}"
        if not self.calibration:
            facts["mask"] = "given by hand: no calibration recorded"
        return {name: str(value) for name, value in facts.items() if value not in (None, {}, "")}

    def _shared_text(self) -> str | None:
        cold = "one adapter per layer for all other experts" if self.cold_experts == "shared" else None
        outer = "A of gate_proj and up_proj and B of down_proj, one per layer" if self.share_outer else None
        return "; ".join(filter(None, (cold, outer))) or None

    def _share_text(self) -> str:
        text = f"{self.expert_parameters:,}"
        if self.all_experts_parameters:
            share = self.expert_parameters / self.all_experts_parameters
            text += f" ({share:.1%} of the {self.all_experts_parameters:,} of all experts)"
        return text


def _range(lowest: int, highest: int) -> str:
    return str(highest) if lowest == highest else f"{lowest} to {highest}"
