"""EleutherAI's harness evaluates a saved sparse adapter under `peft-sieve run`. `make test-tools` installs it."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sieve import SieveLoraConfig
from tests.models import EXAMPLES, TINY_OLMOE, randomize_adapters, small_olmoe, small_tokenizer
from tests.pages import ROOT, blocks, commands

pytest.importorskip("lm_eval", reason="lm_eval is not installed: make test-tools runs this")

MODEL = f"pretrained={TINY_OLMOE},peft={{}},dtype=float32"
TASK = """\
task: spider_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nSQL:"
doc_to_choice: choices
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    with lzma.open(EXAMPLES / "data" / "spider_dev.jsonl.xz", "rt", encoding="utf-8") as lines:
        spider = [json.loads(line) for line in lines][:8]
    return [
        {"question": row["question"], "choices": [row["query"], other["query"]]}
        for row, other in zip(spider, spider[3:] + spider[:3], strict=True)
    ]


def log_likelihood(model: nn.Module, context: str, continuation: str) -> float:
    """Sum over the tokens of `continuation` after `context` and a space."""
    tokenizer = small_tokenizer()
    whole = tokenizer(f"{context} {continuation}").input_ids
    start = len(tokenizer(context).input_ids)
    with torch.no_grad():
        log_probabilities = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_probabilities[i - 1, whole[i]].item() for i in range(start, len(whole)))


def test_the_harness_evaluates_a_sparse_adapter(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    mask = {f"model.layers.{i}.mlp.experts": [1, 5, 9, 20] for i in range(6)}
    model = get_peft_model(small_olmoe(), SieveLoraConfig(r=4, selected_experts=mask, task_type="CAUSAL_LM"))
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    data = tmp_path / "spider.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "spider_choice.yaml").write_text(TASK.format(data=data))

    # The command of docs/trl.md, on this adapter and on a task that is not downloaded.
    (words,) = (
        command
        for language, block in blocks(ROOT / "docs" / "trl.md")
        if language == "sh"
        for command in commands(block)
        if "lm_eval" in command
    )
    ours = {"gsm8k": "spider_choice", "pretrained=examples/tiny-olmoe,peft=out/sft": MODEL.format(tmp_path / "adapter")}
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from peft_sieve.cli import main; raise SystemExit(main())"),
            *(ours.get(word, word) for word in words[1:]),
            *("--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "4"),
            *("--output_path", str(tmp_path / "out"), "--log_samples"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    (samples,) = tmp_path.glob("out/**/samples_*.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    adapted = PeftModel.from_pretrained(small_olmoe(), tmp_path / "adapter").eval()
    base = small_olmoe()
    right = 0
    for row, sample in zip(rows, sorted(logged, key=lambda sample: sample["doc_id"]), strict=True):
        context = f"{row['question']}\nSQL:"
        expected = [log_likelihood(adapted, context, choice) for choice in row["choices"]]
        found = [float(value) for value, _ in sample["filtered_resps"]]
        assert found == pytest.approx(expected, rel=1e-3)
        assert found != pytest.approx([log_likelihood(base, context, c) for c in row["choices"]], rel=1e-2)
        right += expected[0] > expected[1]
    (results,) = tmp_path.glob("out/**/results_*.json")
    assert json.loads(results.read_text())["results"]["spider_choice"]["acc,none"] == right / len(rows)
