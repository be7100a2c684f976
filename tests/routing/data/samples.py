"""Rows of calibration data, and what is read from them."""

import re

import pytest

from peft_sieve.errors import SieveError
from peft_sieve.routing.data.batches import calibration_batches

CHAT_TEMPLATE = (
    "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}{% if mood is defined %}({{ mood }}){% endif %}"
    "{% for message in messages %}{% if message['role'] == 'forbidden' %}{{ raise_exception('no such role') }}"
    "{% endif %}<{{ message['role'] }}>{{ message['content'] }}{{ message['name'] if 'name' in message }}"
    "{% endfor %}"
)
CHAT = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]
CHAT_TEXT = "<user>What is two and two?<assistant>Four."
TEXTS = [
    "a",
    "one two three",
    "naïve café 東京 🦀 \u2028 end",
    "the quick brown fox jumps over the lazy dog",
    "two words",
]


def rows_of(data):
    """The unmasked token ids of each sample, in the order of the batches."""
    return [
        ids[mask.bool()].tolist()
        for batch in data.batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def encoded(tokenizer, *texts):
    """Token ids of each text, longest first."""
    return sorted((tokenizer(text)["input_ids"] for text in texts), key=len, reverse=True)


def numbers(count):
    """Rows that can be told apart: row i is [i, i, ...], 1 to 5 tokens long."""
    return [{"input_ids": [i] * (1 + i % 5)} for i in range(count)]


def chosen_numbers(data):
    return sorted(ids[0] for ids in rows_of(data))


def assert_same(left, right):
    assert left.fingerprint == right.fingerprint
    assert rows_of(left) == rows_of(right)


def assert_refused(data, text, tokenizer):
    with pytest.raises(SieveError, match=re.escape(text)) as caught:
        calibration_batches(data, tokenizer=tokenizer)
    assert str(caught.value).endswith(".")
