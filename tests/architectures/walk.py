"""The whole path on every model class with routed experts, and the table of it: `make architectures`.

Each model is tiny and random. A step that fails gives its row a sentence and is not the end of the walk.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_sieve import SieveError, SieveLoraConfig, profile_routing
from peft_sieve.moe.topology import MoELayer, find_moe_layers
from peft_sieve.tuners.sieve.layer import SieveExpertLayer
from tests.architectures.discovery import looks_like_experts, model_classes
from tests.architectures.recount import recounted
from tests.architectures.tiny import inputs_for, tiny_model
from tests.models import randomize_adapters

STEPS = ("recognise", "profile", "inject", "train", "save and load", "merge", "export")
SHARE = 0.25


@dataclass
class Row:
    """What became of one model.

    Attributes:
        model: its class.
        layouts: names of the families of its MoE layers.
        layers: number of those.
        results: step -> "yes", or why not.
        seconds: how long it took.
    """

    model: str
    folder: str
    layouts: list[str] = field(default_factory=list)
    layers: int = 0
    results: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def passed(self) -> bool:
        return all(self.results.get(step) == "yes" for step in STEPS if step != "export" or _export() is not None)


def walk(model_class: type[PreTrainedModel]) -> Row | None:
    """All steps on one class; None if its models have no experts."""
    row = Row(model_class.__name__, model_class.__module__.split(".")[-2])
    start = time.perf_counter()
    step = "build"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tiny_model(model_class)
            experts = [path for path, module in model.named_modules() if path and looks_like_experts(module)]
            if not experts:
                return None
            journey = Journey(model, row)
            for step, function in journey.steps().items():
                row.results[step] = function() or "yes"
    except SieveError as error:
        row.results[step] = f"refused: {error}"
    except Exception as error:
        row.results[step] = f"{type(error).__name__}: {error}".split("\n")[0]
        row.error = traceback.format_exc()
    row.seconds = time.perf_counter() - start
    return row


class Journey:
    """One model through the steps; each raises or returns None, or a remark in place of "yes"."""

    def __init__(self, model: PreTrainedModel, row: Row) -> None:
        self.base = model
        self.row = row
        self.batch = inputs_for(model)
        self.layers: list[MoELayer] = []

    def steps(self) -> dict[str, Callable[[], str | None]]:
        functions = (self.recognise, self.profile, self.inject, self.train, self.save_and_load, self.merge, self.export)
        return dict(zip(STEPS, functions, strict=True))

    def recognise(self) -> None:
        self.layers = find_moe_layers(self.base)
        self.row.layouts = sorted({layer.family.name for layer in self.layers})
        self.row.layers = len(self.layers)
        known = {layer.path for layer in self.layers}
        modules = dict(self.base.named_modules())
        for path, module in modules.items():
            # A block may be called "MoE" too: then the experts are in it, or beside it.
            inside = any(p == path or p.startswith(path + ".") or path.startswith(p + ".") for p in known)
            assert not (path and looks_like_experts(module)) or inside, f"{path} ({type(module).__name__}) was not found"

    def profile(self) -> None:
        profile = profile_routing(self.base, [self.batch], progress=False)
        with torch.no_grad(), recounted(self.base, self._num_experts()) as counts:
            self.base(**self.batch)
        for path, count in counts.items():
            assert count.sum() > 0, f"no token reached {path}"
            assert torch.equal(profile.counts[path], count), f"{path}: {profile.counts[path]} counted, {count} received"

    def inject(self) -> str | None:
        self.before = self.logits(self.base)
        self.state = {name: value.clone() for name, value in self.base.state_dict().items()}
        self.fresh = copy.deepcopy(self.base)
        config = SieveLoraConfig(r=4, lora_dropout=0.0, top_k_frac=SHARE, calib_dataset=[self.batch])
        self.adapted = get_peft_model(self.base, config).eval()
        for layer in self.layers:
            expected = max(1, round(SHARE * layer.num_experts))
            found = len(self.expert_layer(layer.path).plans["default"].experts)
            assert found == expected, f"{layer.path}: {found} adapted, expected {expected}"
        after = self.logits(self.adapted)
        if not torch.equal(after, self.before):
            scale, worst = float(self.before.abs().max()), float((after - self.before).abs().max())
            assert worst < 1e-5 * scale, f"a new adapter changes the outputs by {worst:.1e} of {scale:.1e}"
            return "yes, within rounding"
        return None

    def train(self) -> None:
        randomize_adapters(self.adapted)
        self.adapted.train()
        with recounted(self.base, self._num_experts()) as counts:
            loss = loss_of(self.adapted(**self.batch, output_hidden_states=True))
        loss.backward()
        silent = []
        for name, parameter in self.adapted.named_parameters():
            assert parameter.requires_grad == ("lora_" in name), f"{name}: requires_grad is {parameter.requires_grad}"
            if not parameter.requires_grad:
                assert parameter.grad is None, f"{name} of the base model has a gradient"
            elif parameter.grad is None or not parameter.grad.any():
                silent.append(name)
            else:
                assert torch.isfinite(parameter.grad).all(), f"{name} has a gradient that is not finite"
        for layer in self.layers:
            self._check_expert_gradients(layer, counts[layer.path])
        assert not silent, f"no gradient in {len(silent)} adapter tensors, such as {silent[0]}"
        optimizer = torch.optim.SGD((p for p in self.adapted.parameters() if p.requires_grad), lr=1e-2)
        before = self.logits(self.adapted.eval())
        optimizer.step()
        assert not torch.equal(self.logits(self.adapted), before), "a step changes nothing"

    def _check_expert_gradients(self, layer: MoELayer, received: torch.Tensor) -> None:
        adapter = self.expert_layer(layer.path)
        plan = adapter.plans["default"]
        for name in adapter.adapter_layer_names:
            gradient = getattr(adapter, name)["default"].weight.grad
            for slot, expert in enumerate(plan.experts):
                tokens, learns = int(received[expert]), gradient is not None and bool(gradient[slot].any())
                assert learns == (tokens > 0), f"{layer.path}: {name} of expert {expert}: {tokens} tokens, {learns=}"

    def save_and_load(self) -> None:
        self.trained = self.logits(self.adapted)
        with tempfile.TemporaryDirectory() as folder:
            self.adapted.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(self.fresh, folder).eval()
            assert torch.equal(self.logits(loaded), self.trained), "a loaded adapter gives other outputs"
        with loaded.disable_adapter():
            assert torch.equal(self.logits(loaded), self.before), "without the adapter, the outputs are not the base's"

    def merge(self) -> None:
        self.adapted.merge_adapter()
        merged = self.logits(self.adapted)
        scale = float(self.trained.abs().max())
        worst = float((merged - self.trained).abs().max())
        assert worst < 1e-3 * scale, f"merged outputs differ by {worst:.1e} of {scale:.1e}"
        assert float((merged - self.before).abs().max()) > 10 * worst, "merging changes nothing"
        self.adapted.unmerge_adapter()
        assert torch.equal(self.logits(self.adapted), self.trained), "unmerged outputs differ"
        state = self.adapted.unload().state_dict()
        assert state.keys() == self.state.keys(), "other tensors than before"
        for name, value in state.items():
            assert torch.equal(value, self.state[name]), f"{name} is not as it was before merging"

    def export(self) -> str | None:
        if _export() is None:
            return "not built yet"
        return None

    def expert_layer(self, path: str) -> SieveExpertLayer:
        module = self.base.get_submodule(path)
        assert isinstance(module, SieveExpertLayer), path
        return module

    def logits(self, model: nn.Module) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return main_output(model(**self.batch)).clone()

    def _num_experts(self) -> dict[str, int]:
        return {layer.path: layer.num_experts for layer in self.layers}


def main_output(output: Any) -> torch.Tensor:
    """The logits, or what a model has in their place."""
    return next(value for name in OUTPUTS if (value := getattr(output, name, None)) is not None)


OUTPUTS = ("logits", "start_logits", "last_hidden_state")


def loss_of(output: Any) -> torch.Tensor:
    """A sum that depends on everything that a model puts out, each number in another way."""
    generator = torch.Generator().manual_seed(0)
    values = [*_tensors(output)]
    weights = [torch.randn(value.shape, generator=generator) for value in values]
    return torch.stack([(v.float() * w).sum() for v, w in zip(values, weights, strict=True)]).sum()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those with a gradient, also in mappings and sequences; a cache of keys and values is none."""
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _export() -> Any:
    return getattr(importlib.import_module("peft_sieve"), "export_lora", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only classes whose name contains one of these")
    parser.add_argument("--output", type=Path, help="write the table there")
    parser.add_argument("--verbose", action="store_true", help="print tracebacks")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for model_class in model_classes():
        if arguments.names and not any(name.lower() in model_class.__name__.lower() for name in arguments.names):
            continue
        row = walk(model_class)
        gc.collect()
        if row is None:
            continue
        rows.append(row)
        why = "; ".join(f"{step}: {result}" for step, result in row.results.items() if result != "yes")
        print(f"{row.model:48} {','.join(row.layouts):16} {row.seconds:5.1f} s  {why or 'all'}", flush=True)
        if arguments.verbose and row.error:
            print(row.error)


if __name__ == "__main__":
    main()
