"""The whole path on every model class with routed experts, and the table of it: `make architectures`.

Each model is tiny and random. A step that fails gives its row a sentence and is not the end of the walk.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import textwrap
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

from peft_sieve import SieveError, SieveLoraConfig, export_lora, merge_checkpoint, profile_routing
from peft_sieve.moe.topology import MoELayer, find_moe_layers
from peft_sieve.tuners.common.experts.layer import SieveExpertLayer
from tests.architectures.discovery import looks_like_experts, model_classes
from tests.architectures.recount import recounted
from tests.architectures.tiny import inputs_for, tiny_model
from tests.deepseek_like import DeepseekLikeForCausalLM
from tests.models import randomize_adapters
from tests.transformers4_like import MixtralLikeForCausalLM, Qwen2MoeLikeForCausalLM

STEPS = ("recognise", "profile", "inject", "train", "save and load", "merge", "unmerge", "checkpoint", "export")
# What follows one of the first steps cannot do without it; the rest go by a loaded adapter.
FIRST = STEPS[:5]
NEEDS = {"unmerge": (*FIRST, "merge")}
# Experts in a ModuleList, as code that comes with checkpoints has them.
REMOTE_CODE: dict[type[PreTrainedModel], str] = {
    DeepseekLikeForCausalLM: "DeepSeek-MoE-16B (remote code)",
    MixtralLikeForCausalLM: "Mixtral as in transformers 4",
    Qwen2MoeLikeForCausalLM: "Qwen2-MoE as in transformers 4",
}
SHARE = 0.25
WIDTH = 128  # of the page
YES = "yes"
ROUNDED = "yes, within rounding"


@dataclass
class Row:
    """What became of one model.

    Attributes:
        model: name of its class.
        layouts: names of the families of its MoE layers.
        layers: number of those.
        results: step -> `YES`, `ROUNDED`, or why not.
        refusals: the steps that ended in a `SieveError`, which a user would have read.
        seconds: how long it took.
        trace: of an exception that is none.
    """

    model: str
    layouts: list[str] = field(default_factory=list)
    layers: int = 0
    results: dict[str, str] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    seconds: float = 0.0
    trace: str = ""

    @property
    def reasons(self) -> dict[str, str]:
        """Step -> why not, or only nearly."""
        return {step: result for step, result in self.results.items() if result != YES}

    @property
    def passed(self) -> bool:
        return set(self.results) == set(STEPS) and self.failures == []

    @property
    def refused(self) -> bool:
        """Whether it does not pass, for reasons that users are told."""
        return bool(self.failures) and set(self.failures) == set(self.refusals)

    @property
    def failures(self) -> list[str]:
        return [step for step, result in self.results.items() if result not in (YES, ROUNDED)]


def walk(model_class: type[PreTrainedModel]) -> Row | None:
    """All steps on one class that its failures leave; None if its models have no experts."""
    row = Row(REMOTE_CODE.get(model_class, model_class.__name__))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_model(model_class)
            modules = [module for path, module in model.named_modules() if path]
            if model_class not in REMOTE_CODE and not any(map(looks_like_experts, modules)):
                return None
            for step, function in Journey(model, row).steps().items():
                if not set(NEEDS.get(step, FIRST)) & set(row.failures):
                    _take(row, step, function)
        except Exception as error:
            row.results["build"] = f"{type(error).__name__}: {error}".split("\n")[0]
            row.trace = traceback.format_exc()
    row.seconds = time.perf_counter() - start
    return row


def _take(row: Row, step: str, function: Callable[[], str | None]) -> None:
    try:
        row.results[step] = function() or YES
    except SieveError as error:
        row.results[step] = str(error)
        row.refusals.append(step)
    except Exception as error:
        row.results[step] = f"{type(error).__name__}: {error}".split("\n")[0]
        row.trace += traceback.format_exc()


class Journey:
    """One model through the steps; each raises or returns None, or a remark in place of "yes"."""

    def __init__(self, model: PreTrainedModel, row: Row) -> None:
        self.base = model
        self.row = row
        self.batch = inputs_for(model)
        self.layers: list[MoELayer] = []

    def steps(self) -> dict[str, Callable[[], str | None]]:
        first = (self.recognise, self.profile, self.inject, self.train, self.save_and_load)
        return dict(zip(STEPS, (*first, self.merge, self.unmerge, self.checkpoint, self.export), strict=True))

    def recognise(self) -> None:
        self.layers = find_moe_layers(self.base)
        self.row.layouts = sorted({layer.family.name for layer in self.layers})
        self.row.layers = len(self.layers)
        known = {layer.experts_path for layer in self.layers}
        modules = dict(self.base.named_modules())
        for path, module in modules.items():
            # A block may be called "MoE" too: then the experts are in it, or beside it.
            inside = any(p == path or p.startswith(path + ".") or path.startswith(p + ".") for p in known)
            assert not (path and looks_like_experts(module)) or inside, (
                f"{path} ({type(module).__name__}) was not found"
            )

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
        self.untouched = copy.deepcopy(self.base)
        config = SieveLoraConfig(r=4, lora_dropout=0.0, top_k_frac=SHARE, calib_dataset=[self.batch])
        self.adapted = get_peft_model(self.base, config).eval()
        for layer in self.layers:
            expected = max(1, round(SHARE * layer.num_experts))
            found = len(self.expert_layer(layer.path).plans["default"].experts)
            assert found == expected, f"{layer.path}: {found} adapted, expected {expected}"
        after = self.logits(self.adapted)
        if not torch.equal(after, self.before):
            self._compared(after, self.before, "outputs with a new adapter", 1e-5)
            return ROUNDED
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
                continue
            gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
            assert torch.isfinite(gradient).all(), f"{name} has a gradient that is not finite"
            if not gradient.any() and not any(f".{held}." in name for held in SieveExpertLayer.adapter_layer_names):
                silent.append(name)
        assert not silent, f"no gradient in {len(silent)} adapter tensors, such as {silent[0]}"
        for layer in self.layers:
            self._check_expert_gradients(layer, counts[layer.path])
        optimizer = torch.optim.SGD((p for p in self.adapted.parameters() if p.requires_grad), lr=1e-2)
        before = self.logits(self.adapted.eval())
        optimizer.step()
        assert not torch.equal(self.logits(self.adapted), before), "a step changes nothing"

    def _check_expert_gradients(self, layer: MoELayer, received: torch.Tensor) -> None:
        adapter = self.expert_layer(layer.path)
        plan = adapter.plans["default"]
        factors = [name for name in adapter.adapter_layer_names if "default" in getattr(adapter, name)]
        assert factors, f"{layer.path}: no factors"
        for name in factors:
            gradient = getattr(adapter, name)["default"].weight.grad
            for slot, expert in enumerate(plan.experts):
                tokens, learns = int(received[expert]), gradient is not None and bool(gradient[slot].any())
                assert learns == (tokens > 0), f"{layer.path}: {name} of expert {expert}: {tokens} tokens, {learns=}"

    def save_and_load(self) -> None:
        self.trained = self.logits(self.adapted)
        with tempfile.TemporaryDirectory() as folder:
            self.adapted.save_pretrained(folder)
            self.loaded = PeftModel.from_pretrained(copy.deepcopy(self.untouched), folder).eval()
        assert torch.equal(self.logits(self.loaded), self.trained), "a loaded adapter gives other outputs"
        with self.loaded.disable_adapter():
            assert torch.equal(self.logits(self.loaded), self.before), "a disabled adapter is not without effect"

    def merge(self) -> None:
        self.adapted.merge_adapter()
        merged = self.logits(self.adapted)
        self._compared(merged, self.trained, "merged outputs", 1e-3)
        assert float((merged - self.before).abs().max()) > 1e-2 * float(self.trained.abs().max()), "nothing was merged"

    def unmerge(self) -> None:
        self.adapted.unmerge_adapter()
        assert torch.equal(self.logits(self.adapted), self.trained), "unmerged outputs differ"
        state = self.adapted.unload().state_dict()
        assert state.keys() == self.state.keys(), "other tensors than before"
        for name, value in state.items():
            assert torch.equal(value, self.state[name]), f"{name} is not as it was before merging"

    def checkpoint(self) -> None:
        model_class = type(self.untouched)
        with tempfile.TemporaryDirectory() as folder:
            self.untouched.save_pretrained(f"{folder}/base")
            again = self.logits(model_class.from_pretrained(f"{folder}/base").eval())
            self._compared(again, self.before, "outputs of the base model, saved and loaded by transformers,", 1e-5)
            merge_checkpoint(self.loaded, f"{folder}/base", f"{folder}/merged")
            merged = model_class.from_pretrained(f"{folder}/merged").eval()
        self._compared(self.logits(merged), self.trained, "outputs of the merged checkpoint", 1e-3)

    def export(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            export_lora(self.loaded, folder)
            plain = PeftModel.from_pretrained(copy.deepcopy(self.untouched), folder).eval()
        assert plain.peft_config["default"].peft_type == "LORA", "the export is no plain LoRA"
        self._compared(self.logits(plain), self.trained, "exported outputs", 1e-3)

    @staticmethod
    def _compared(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> None:
        scale, worst = float(expected.abs().max()), float((actual - expected).abs().max())
        assert worst < tolerance * scale, f"{what} differ by {worst:.1e} of {scale:.1e}"

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


def table(rows: list[Row]) -> str:
    """The rows as a page of Markdown."""
    steps = STEPS[1:]
    lines = [
        "# Architectures",
        "",
        *textwrap.wrap(
            "Every model class of transformers with routed experts that has a head, and models with a list of experts "
            "as code that comes with checkpoints has it. `make architectures` finds them and wrote this page "
            f"(transformers {transformers.__version__}, peft {peft.__version__}). Each is built tiny and random and "
            "goes the whole way:",
            WIDTH,
        ),
        "",
        "- profile: the counts are those that a recount at the experts gives;",
        f"- inject: {SHARE:.0%} of each layer's experts; a new adapter changes no bit of the output (~: no more than "
        "rounding does);",
        "- train: one step; adapters have gradients where their expert received tokens, and nothing else has any;",
        "- save and load: the same output to the bit, and without the adapter that of the base model;",
        "- merge: the same output; unmerge: the same weights as before, to the bit;",
        "- checkpoint: `merge_checkpoint`'s files, loaded by transformers, give the same output;",
        "- export: plain PEFT computes the same from `export_lora`'s files.",
        "",
        f"{sum(row.passed for row in rows)} of {len(rows)} pass all of it. A number leads to the sentence that refuses "
        "the step.",
        "",
        "| model | layout | MoE layers | " + " | ".join(steps) + " |",
        "| --- | --- | --- | " + " | ".join("---" for _ in steps) + " |",
    ]
    notes: list[str] = []

    def cell(row: Row, step: str) -> str:
        result = row.results.get(step, "")
        if result in (YES, ROUNDED, ""):
            return {YES: "yes", ROUNDED: "~"}.get(result, "")
        note = result.replace(f"The model {row.model}", "The model")
        if note not in notes:
            notes.append(note)
        return f"({notes.index(note) + 1})"

    for row in rows:
        cells = [cell(row, step) for step in steps]
        # What went wrong before the first column stands there.
        before = next((step for step in row.failures if step not in steps), None)
        cells[0] = cells[0] if before is None else cell(row, before)
        lines.append(f"| {row.model} | {', '.join(row.layouts)} | {row.layers or ''} | {' | '.join(cells)} |")
    lines.append("")
    for number, note in enumerate(notes, 1):
        indent = " " * len(f"{number}. ")
        lines += textwrap.wrap(f"{number}. {note}", WIDTH, subsequent_indent=indent, break_long_words=False)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only classes whose name contains one of these")
    parser.add_argument("--output", type=Path, help="write the page there")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    for model_class in [*model_classes(), *REMOTE_CODE]:
        if arguments.names and not any(name.lower() in model_class.__name__.lower() for name in arguments.names):
            continue
        row = walk(model_class)
        if row is None:
            continue
        rows.append(row)
        why = "; ".join(f"{step}: {reason}" for step, reason in row.reasons.items())
        print(
            f"{row.model:48} {','.join(row.layouts):16} {row.seconds:5.1f} s  {why or 'all'}\n{row.trace}",
            end="",
            flush=True,
        )
    if arguments.output:
        arguments.output.write_text(table(rows))
    unexplained = [row.model for row in rows if not row.passed and not row.refused]
    passed = sum(row.passed for row in rows)
    print(f"{passed} of {len(rows)} pass, {len(unexplained)} fail without a refusal: {unexplained}")
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
