"""Registering with PEFT: safe to repeat, light to import, and no other method notices."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_sieve
from peft_sieve import SieveLoraConfig, SieveLoraModel
from peft_sieve.hf import patches
from peft_sieve.hf.methods import methods
from tests.models import tiny_model, token_batch

IMPORT = """
import sys, json
import peft
before = set(sys.modules)
import peft_sieve
names = ("datasets", "trl", "matplotlib", "rich", "pandas", "scipy", "transformers.trainer")
heavy = [m for m in names if m in set(sys.modules) - before]
from peft import PeftType, PeftConfig
config = peft_sieve.SieveLoraConfig(selected_experts={"a": [1]})
print(json.dumps({"heavy": heavy, "type": PeftType("SIEVE_LORA").value, "members": [m.value for m in PeftType][-4:]}))
"""


def test_the_import_pulls_in_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    members = [method.name for method in methods() if method.config.__module__.startswith("peft_sieve.")]
    assert json.loads(done.stdout) == {"heavy": [], "type": "SIEVE_LORA", "members": members}


def test_the_enumeration_member() -> None:
    member = PeftType.SIEVE_LORA
    assert member is PeftType("SIEVE_LORA") is PeftType["SIEVE_LORA"]
    assert isinstance(member, PeftType)
    assert member == "SIEVE_LORA" == member.value
    assert member.name == "SIEVE_LORA"
    assert list(PeftType).count("SIEVE_LORA") == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert SieveLoraConfig().peft_type is member
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is SieveLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SieveLoraModel


def test_importing_twice_and_reloading(tmp_path: Path) -> None:
    """Also after a reload the wrapped methods lead to PEFT's own, not to a wrapper of a wrapper."""
    config = SieveLoraConfig(selected_experts={"model.layers.0.mlp.experts": [2, 1]})
    dumped = pickle.dumps(config)
    originals = {n: PeftModel.__dict__[n]._peft_sieve_original for n in ("save_pretrained", "load_adapter")}
    importlib.reload(patches)
    importlib.reload(peft_sieve)
    assert pickle.loads(dumped) == config
    for name, original in originals.items():
        assert PeftModel.__dict__[name]._peft_sieve_original is original
        assert not hasattr(original, "_peft_sieve_original")
    assert list(PeftType).count("SIEVE_LORA") == 1
    config.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is SieveLoraConfig


def test_other_methods_behave_as_before(tmp_path: Path) -> None:
    """Same files and same outputs as in a process that never imported the package."""
    script = """
import sys, torch
if sys.argv[2] == "with": import peft_sieve
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
torch.manual_seed(0)
lora = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
model.save_pretrained(sys.argv[1] + "/" + sys.argv[2])
torch.manual_seed(0)
loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), sys.argv[1] + "/" + sys.argv[2])
torch.save(loaded(torch.arange(9)[None]).logits, sys.argv[1] + "/" + sys.argv[2] + ".pt")
"""
    for mode in ("with", "without"):
        subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path), mode], check=True)
    files = sorted(p.name for p in (tmp_path / "without").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "with").iterdir())
    for name in ("adapter_model.safetensors", "README.md"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    configs = [json.loads((tmp_path / mode / "adapter_config.json").read_text()) for mode in ("with", "without")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set in the order of its hashes
    assert configs[0] == configs[1]
    assert torch.equal(torch.load(tmp_path / "with.pt"), torch.load(tmp_path / "without.pt"))


def test_a_lora_adapter_beside_a_sieve_adapter_is_refused_by_peft() -> None:
    model = tiny_model("olmoe")
    peft_model = get_peft_model(model, SieveLoraConfig(r=4, calib_dataset=[token_batch(model)], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="different peft types"):
        peft_model.add_adapter("plain", LoraConfig())
