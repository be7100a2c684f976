"""Which files of a base model's folder or repository a merged checkpoint is made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sieve import SieveError, merge_checkpoint
from peft_sieve.cli import main
from tests.adapters.saved import Adapter, relative_difference, saved_adapter
from tests.hub_standin import HubStandIn
from tests.models import TINY_OLMOE, tiny_model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Its base model is in one file."""
    return saved_adapter(tmp_path_factory.mktemp("olmoe"), "olmoe")


def add_older_shards(folder: Path) -> None:
    tiny_model("olmoe", seed=7).save_pretrained(folder / "older", max_shard_size="40KB")
    for path in (folder / "older").glob("model*"):
        path.rename(folder / path.name)
    shutil.rmtree(folder / "older")


def assert_merged(adapter: Adapter, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert relative_difference(adapter.logits(model), adapter.logits()) < 1e-5


def weights_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "safetensors" in path.name)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", ["all", "none", "broken index"])
def test_one_file_counts_before_an_index(adapter: Adapter, shards: str, tmp_path: Path) -> None:
    base = shutil.copytree(adapter.base_path, tmp_path / "base")
    add_older_shards(base)
    if shards != "all":
        for path in base.glob("model-*.safetensors"):
            path.unlink()
    if shards == "broken index":
        (base / INDEX).write_text("{")
    loaded = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(adapter.logits(loaded), adapter.logits(adapter.base)), "transformers reads other files"
    assert main(["export", str(adapter.path), str(tmp_path / "merged"), "--merge", "--base-model", str(base)]) == 0
    assert weights_in(tmp_path / "merged") == [SINGLE]
    assert_merged(adapter, tmp_path / "merged")


def test_the_file_that_the_configuration_names_counts_before_all(adapter: Adapter, tmp_path: Path) -> None:
    base = shutil.copytree(adapter.base_path, tmp_path / "base")
    (base / SINGLE).rename(base / "named.safetensors")
    add_older_shards(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_weights": "named.safetensors"}))
    merge_checkpoint(adapter.path, base, tmp_path / "merged")
    assert weights_in(tmp_path / "merged") == ["named.safetensors"]
    assert_merged(adapter, tmp_path / "merged")


def test_weights_outside_the_folder_are_refused(adapter: Adapter, tmp_path: Path) -> None:
    base = shutil.copytree(adapter.base_path, tmp_path / "base")
    (base / SINGLE).rename(tmp_path / "outside.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../outside.safetensors"}}))
    with pytest.raises(SieveError, match=r"has no ../outside.safetensors"):
        merge_checkpoint(adapter.path, base, tmp_path / "merged")


def test_a_folder_with_weights_that_would_stay_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    merge_checkpoint(adapter.path, adapter.base_path, tmp_path / "merged")
    merge_checkpoint(adapter.path, adapter.base_path, tmp_path / "merged")  # the same files again
    assert_merged(adapter, tmp_path / "merged")
    for name in (INDEX, "adapter_config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        with pytest.raises(SieveError, match=f"holds {name}, which would be taken for a part of the checkpoint"):
            merge_checkpoint(adapter.path, adapter.base_path, tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]


# --- what goes along ------------------------------------------------------------------------------------------------

KEPT = ("modeling_own.py", "LICENSE", "processor_config.json", "additional_chat_templates/rag.jinja")
LEFT = {
    "README.md": "",
    "training_args.bin": "",
    "optimizer.pt": "",
    "rng_state_0.pth": "",
    "trainer_state.json": "{}",
    "pytorch_model.bin": "",
    "pytorch_model.bin.index.json": "{}",
    "model.fp16.safetensors": "",
    "consolidated.safetensors": "",
    "model.safetensors.index.json": '{"weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}',
    "model-1-of-2.safetensors": "",
    "runs/Jan01/events.out.tfevents.1": "",
    "checkpoint-5/config.json": "{}",
    "checkpoint-5/tokenizer.json": "{}",
    "checkpoint-5/model.safetensors": "",
    "original/consolidated.00.pth": "",
    ".cache/download": "",
}


def full_base(adapter: Adapter, folder: Path) -> Path:
    shutil.copytree(adapter.base_path, folder)
    AutoTokenizer.from_pretrained(TINY_OLMOE).save_pretrained(folder)
    for name, text in {**dict.fromkeys(KEPT, "{{ messages }}"), **LEFT}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    get_peft_model(adapter.fresh(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_what_belongs_to_the_checkpoint_goes_along(
    adapter: Adapter, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = full_base(adapter, tmp_path / "base")
    own = files_in(base) - LEFT.keys() - {"adapter_config.json", "adapter_model.safetensors"}
    assert own > {*KEPT, "config.json", "generation_config.json", "tokenizer.json", SINGLE}
    if place == "folder":
        merge_checkpoint(adapter.path, base, tmp_path / "merged")
    else:
        with HubStandIn() as hub:
            hub.patch_client(monkeypatch, tmp_path / "home")
            hub.add("me/base", {name: (base / name).read_bytes() for name in files_in(base) if name[0] != "."})
            merge_checkpoint(adapter.path, "me/base", tmp_path / "merged")
            asked = " ".join(call.path for call in hub.log)
        assert not any(name in asked for name in ("optimizer.pt", "consolidated", "1-of-2", "checkpoint-5/model"))
    assert files_in(tmp_path / "merged") == own | {"README.md"}
    assert_merged(adapter, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert tokenizer.chat_template["rag"] == "{{ messages }}"


def test_an_output_inside_the_base_folder(adapter: Adapter, tmp_path: Path) -> None:
    base: Any = shutil.copytree(adapter.base_path, tmp_path / "base")
    for _ in range(2):
        merge_checkpoint(adapter.path, base, base / "merged")
        assert files_in(base / "merged") == files_in(adapter.base_path) | {"README.md"}
