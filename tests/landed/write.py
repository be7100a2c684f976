"""Writes `saved/`: what commit 2566de9 saves and computes. `test_landed.py` loads it with today's code.

It was run once, with the code of that commit, and is not to be run again with a later one:

    cd CHECKOUT_OF_2566de9
    PYTHONPATH=. python .../tests/landed/write.py .../tests/landed/saved

`saved/machine.json` says with which versions and on which machine. `saved/` holds:

- `olmoe.safetensors`, `modules.safetensors`: the weights and buffers of two random models of two layers with 8 experts,
  transformers' OLMoE, and one with experts in a `ModuleList` and a shared expert (`tests/transformers4_like.py`);
- `inputs.safetensors`: token ids to train and to evaluate on;
- `profile_1.safetensors`, `profile_2.safetensors`: routing profiles in both formats;
- for each recipe below a folder with
  - `start/`: the configuration that training began with;
  - `checkpoint/`: what a `Trainer` saved after two steps, the files as they were written, without the model card, the
    pickled `TrainingArguments` and, where nothing is random, the random state;
  - `adapter/`: what `save_pretrained` wrote after two further steps from that checkpoint, without the model card;
  - `expected.safetensors`: the losses of those two steps, and the logits of the adapters in both folders, once as the
    model gives them and once computed in float64.

Where a model has several adapters, each has a folder of its name in these folders, and the first alone is trained.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import SequentialSampler
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer, TrainingArguments

import peft_sieve
from peft_sieve import EpngConfig, LoraMoeConfig, PerftConfig, RoutingProfile, SieveLoraConfig
from tests.deepseek_like import DeepseekLikeConfig
from tests.transformers4_like import Qwen2MoeLikeForCausalLM

VOCABULARY, HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 32, 16, 8, 8, 2
CHECKPOINT_STEP, LAST_STEP = 2, 4
PLACES = ("checkpoint", "adapter")
MASK = {"model.layers.0.mlp.experts": [1, 6], "model.layers.1.mlp.experts": [0, 3, 4]}


@dataclass(frozen=True)
class Recipe:
    """How a folder of `saved/` was made.

    Attributes:
        configs: from calibration data, adapter name -> its configuration; the first is the active one.
        base: "olmoe" or "modules".
        dtype: of the base model.
        adapter_in_float32: whatever type the base model has. PEFT makes it so when a checkpoint is loaded, so that
            others cannot be resumed to the same numbers; they have no checkpoint.
        random: whether training draws random numbers.
    """

    configs: Callable[[Any], dict[str, PeftConfig]]
    base: str = "olmoe"
    dtype: torch.dtype = torch.float32
    adapter_in_float32: bool = True
    random: bool = False


def _one(config_class: type, **settings: Any) -> Callable[[Any], dict[str, PeftConfig]]:
    def configs(data: Any) -> dict[str, PeftConfig]:
        calibrated = {"calib_dataset": data} if settings.get("calib_seed") is not None else {}
        return {"default": config_class(**settings, **calibrated, task_type="CAUSAL_LM")}

    return configs


# `calib_seed` calibrates. Where it does not matter, only experts are adapted: these files are for ever.
_LORA: dict[str, Any] = {"r": 2, "lora_alpha": 8, "lora_dropout": 0.0}
_EXPERTS: dict[str, Any] = {**_LORA, "r": 3, "selected_experts": MASK, "train_attention": False, "train_router": False}
_EPNG: dict[str, Any] = {
    **{**_EXPERTS, "r": 2, "rank_block": 2, "warmup_steps": 1, "update_interval": 2},
    **{"selected_experts": {path: [0, 2, 3, 5, 7] for path in MASK}},
    **{"prune_ratio": 0.2, "grow_ratio": 0.2},
}
_PERFT: dict[str, Any] = {"r": 4, "alpha": 12, "dropout": 0.0}
_LORA_MOE: dict[str, Any] = {
    **{"r": 4, "num_experts": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
    **{"prune_threshold": 0.95, "balance_loss_coef": 0.02},
}
RECIPES: dict[str, Recipe] = {
    "lora": Recipe(_one(SieveLoraConfig, **_LORA, top_k_frac=0.25, calib_seed=0)),
    "lora_dropout": Recipe(_one(SieveLoraConfig, **{**_EXPERTS, "lora_dropout": 0.1}), random=True),
    "lora_patterns": Recipe(
        _one(
            SieveLoraConfig,
            **{**_EXPERTS, "train_router": True, "use_rslora": True},
            rank_pattern={"down_proj": 2, "layers.1.mlp.experts": 3, "mlp.gate": 5},
            alpha_pattern={"up_proj": 16, "mlp.gate": 4},
        )
    ),
    "lora_modules": Recipe(_one(SieveLoraConfig, **_LORA, top_k=2, calib_seed=0), base="modules"),
    "lora_full": Recipe(_one(SieveLoraConfig, **_EXPERTS, expert_tuning="full")),
    "lora_hellori": Recipe(_one(SieveLoraConfig, **_EXPERTS, hellori_density=0.3, hellori_seed=1)),
    "lora_modules_to_save": Recipe(_one(SieveLoraConfig, **_EXPERTS, modules_to_save=["lm_head"])),
    "lora_two": Recipe(
        lambda data: {
            "first": SieveLoraConfig(**_EXPERTS, task_type="CAUSAL_LM"),
            "second": SieveLoraConfig(
                **{**_EXPERTS, "r": 2, "selected_experts": {path: [3, 5] for path in MASK}},
                init_lora_weights=False,
                task_type="CAUSAL_LM",
            ),
        }
    ),
    "lora_bfloat16": Recipe(_one(SieveLoraConfig, **_EXPERTS), dtype=torch.bfloat16),
    "lora_all_bfloat16": Recipe(_one(SieveLoraConfig, **_EXPERTS), dtype=torch.bfloat16, adapter_in_float32=False),
    "epng": Recipe(_one(EpngConfig, **_EPNG)),
    "epng_modules_dropout": Recipe(
        _one(EpngConfig, **{**_EPNG, "rank_block": 1, "lora_dropout": 0.1, "selected_experts": None}),
        base="modules",
        random=True,
    ),
    "perft_r": Recipe(_one(PerftConfig, **_PERFT, variant="R", aux_loss_coef=0.05, norm_topk_prob=True)),
    "perft_r_dropout": Recipe(
        _one(PerftConfig, **{**_PERFT, "dropout": 0.1}, variant="R", num_adapters=3), base="modules", random=True
    ),
    "perft_e": Recipe(_one(PerftConfig, **_PERFT, variant="E", top_k=3, calib_seed=0)),
    "perft_d": Recipe(_one(PerftConfig, **_PERFT, variant="D", num_adapters=2, init_weights=False)),
    "perft_s_bottleneck": Recipe(_one(PerftConfig, **_PERFT, variant="S", form="bottleneck", activation="gelu")),
    "lora_moe": Recipe(_one(LoraMoeConfig, **_LORA_MOE, prune_step=3)),
    "lora_moe_pruned_dropout": Recipe(
        _one(LoraMoeConfig, **{**_LORA_MOE, "lora_dropout": 0.1}, prune_step=2), random=True
    ),
}


# What the tests need, too


def base_model(name: str, dtype: torch.dtype = torch.float32, weights: Path | None = None) -> Any:
    """A random model, or the one whose weights are in a file, in evaluation mode."""
    torch.manual_seed(0)
    if name == "olmoe":
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        experts = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = CONFIG_MAPPING["olmoe"](**sizes, **heads, **experts, **tokens, num_hidden_layers=LAYERS)
        model: Any = AutoModelForCausalLM.from_config(config)
    else:
        model = Qwen2MoeLikeForCausalLM(
            DeepseekLikeConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                moe_intermediate_size=INTERMEDIATE,
                n_routed_experts=EXPERTS,
                num_experts_per_tok=2,
                num_hidden_layers=LAYERS,
            )
        )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    if weights is not None:
        tensors = load_file(weights)
        with torch.no_grad():
            for key, tensor in everything_in(model).items():
                tensor.copy_(tensors.pop(key))
        assert not tensors
    return model.to(dtype).eval()


def everything_in(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers; also those that are computed, which another processor may round in another way."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class RecordingTrainer(Trainer):
    """Keeps the exact loss of each step, and takes the rows in order."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def trainer_of(model: nn.Module, ids: torch.Tensor, folder: Path, **changes: Any) -> RecordingTrainer:
    """A trainer for `LAST_STEP` steps, with the callback that the active adapter's method needs."""
    settings: dict[str, Any] = {
        **{"max_steps": LAST_STEP, "per_device_train_batch_size": 2, "learning_rate": 2e-2},
        **{"save_strategy": "no", "logging_strategy": "no", "report_to": "none"},
        **{"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False},
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **changes})
    trainer = RecordingTrainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    kinds = {config.peft_type.value for config in model.peft_config.values()}  # type: ignore[union-attr,operator]
    if "SIEVE_EPNG" in kinds:
        trainer.add_callback(peft_sieve.EpngCallback())
    if "LORA_MOE" in kinds:
        trainer.add_callback(peft_sieve.ExpertPruningCallback(trainer))
    return trainer


def adapters_in(folder: Path, file: str = "adapter_config.json") -> dict[str, Path]:
    """Adapter name -> the folder with its files."""
    if (folder / file).is_file():
        return {"default": folder}
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{file}"))}


def loaded(base: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """The model with all adapters of a folder, through PEFT."""
    (name, first), *others = adapters_in(folder).items()
    model = PeftModel.from_pretrained(base, str(first), adapter_name=name, **options)
    for name, path in others:
        model.load_adapter(str(path), name, **options)
    return model


def begun(base: nn.Module, configs: dict[str, PeftConfig], **options: Any) -> PeftModel:
    """The model with new adapters, of which the first is active."""
    (name, first), *others = configs.items()
    model = get_peft_model(base, first, adapter_name=name, **options)
    for name, config in others:
        model.add_adapter(name, config)
    return model


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Within it, all that the model computes is float64.

    Models compute norms, rotary angles and softmaxes in float32 whatever type they have, and then processors of
    different kinds agree to 7 digits only.
    """
    model.double()
    # transformers' grouped products take no float64.
    model.config._experts_implementation = "eager"
    with _Float64():
        yield


class _Float64(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def machine() -> dict[str, str]:
    """What rounding depends on."""
    known = {}
    if Path("/proc/cpuinfo").is_file():
        rows = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        known = {name.strip(): value.strip() for name, value in rows}
    processor = {name: known.get(name, "unknown") for name in ("model name", "cpu family", "model", "stepping")}
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
    return {**packages, "capability": torch.backends.cpu.get_cpu_capability(), **processor}


# Writing


def _write_recipe(recipe: Recipe, saved: Path, folder: Path) -> None:
    def fresh() -> Any:
        return base_model(recipe.base, recipe.dtype, saved / f"{recipe.base}.safetensors")

    inputs = load_file(saved / "inputs.safetensors")
    data = [{"input_ids": inputs["train"], "attention_mask": torch.ones_like(inputs["train"])}]
    expected: dict[str, torch.Tensor] = {}
    with TemporaryDirectory() as scratch:
        torch.manual_seed(1)
        options = {"autocast_adapter_dtype": recipe.adapter_in_float32}
        model = begun(fresh(), recipe.configs(data), **options)
        names = list(model.peft_config)
        for name, config in model.peft_config.items():
            config.save_pretrained(str(folder / "start" / (name if len(names) > 1 else "")))
        whole = trainer_of(model, inputs["train"], Path(scratch), save_strategy="steps", save_steps=CHECKPOINT_STEP)
        whole.train()
        if recipe.adapter_in_float32:
            shutil.copytree(Path(scratch, f"checkpoint-{CHECKPOINT_STEP}"), folder / "checkpoint")
            torch.manual_seed(2)  # another beginning, over which the checkpoint is loaded
            starts = {name: PeftConfig.from_pretrained(path) for name, path in adapters_in(folder / "start").items()}
            model = begun(fresh(), starts)
            resumed = trainer_of(model, inputs["train"], Path(scratch))
            resumed.train(resume_from_checkpoint=str(folder / "checkpoint"))
            assert resumed.losses == whole.losses[CHECKPOINT_STEP:]
            for name in names:
                one, other = (get_peft_model_state_dict(t.model, adapter_name=name) for t in (whole, resumed))
                assert all(torch.equal(one[key], other[key]) for key in one | other)
            expected["losses"] = torch.tensor(resumed.losses, dtype=torch.float64)
    model.save_pretrained(str(folder / "adapter"))
    for place in PLACES:
        for name in adapters_in(folder / place):
            model = loaded(fresh(), folder / place, **options)
            model.set_adapter(name)
            expected[f"{place}.{name}"] = logits_of(model, inputs["eval"])
            with in_float64(model):
                expected[f"{place}.{name}.float64"] = logits_of(model, inputs["eval"])
    _check(fresh(), recipe, folder, expected, inputs["eval"])
    save_file(expected, folder / "expected.safetensors")
    superfluous = {"README.md", "training_args.bin", *(() if recipe.random else ("rng_state.pth",))}
    for path in folder.rglob("*"):
        if path.name in superfluous:
            path.unlink()


def _check(base: Any, recipe: Recipe, folder: Path, expected: dict[str, torch.Tensor], ids: torch.Tensor) -> None:
    """Every adapter does something, and what happens to experts during training did happen."""
    bare = logits_of(base, ids)
    assert all((tensor - bare).abs().max() > 0.02 for key, tensor in expected.items() if key != "losses")
    changes = {}
    for place in PLACES:
        for path in adapters_in(folder / place).values():
            config = json.loads((path / "adapter_config.json").read_text())
            changes[place] = config.get("ledger") or {}, config.get("kept_experts")
    if config["peft_type"] == "SIEVE_EPNG":
        found = [{entry[0] for entries in changes[place][0].values() for entry in entries} for place in PLACES]
        assert found == [{1}, {1, 3}]
    if config["peft_type"] == "LORA_MOE":
        assert [changes[place][1] is not None for place in PLACES] == [recipe.random, True]
        assert any(len(ids) < config["num_experts"] for ids in config["kept_experts"].values())


def _write_profiles(saved: Path) -> None:
    counts = torch.randint(0, 900, (3, EXPERTS), generator=torch.Generator().manual_seed(0))
    profile = RoutingProfile.from_arrays(counts, counts * 0.3, num_experts_per_tok=2)
    profile.save(saved / "profile_1.safetensors")
    base = base_model("olmoe", weights=saved / "olmoe.safetensors")
    data = [{"input_ids": row[None]} for row in load_file(saved / "inputs.safetensors")["train"]]
    peft_sieve.profile_routing(base, data, progress=False).save(saved / "profile_2.safetensors")


def main(saved: Path) -> None:
    if Path(peft_sieve.__file__).parents[1] != Path.cwd():
        raise SystemExit(f"peft_sieve comes from {peft_sieve.__file__}. Run with PYTHONPATH=. in the checkout to use.")
    torch.set_num_threads(1)
    saved.mkdir(parents=True)
    for name in ("olmoe", "modules"):
        tensors = everything_in(base_model(name))
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, saved / f"{name}.safetensors")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2 * LAST_STEP + 2, 10), generator=generator)
    save_file({"train": ids[2:].clone(), "eval": ids[:2, :6].clone()}, saved / "inputs.safetensors")
    _write_profiles(saved)
    for name, recipe in RECIPES.items():
        print(name)
        _write_recipe(recipe, saved, saved / name)
    versions = {name: version(name) for name in ("accelerate", "safetensors")}
    about = {"machine": machine(), "python": platform.python_version(), **versions}
    (saved / "machine.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
