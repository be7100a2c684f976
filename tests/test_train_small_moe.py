"""The script that trains a small MoE really trains one, and the trained ones beside it are what their page says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sieve.moe.topology import find_moe_layers
from tests.models import EXAMPLES, TINY_OLMOE

QWEN2_MOE = {"model-type": "qwen2_moe", "tokenizer": TINY_OLMOE, "expert-size": 16, "shared-expert-size": 24}


@pytest.mark.parametrize("choice", [{}, QWEN2_MOE], ids=["olmoe", "qwen2_moe"])
def test_trains_saves_and_loads(choice: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It was a bright cold day in April. " * 80)
    lines = [json.dumps({"text": f"def add_{n}(a, b): return a + b + {n}"}) for n in range(150)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "train_small_moe.py"), "--out", str(tmp_path / "moe")]
    command += ["--domain", f"prose=1:{tmp_path}/*.txt", "--domain", f"code=2:{tmp_path}/b.jsonl"]
    options = {"steps": 40, "batch-size": 4, "length": 32, "layers": 2, "experts": 8, "hidden-size": 32}
    options |= {"log-every": 10, "vocab-size": 300, "learning-rate": 0.01, **choice}
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] - 2, losses

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    text = "def add_12(a, b): return a + b + 12"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    layers = find_moe_layers(model)
    assert [layer.num_experts for layer in layers] == [8, 8]
    assert model.config.model_type == choice.get("model-type", "olmoe")
    assert model.config.output_router_logits
    if choice:
        block = model.model.layers[0].mlp
        assert block.gate.norm_topk_prob
        assert block.experts.intermediate_dim == 16
        assert block.shared_expert.up_proj.out_features == 24
        assert len(tokenizer) == model.config.vocab_size == 4096
    assert model(input_ids=ids, labels=ids).loss < 4


def test_trains_a_saved_model_further(tmp_path: Path) -> None:
    """With a learning rate that changes next to nothing, the first loss is that of the model it began with."""
    (tmp_path / "a.txt").write_text("Question: Tom has 3 apples and buys 4. How many has he now?")
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "train_small_moe.py"), "--out", str(tmp_path / "moe")]
    command += ["--domain", f"math=1:{tmp_path}/a.txt", "--init", str(TINY_OLMOE)]
    command += ["--steps=1", "--batch-size=1", "--length=16", "--learning-rate=1e-12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"loss ([\d.]+)", done.stdout)[0]) < 5  # an untrained model has log(4096) = 8.3
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (TINY_OLMOE, tmp_path / "moe"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "parameters", "experts", "top_k"),
    [("tiny-olmoe", 4_484_224, 32, 4), ("tiny-qwen2-moe", 5_837_440, 64, 6)],
)
def test_models_of_the_examples(name: str, parameters: int, experts: int, top_k: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / name, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [layer.num_experts for layer in find_moe_layers(model)] == [experts] * 6
    assert model.config.num_experts_per_tok == top_k
    assert model.config.norm_topk_prob == (name == "tiny-qwen2-moe")
    assert (EXAMPLES / name / "model.safetensors").stat().st_size < 12_000_000

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / name)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(TINY_OLMOE).get_vocab()
    text = "Question: Tom has 3 apples and buys 4. How many has he now?\nAnswer: He has 3 + 4 = <<3+4=7>>7 apples."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert model(input_ids=ids, labels=ids).loss < 3  # an untrained model has log(4096) = 8.3
