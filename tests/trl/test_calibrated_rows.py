"""What is calibrated on against what TRL trains on: the same token ids, form by form."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import trl
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


TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TEMPLATES = [path for path in TEMPLATES if not path.stem.endswith("_training")]
CHATS = {
    "plain": CHAT,
    "with a system prompt": [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "user", "content": " And? "}],
    "with reasoning": [*CHAT[:1], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nFour."}, *CHAT],
    "with nothing but reasoning": [*CHAT[:1], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n"}, *CHAT],
    "with reasoning apart": [*CHAT[:1], {**CHAT[1], "reasoning_content": "Hm."}, *CHAT],
}


@pytest.mark.parametrize("name", CHATS)
def test_what_templates_of_models_drop_is_not_refused(name: str) -> None:
    """They trim, drop earlier reasoning, and move the system prompt; what TRL trains on is calibrated on."""
    tokenizer, compared = small_tokenizer(), 0
    for path in TEMPLATES:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        try:
            text = tokenizer.apply_chat_template(CHATS[name], tokenize=False)
        except Exception:
            continue  # no system prompts
        if "Four." not in text:
            continue  # those of processors read parts only
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = calibration_batches([{"messages": CHATS[name]}], tokenizer=tokenizer)
        assert rows_of(made) == [tokenizer(text, add_special_tokens=False)["input_ids"]], path.name
        compared += 1
    assert compared > 20 or not TEMPLATES


@pytest.mark.parametrize("row", FORMS)
def test_the_token_ids_are_those_of_training(row: dict[str, Any], trainer: SFTTrainer) -> None:
    tokenizer = trainer.processing_class
    data = Dataset.from_list([row])
    trained = trainer._prepare_dataset(data, tokenizer, trainer.args, False, None, "train")
    assert rows_of(calibration_batches(data, tokenizer=tokenizer)) == trained["input_ids"]
