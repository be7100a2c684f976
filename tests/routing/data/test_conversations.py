"""Turns and columns of a conversation: each reaches the model, or the row is refused by name."""

import json
import re
import warnings

import datasets
import pytest

from peft_sieve.errors import SieveError
from peft_sieve.routing.data.batches import calibration_batches
from tests.routing.data.samples import CHAT, CHAT_TEXT, assert_refused, encoded, rows_of

# Knows four roles and tool calls, and passes over everything else, as many templates do.
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool['name'] }}]{% endfor %}"
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant', 'tool'] %}"
    "<{{ message['role'] }}>{{ message['content'].split('</think>')[-1].strip() if message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
CALL = {"name": "weather", "arguments": {"city": "Paris"}}
AGENT = [
    {"from": "human", "value": "How is the weather?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "sunny"},
    {"from": "gpt", "value": "It is sunny."},
]
AGENT_TEXT = f"<user>How is the weather?<assistant>{json.dumps(CALL)}<tool>sunny<assistant>It is sunny."
SYSTEM = {"system": "Be brief."}


@pytest.fixture
def strict_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts_of(rows, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [tokenizer.decode(ids) for ids in rows_of(calibration_batches(rows, tokenizer=tokenizer))]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"conversations": AGENT}, AGENT_TEXT),
        ({"conversations": [*AGENT[:2], {"from": "tool", "value": "sunny"}, AGENT[3]]}, AGENT_TEXT),
        ({"conversations": AGENT, **SYSTEM}, f"<system>Be brief.{AGENT_TEXT}"),
        (
            {"conversations": [{"from": "system", "value": "Be long."}, *AGENT], **SYSTEM},
            f"<system>Be long.{AGENT_TEXT}",
        ),
        ({"conversations": AGENT, "system": ""}, AGENT_TEXT),
        ({"conversations": AGENT, "tools": json.dumps([{"name": "weather"}])}, f"[weather]{AGENT_TEXT}"),
        ({"messages": CHAT, **SYSTEM}, f"<system>Be brief.{CHAT_TEXT}"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:], **SYSTEM}, f"<system>Be brief.{CHAT_TEXT}"),
        ({"chosen": CHAT, **SYSTEM}, f"<system>Be brief.{CHAT_TEXT}"),
        ({"prompt": CHAT[0]["content"], "chosen": CHAT}, CHAT_TEXT),
        ({"conversations": AGENT[:3], "chosen": AGENT[3]}, AGENT_TEXT),
        ({"prompt": "2+2=", "completion": "4", "system": "2"}, "2+2=4"),
    ],
)
def test_every_turn_and_column_is_read(row, text, strict_tokenizer):
    assert texts_of([row], strict_tokenizer) == [text]
    assert texts_of(datasets.Dataset.from_list([row]), strict_tokenizer) == [text]


def test_the_forms_of_a_call(strict_tokenizer):
    """As an object, as several, with OpenAI's wrapping, with arguments that are JSON in JSON."""
    forms = [CALL, [CALL], {"type": "function", "function": CALL}, {**CALL, "arguments": '{"city": "Paris"}'}]
    for form in forms:
        for value in (form, json.dumps(form)):
            conversations = [AGENT[0], {"from": "function_call", "value": value}, *AGENT[2:]]
            assert texts_of([{"conversations": conversations}], strict_tokenizer) == [AGENT_TEXT]
    both = [AGENT[0], {"from": "function_call", "value": json.dumps([CALL, CALL])}]
    assert texts_of([{"conversations": both}], strict_tokenizer)[0].count('"weather"') == 2


def test_what_templates_do_to_a_turn_is_no_loss(strict_tokenizer):
    """Reasoning of a turn that goes, blanks that are trimmed, turns that are empty, keys beside the content."""
    rows = [
        {"role": "user", "content": "  hi \n"},
        {"role": "assistant", "content": "<think>hm</think>", "reasoning_content": "hm"},
        {"role": "user", "content": None, "name": "Bo"},
        {"role": "assistant", "reasoning_content": "hm"},
        {"role": "nobody", "content": " "},
    ]
    assert texts_of([{"messages": rows}], strict_tokenizer) == ["<user>hi<assistant><user><assistant>"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {"messages": [*CHAT, {"role": "observation", "content": "sunny"}]},
            "shows nothing of turn 2 of row 0 of the calibration data (role 'observation', key 'content').",
        ),
        ({"conversations": [{"from": "narrator", "value": "Once."}]}, "(role 'narrator'"),
        ({"prompt": CHAT[:1], "completion": [{"role": "model", "content": "4"}]}, "(role 'model'"),
        (
            {"messages": [{"role": "function", "tool_calls": [{"function": CALL}]}]},
            "(role 'function', key 'tool_calls')",
        ),
        (
            {"messages": [{"role": "user", "text": "hi"}]},
            "(role 'user', key 'text')",
        ),
        ({"messages": [{"role": 3, "content": "hi"}]}, "The role in turn 0 of row 0 of the calibration data must be a"),
        (
            {"conversations": [{"from": "function_call", "value": "weather(Paris)"}]},
            "turn 0 of row 0 of the calibration ",
        ),
        ({"conversations": [{"from": "function_call", "value": '["weather"]'}]}, "is not a call in JSON with `name`"),
        ({"conversations": [{"from": "function_call", "value": '{"args": 1}'}]}, "is not a call in JSON with `name`"),
        ({"conversations": [{"from": "function_call"}]}, "is not a call in JSON with `name`"),
        ({"messages": CHAT, "chat_template_kwargs": "calm"}, "`chat_template_kwargs` of row 0 of the calibration data"),
        ({"prompt": "2+2=", "completion": "4", **SYSTEM}, "is text without what stands in the column 'system'"),
        ({"prompt": "2+2=", "completion": "4", "tools": '[{"name": "add"}]'}, "in the column 'tools'"),
        (
            {"instruction": "Add.", "input": "2+2", "chosen": "4", "rejected": "5"},
            "`chosen` of row 0 of the calibration ",
        ),
        (
            {"question": "2+2?", "chosen": "4", "rejected": "5"},
            "in the column 'question'. Pass messages, leave the col",
        ),
        (
            {"prompt": "hi", "chosen": CHAT},
            "`prompt` + `chosen` of row 0 of the calibration data must be two str or two",
        ),
    ],
)
def test_what_is_refused(row, text, strict_tokenizer):
    assert_refused([row], text, strict_tokenizer)
    if not isinstance(row.get("messages", [{}])[0].get("role"), int):
        assert_refused(datasets.Dataset.from_list([row]), text, strict_tokenizer)


def test_a_template_that_knows_the_roles_and_not_the_form(tokenizer):
    """No calls of tools, as Llama 3's; no parts, as Qwen3's."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] in ['user', 'assistant', 'tool'] %}<{{ m['role'] }}>"
        "{% if m['content'] is string %}{{ m['content'] }}{% endif %}{% endif %}{% endfor %}"
    )
    called = "nothing of turn 1 of row 0 of the calibration data (role 'function_call', key 'tool_calls')."
    assert_refused([{"conversations": AGENT}], called, tokenizer)
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, *CHAT]
    assert_refused([{"messages": parts}], "nothing of turn 0 of row 0 of the calibration data", tokenizer)


def test_what_a_template_leaves_out_knowingly_is_said_once(tokenizer):
    """As Mixtral's, which shows the system prompt only before a last turn of the user, and no tools."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{% else %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    rows = [{"messages": CHAT, **SYSTEM, "tools": [{"type": "function", "function": {"name": "add"}}]}] * 2
    with pytest.warns(UserWarning) as caught:
        data = calibration_batches(rows, tokenizer=tokenizer)
    assert [str(warning.message) for warning in caught] == [
        "The chat template does not show `content` of turn 0 of row 0 of the calibration data (system), nor 3 other "
        "parts of the data. The calibration goes without them, as training with this template does."
    ]
    assert rows_of(data) == encoded(tokenizer, CHAT_TEXT) * 2


def test_columns_that_are_no_part_of_the_sample(strict_tokenizer):
    """Text that has the prompt in it, whole samples, and settings under the same name."""
    rows = [
        ({"question": "2+2?", "chosen": "2+2? 4"}, "2+2? 4"),
        ({"text": "2+2=4", "instruction": "Add.", "input": "2+2", "output": "4"}, "2+2=4"),
        ({"messages": CHAT, "system": 3, "question": "?"}, CHAT_TEXT),
    ]
    for row, text in rows:
        assert texts_of([row], strict_tokenizer) == [text]


def test_the_error_names_the_row(strict_tokenizer):
    rows = [{"messages": CHAT}, {"messages": [*CHAT, {"role": "critic", "content": "Good."}]}]
    with pytest.raises(SieveError, match=re.escape("nothing of turn 2 of row 1")):
        calibration_batches(rows, tokenizer=strict_tokenizer)
