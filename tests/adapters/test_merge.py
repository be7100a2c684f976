"""A checkpoint with an adapter merged in: the base checkpoint's files in everything but the adapted weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen3VLMoeForConditionalGeneration

import peft_sieve.adapters.checkpoint.merge
from peft_sieve import SieveError, SieveLoraConfig, merge_checkpoint
from peft_sieve.cli import main
from peft_sieve.moe.topology import find_moe_layers
from tests.adapters.saved import SHARED, Adapter, relative_difference, saved_adapter
from tests.architectures.tiny import inputs_for
from tests.architectures.tiny import tiny_model as tiny_model_of
from tests.deepseek_like import deepseek_like
from tests.models import randomize_adapters, tiny_model

# Per-expert matrices, two spellings; stacks, transposed and interleaved; stacks under another name.
NAMES = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe")
SHARDS = {"max_shard_size": "40KB"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    return {name: saved_adapter(tmp_path_factory.mktemp(name), name, save=SHARDS) for name in NAMES}


def headers(folder: Path) -> dict[str, dict[str, Any]]:
    """File -> metadata, and names, types and shapes in their order."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found[path.name] = {
                "metadata": file.metadata(),
                "tensors": [(key, s.get_dtype(), s.get_shape()) for key, s in slices.items()],
            }
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_computes_what_the_adapter_does_in_the_base_models_files(
    name: str, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    adapter = adapters[name]
    merge_checkpoint(adapter.path, None, tmp_path / "merged")
    assert len(headers(adapter.base_path)) > 3
    assert headers(tmp_path / "merged") == headers(adapter.base_path)
    others = {p.name: p.read_bytes() for p in adapter.base_path.iterdir() if p.suffix != ".safetensors"}
    ours = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir() if p.suffix != ".safetensors"}
    assert ours.pop("README.md")
    assert ours == others
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5

    before, after = weights(adapter.base_path), weights(tmp_path / "merged")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    adapted = ("_proj", "gate.weight", "router", ".w1.", ".w2.", ".w3.", "linear.weight", "down_proj", "gate_up_proj")
    assert changed
    assert all(any(word in key for word in adapted) for key in changed), changed
    assert not any("embed" in key or "norm" in key or "lm_head" in key or "bias" in key for key in changed)


@pytest.mark.parametrize(
    ("name", "shared"), [*(("olmoe", key) for key in SHARED), *((name, "both") for name in NAMES[1:])]
)
def test_what_experts_share_is_added_to_each_of_them(name: str, shared: str, tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, name, **SHARED[shared])
    merge_checkpoint(adapter.path, None, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_difference(adapter.logits(adapter.base), adapter.logits()) > 0.1
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5
    of_model = copy.deepcopy(adapter.model).merge_and_unload()
    assert relative_difference(adapter.logits(of_model), adapter.logits()) < 1e-5


def test_sums_are_rounded_once(tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "olmoe", dtype=torch.bfloat16)
    merge_checkpoint(adapter.model, str(adapter.base_path), tmp_path / "merged")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "merged")
    saved = load_file(adapter.path / "adapter_model.safetensors")
    key = "model.layers.0.mlp.experts.3.down_proj.weight"  # experts 0 and 3 are adapted
    a, b = (saved[f"base_model.model.model.layers.0.mlp.experts.lora_down_{side}.weight"][1].float() for side in "AB")
    assert after[key].dtype == torch.bfloat16
    assert torch.equal(after[key], (before[key].float() + 7 / 4 * (b.T @ a)).bfloat16())
    cold = key.replace(".3.", ".2.")
    assert torch.equal(after[cold], before[cold])


class _Largest(TorchDispatchMode):
    """The largest tensor with memory of its own that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        mine = [x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x.is_meta and x.untyped_storage().data_ptr() not in mine:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


def test_memory_is_that_of_a_matrix_not_of_a_file(tmp_path: Path) -> None:
    """All weights in one file: nothing larger than the adapter's largest tensor or a matrix is made on the way."""
    adapter = saved_adapter(tmp_path, "gpt_oss")
    file = tmp_path / "base" / "model.safetensors"
    matrices = [t.numel() * 4 for t in load_file(file).values() if t.dim() == 2]
    factors = [t.numel() * 4 for t in load_file(adapter.path / "adapter_model.safetensors").values()]
    stack = 8 * 48 * 32 * 4
    with _Largest() as largest:
        merge_checkpoint(adapter.path, None, tmp_path / "merged")
    assert 0 < largest.nbytes <= max(*factors, *matrices) < stack
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5


def test_a_checkpoint_without_the_models_head_or_prefix(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    adapter = adapters["olmoe"]
    bare = tmp_path / "bare"
    bare.mkdir()
    short = {key.removeprefix("model."): t for key, t in weights(adapter.base_path).items() if key != "lm_head.weight"}
    save_file(short, bare / "model.safetensors", metadata={"format": "pt"})
    (bare / "config.json").write_bytes((adapter.base_path / "config.json").read_bytes())
    merge_checkpoint(adapter.path, str(bare), tmp_path / "merged")
    merge_checkpoint(adapter.path, None, tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    for key, tensor in weights(tmp_path / "merged").items():
        assert torch.equal(tensor, whole["model." + key])


def test_a_stack_that_was_published_the_other_way_round(tmp_path: Path) -> None:
    # transformers loads it either way, by its shape.
    base = tiny_model_of(Qwen3VLMoeForConditionalGeneration)
    batch = inputs_for(base)
    base.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "published")
    tensors = {
        key: t.transpose(1, 2).contiguous() if key.endswith(("experts.gate_up_proj", "experts.down_proj")) else t
        for key, t in weights(tmp_path / "saved").items()
    }
    assert any(key.endswith("experts.down_proj") for key in tensors)
    save_file(tensors, tmp_path / "published" / "model.safetensors", metadata={"format": "pt"})
    mask = {layer.path: [1, 4] for layer in find_moe_layers(base)}
    model = get_peft_model(base, SieveLoraConfig(r=4, selected_experts=mask)).eval()
    randomize_adapters(model)
    with torch.no_grad():
        expected = model(**batch).logits
        for name in ("saved", "published"):
            merge_checkpoint(model, str(tmp_path / name), tmp_path / f"{name}_merged")
            merged = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / f"{name}_merged").eval()
            assert relative_difference(merged(**batch).logits, expected) < 1e-5


@pytest.mark.parametrize("shared", [{}, SHARED["both"]], ids=["own", "shared"])
def test_experts_in_a_module_list(shared: dict[str, Any], tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path, "deepseek_like", base=deepseek_like(), **shared)
    merge_checkpoint(adapter.model, str(adapter.base_path), tmp_path / "merged")
    merged = deepseek_like(seed=1)
    merged.load_state_dict(weights(tmp_path / "merged"))
    assert relative_difference(adapter.logits(merged), adapter.logits()) < 1e-5


# --- refused --------------------------------------------------------------------------------------------------------


def refused(match: str, adapter: Any, base: Any, output: Path) -> None:
    with pytest.raises(SieveError, match=match):
        merge_checkpoint(adapter, base, output)
    assert not output.exists() or not list(output.glob("*.safetensors"))


def changed_copy(adapter: Adapter, folder: Path, change: Any = lambda tensors: None, **config: Any) -> str:
    folder.mkdir()
    content = json.loads((adapter.base_path / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    tensors = weights(adapter.base_path)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_checkpoints_that_cannot_be_added_to(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    adapter, output = adapters["olmoe"], tmp_path / "out"
    base = changed_copy(adapter, tmp_path / "a", quantization_config={"quant_method": "mxfp4"})
    refused(r"checkpoint is quantised \(mxfp4\)", adapter.path, base, output)

    key = "model.layers.0.mlp.experts.3.up_proj.weight"

    def to_fp8(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    base = changed_copy(adapter, tmp_path / "b", to_fp8)
    refused(rf"holds {key} as F8_E4M3, not as one of F64, F32, BF16, F16", adapter.path, base, output)
    base = changed_copy(adapter, tmp_path / "c", lambda tensors: tensors.pop(key))
    refused(rf"has no weight '{key}', which the adapter changes", adapter.path, base, output)

    def wider(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = torch.zeros(24, 16)

    base = changed_copy(adapter, tmp_path / "d", wider)
    refused(r"a weight of shape \(24, 16\) where the adapter adds \(24, 32\)", adapter.path, base, output)
    (tmp_path / "d" / "model.safetensors").unlink()
    refused(r"has no model.safetensors", adapter.path, base, output)


def test_places(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    adapter = adapters["olmoe"]
    before = headers(adapter.base_path)
    with pytest.raises(SieveError, match="or the base model itself"):
        merge_checkpoint(adapter.path, None, adapter.base_path)
    assert headers(adapter.base_path) == before
    model = PeftModel.from_pretrained(tiny_model("olmoe"), adapter.path)
    refused("base model is not found at ''", model, None, tmp_path / "out")


def test_what_no_checkpoint_can_hold(tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path / "a", "olmoe", modules_to_save=["lm_head"])
    refused(r"modules_to_save=.*call merge_and_unload\(\)", adapter.path, None, tmp_path / "out")
    tied = tiny_model("olmoe", tie_word_embeddings=True)
    adapter = saved_adapter(tmp_path / "b", "olmoe", base=tied, target_modules=["embed_tokens"], rank_pattern={})
    refused("adapter is on model.embed_tokens, whose weight is also that of", adapter.path, None, tmp_path / "out")


def test_a_crash_leaves_what_was_there(
    adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(peft_sieve.adapters.checkpoint.merge, "write_card", full_disk)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(OSError, match="No space left"):
        merge_checkpoint(adapters["olmoe"].path, None, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_command(adapters: dict[str, Adapter], tmp_path: Path, capsys: Any) -> None:
    adapter = adapters["olmoe"]
    assert main(["export", str(adapter.path), str(tmp_path / "out"), "--merge"]) == 0
    assert f"merged checkpoint in {tmp_path / 'out'}" in capsys.readouterr().out
    assert headers(tmp_path / "out") == headers(adapter.base_path)
