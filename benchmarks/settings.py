"""The models that are measured: shapes and batch, and how to build one with random weights and skewed routing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import device, positive
from skew import skew_routing
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)


@dataclass(frozen=True)
class Setting:
    """A model and a batch of `batch` sequences of `length` tokens.

    `intermediate` is one expert's width, `shared` that of a shared expert, where the family has one.
    """

    model: str
    device: str
    dtype: torch.dtype
    hidden: int
    intermediate: int
    layers: int
    heads: int
    experts: int
    vocab: int
    batch: int
    length: int
    top_k: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    shared: int | None = None
    family: str = "olmoe"
    checkpointing: bool = False
    rank: int = 32

    @property
    def name(self) -> str:
        extra = ", checkpointing" if self.checkpointing else ""
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"{self.model}, {layers}, {self.batch} x {self.length} tokens{extra}"

    def described(self) -> dict[str, Any]:
        """For a row."""
        shape = {
            name: getattr(self, name) for name in ("hidden", "intermediate", "layers", "experts", "top_k", "vocab")
        }
        batch = {name: getattr(self, name) for name in ("batch", "length", "rank", "checkpointing")}
        return {"setting": self.name, **shape, **batch, "dtype": str(self.dtype).removeprefix("torch.")}


_OLMOE = Setting("OLMoE-1B-7B", "cuda", torch.bfloat16, 2048, 1024, 16, 16, 64, 50304, 8, 2048)
SETTINGS = {
    # OLMoE's proportions at a size that two cores can run.
    "cpu": Setting("OLMoE-shaped", "cpu", torch.float32, 512, 256, 4, 8, 64, 4096, 4, 512),
    # A shared expert, normalised router weights, and finer experts: tiny-qwen2-moe, four times as wide.
    "cpu-shared-expert": Setting(
        "Qwen2-MoE-shaped",
        "cpu",
        torch.float32,
        512,
        128,
        4,
        8,
        64,
        4096,
        4,
        512,
        top_k=6,
        shared=256,
        family="qwen2_moe",
    ),
    "olmoe": _OLMOE,
    "olmoe-checkpointing": replace(_OLMOE, checkpointing=True),
    "qwen3": replace(
        _OLMOE,
        model="Qwen3-30B-A3B",
        family="qwen3_moe",
        intermediate=768,
        experts=128,
        heads=32,
        kv_heads=4,
        head_dim=128,
        vocab=151936,
    ),
}


def applicable() -> list[str]:
    """The settings for the machine at hand."""
    return [name for name, setting in SETTINGS.items() if setting.device == device()]


def tiny(setting: Setting) -> Setting:
    """The same kind of model and step at a size that takes a moment; all that makes it another kind is kept."""
    return replace(
        setting,
        model=f"tiny {setting.model}",
        hidden=64,
        intermediate=32,
        layers=min(2, setting.layers),
        heads=4,
        kv_heads=setting.kv_heads and 2,
        head_dim=setting.head_dim and 16,
        shared=setting.shared and 64,
        vocab=128,
        batch=min(2, setting.batch),
        length=max(16, setting.length // 16),
        rank=min(8, setting.rank),
    )


def configuration(setting: Setting) -> PretrainedConfig:
    common: dict[str, Any] = {
        "hidden_size": setting.hidden,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.heads,
        "num_key_value_heads": setting.kv_heads or setting.heads,
        "num_experts": setting.experts,
        "num_experts_per_tok": setting.top_k,
        "vocab_size": setting.vocab,
        "max_position_embeddings": max(4096, setting.length),
        "tie_word_embeddings": False,
        # Where the real vocabulary has its special tokens, a small one has nothing.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if setting.family == "qwen3_moe":
        config = Qwen3MoeConfig(
            moe_intermediate_size=setting.intermediate, head_dim=setting.head_dim, norm_topk_prob=True, **common
        )
    elif setting.family == "qwen2_moe":
        config = Qwen2MoeConfig(
            moe_intermediate_size=setting.intermediate,
            shared_expert_intermediate_size=setting.shared,
            norm_topk_prob=True,
            **common,
        )
    else:
        config = OlmoeConfig(intermediate_size=setting.intermediate, **common)
    config.use_cache = False
    return config


def build_base(setting: Setting, seed: int = 0) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A frozen random model on its device, routing as skewed as a real one's does, and the batch it is skewed on."""
    torch.manual_seed(seed)
    # Filled where they are used: those of a large model take minutes on the CPU.
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(
            configuration(setting), dtype=setting.dtype, experts_implementation="grouped_mm"
        )
        tokens = torch.randint(0, setting.vocab, (setting.batch, setting.length))
    model.requires_grad_(False)
    # No attention mask, as when samples are packed: looking whether it hides anything would wait for the device.
    batch = {"input_ids": tokens}
    skew_routing(model, batch)
    return model, batch


def add_setting_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=list(SETTINGS),
        metavar="SETTING",
        help=f"of {', '.join(SETTINGS)}; default: those for this machine",
    )
    parser.add_argument("--layers", type=positive, help="layers of the model, to fit a smaller device")


def chosen(args: argparse.Namespace) -> list[Setting]:
    """The settings to run: those named, or all that the machine can run."""
    names = args.settings or applicable()
    for name in names:
        if SETTINGS[name].device == "cuda" and device() != "cuda" and not args.quick:
            raise SystemExit(
                f"setting {name} is for a GPU, and there is none: leave it out, or look at it with --quick"
            )
    picked = [SETTINGS[name] for name in names]
    if args.layers:
        picked = [replace(setting, layers=args.layers) for setting in picked]
    return [replace(tiny(setting), device=device()) for setting in picked] if args.quick else picked
