"""What is calibrated on against what TRL trains on: the same token ids, form by form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from peft_sieve.routing.data.batches import calibration_batches
from tests.models import small_olmoe, small_tokenizer
from tests.routing.data.samples import CHAT, rows_of
from tests.routing.data.test_conversations import TEMPLATE
from tests.training.runs import settings
from tests.trl.scripts import questions

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
AGENT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is the weather?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "<think>So it is.</think>It is sunny."},
]
TOOLS = [{"name": "weather", "description": "tells it"}]
FORMS: list[dict[str, Any]] = [
    {"messages": CHAT},
    {"messages": AGENT},
    {"messages": AGENT, "tools": TOOLS},
    {"messages": AGENT, "tools": json.dumps(TOOLS)},
    {"messages": AGENT, "chat_template_kwargs": {"mood": "calm"}},
    {"prompt": AGENT[:4], "completion": AGENT[4:], "tools": TOOLS},
    {"conversations": [{"from": message["role"], "value": message["content"]} for message in CHAT]},
    {"prompt": "2+2=", "completion": "4<|endoftext|>"},
    {"text": "2+2=4<|endoftext|>"},
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> SFTTrainer:
    folder: Path = tmp_path_factory.mktemp("sft")
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{% for tool", "{{ mood }}{% for tool", 1)
    data = Dataset.from_list([{"text": questions(1)[0]["question"]}])
    return SFTTrainer(
        small_olmoe(), SFTConfig(**settings(folder, bf16=False)), train_dataset=data, processing_class=tokenizer
    )


@pytest.mark.parametrize("row", FORMS)
def test_the_token_ids_are_those_of_training(row: dict[str, Any], trainer: SFTTrainer) -> None:
    tokenizer = trainer.processing_class
    data = Dataset.from_list([row])
    trained = trainer._prepare_dataset(data, tokenizer, trainer.args, False, None, "train")
    assert rows_of(calibration_batches(data, tokenizer=tokenizer)) == trained["input_ids"]
