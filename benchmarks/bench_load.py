"""How long does loading an adapter take, against reading its file?

Shapes of Qwen3-30B-A3B with a quarter of the experts adapted. The base model is there already when an adapter is
loaded, so its weights are placeholders of one element each, expanded to their real shapes; the adapter is real. The
file was just written, so it is read from the page cache. The goal is 1.5 times the time of reading. Beside it, what
PEFT takes to load a plain LoRA on attention and router of the same model, without any expert.

    python benchmarks/bench_load.py [--layers 48] [--repeats 5] [--quick]
"""

from __future__ import annotations

import contextlib
import gc
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import peft.peft_model
import torch
from common import Rows, arguments, device, output_of, percentiles, positive, timed
from methods import ATTENTION, ROUTER
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from settings import SETTINGS, Setting, configuration, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from peft_sieve import SieveLoraConfig

# PeftModel.from_pretrained's parts -> the function of PEFT that does it; the rest is injection. The file is mapped, so
# that its bytes are really read when they are copied.
PARTS = {"read": "load_peft_weights", "copy": "set_peft_model_state_dict"}


def placeholder_model(setting: Setting) -> nn.Module:
    """The model with its real shapes and, in the place of each weight, one zero."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(setting), dtype=setting.dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.zeros((), dtype=parameter.dtype, device=setting.device).expand(parameter.shape)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=setting.device))
    return model


def save_plain_lora(setting: Setting, folder: Path) -> None:
    """LoRA on attention and router alone, as PEFT makes it."""
    config = LoraConfig(r=setting.rank, target_modules=ATTENTION, target_parameters=[ROUTER], task_type="CAUSAL_LM")
    get_peft_model(placeholder_model(setting), config).save_pretrained(str(folder))


def save_adapter(setting: Setting, folder: Path) -> None:
    hot = list(range(0, setting.experts, 4))
    mask = {f"model.layers.{layer}.mlp.experts": hot for layer in range(setting.layers)}
    config = SieveLoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, selected_experts=mask, task_type="CAUSAL_LM")
    get_peft_model(placeholder_model(setting), config).save_pretrained(str(folder))


@contextlib.contextmanager
def seconds_of_parts() -> Iterator[dict[str, float]]:
    """What each part of loading takes while this is active."""
    spent = dict.fromkeys(PARTS, 0.0)

    def watched(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - start

        return call

    with contextlib.ExitStack() as stack:
        for part, name in PARTS.items():
            function = getattr(peft.peft_model, name)
            stack.enter_context(mock.patch.object(peft.peft_model, name, watched(part, function)))
        yield spent


class Loading:
    """Loads the adapter into a model of its own, again and again."""

    def __init__(self, setting: Setting, folder: Path, low_cpu_mem_usage: bool) -> None:
        self.base = placeholder_model(setting)
        self.load = partial(
            PeftModel.from_pretrained,
            model_id=str(folder),
            low_cpu_mem_usage=low_cpu_mem_usage,
            torch_device=setting.device,
        )
        self.seconds: list[float] = []
        self.parts: dict[str, list[float]] = {part: [] for part in ("inject", *PARTS)}

    def run(self) -> None:
        loaded = []
        with seconds_of_parts() as spent:
            total = timed(lambda: loaded.append(self.load(self.base)))
        self.base = loaded.pop().unload()
        self.seconds.append(total)
        for part, seconds in {**spent, "inject": total - sum(spent.values())}.items():
            self.parts[part].append(seconds)


def measure(setting: Setting, repeats: int, folder: Path) -> dict[str, Any]:
    save_adapter(setting, folder / "sieve")
    save_plain_lora(setting, folder / "plain")
    file = folder / "sieve" / "adapter_model.safetensors"
    loadings = {
        "load": Loading(setting, folder / "sieve", False),
        "load_low_memory": Loading(setting, folder / "sieve", True),
        "load_plain_lora": Loading(setting, folder / "plain", False),
    }

    def read() -> None:
        # The file is mapped, so that only a copy reads it; kept until the end, as an adapter is.
        kept = [tensor.clone() for tensor in load_file(file, device=setting.device).values()]
        assert kept

    seconds = []
    for _ in range(repeats + 1):
        # What was loaded before is let go, so that each finds the same memory free: the first use of a page that the
        # machine has not given out yet takes several times as long as reading the file.
        gc.collect()
        seconds.append(timed(read))
        for loading in loadings.values():
            gc.collect()
            loading.run()
    # The first round is warm-up.
    row = {**setting.described(), "file_bytes": file.stat().st_size, "repeats": repeats}
    row |= percentiles(seconds[1:], "read_seconds")
    for name, loading in loadings.items():
        row |= percentiles(loading.seconds[1:], f"{name}_seconds")
        row |= percentiles([a / b for a, b in zip(loading.seconds[1:], seconds[1:], strict=True)], f"{name}_ratio")
        for part, values in loading.parts.items():
            row[f"{name}_{part}_seconds_p50"] = round(statistics.median(values[1:]), 4)
    row["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def main() -> None:
    parser = arguments(__doc__, "load.jsonl", repeats=5)
    parser.add_argument("--layers", type=positive, default=48, help="of the 48 that the model has, default all")
    args = parser.parse_args()
    setting = replace(SETTINGS["qwen3"], layers=args.layers, device=device())
    setting = tiny(setting) if args.quick else setting
    rows = Rows("load", output_of(args), quick=args.quick)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(setting, 2 if args.quick else args.repeats, Path(folder))
    rows.write(row)
    size = row["file_bytes"] / 1e9
    print(f"\n{setting.model}, {setting.layers} layers, float32 adapter of {size:.3f} GB, file in the page cache")
    print(f"  reading the file into memory          {row['read_seconds_p50']:8.3f} s")
    for name, label in (
        ("load", "from_pretrained"),
        ("load_low_memory", "from_pretrained(low_cpu_mem_usage)"),
        ("load_plain_lora", "plain LoRA, no experts"),
    ):
        print(
            f"  {label:36s}  {row[f'{name}_seconds_p50']:8.3f} s   {row[f'{name}_ratio_p50']:.2f}x   "
            + "  ".join(f"{part} {row[f'{name}_{part}_seconds_p50']:.3f}" for part in ("inject", *PARTS))
        )


if __name__ == "__main__":
    main()
