"""One row in every accepted form -> samples."""

import datasets
import numpy as np
import pytest
import torch

from peft_sieve.errors import SieveError
from peft_sieve.routing.data.batches import calibration_batches
from tests.routing.data.samples import CHAT, CHAT_TEXT, assert_refused, encoded, rows_of

FORMS = "`text`, `messages`, `prompt` + `completion`, `chosen` + `rejected`, `input_ids` or `conversations`"


def test_row_forms(chat_tokenizer):
    forms = [
        ("plain text", "plain text"),
        ({"text": "plain text"}, "plain text"),
        ({"messages": CHAT}, CHAT_TEXT),
        ({"prompt": "2+2=", "completion": " 4"}, "2+2= 4"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT_TEXT),
        (
            {"conversations": [{"from": "human", "value": "What is two and two?"}, {"from": "gpt", "value": "Four."}]},
            CHAT_TEXT,
        ),
        ({"conversations": CHAT}, CHAT_TEXT),
        ({"text": "unused", "messages": CHAT}, CHAT_TEXT),
        ({"messages": [{"role": "user", "content": "hi", "name": None}]}, "<user>hi"),
        ({"messages": CHAT, "tools": [{"name": "calc"}]}, f"[calc]{CHAT_TEXT}"),
        ({"messages": CHAT, "tools": '[{"name": "calc"}]'}, f"[calc]{CHAT_TEXT}"),
        ({"messages": CHAT, "chat_template_kwargs": {"mood": "calm"}}, f"(calm){CHAT_TEXT}"),
    ]
    for row, text in forms:
        data = calibration_batches([row], tokenizer=chat_tokenizer)
        assert rows_of(data) == encoded(chat_tokenizer, text), row


def test_a_preference_row_gives_both_answers(chat_tokenizer):
    other = [{"role": "assistant", "content": "Five."}]
    other_text = "<user>What is two and two?<assistant>Five."
    assert other_text == CHAT_TEXT.replace("Four", "Five")
    forms = [
        ({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}, ["2+2= 4", "2+2= 5"]),
        ({"chosen": "2+2=4", "rejected": "2+2=5"}, ["2+2=4", "2+2=5"]),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": other}, [CHAT_TEXT, other_text]),
        ({"chosen": CHAT, "rejected": [*CHAT[:1], *other], "score": 3}, [CHAT_TEXT, other_text]),
    ]
    for row, texts in forms:
        for data in ([row], datasets.Dataset.from_list([row])):
            made = calibration_batches(data, tokenizer=chat_tokenizer)
            assert rows_of(made) == encoded(chat_tokenizer, *texts), row
            assert made.num_samples == 2


def test_rows_of_several_forms_in_one_list(chat_tokenizer):
    rows = ["one", {"messages": CHAT}, {"input_ids": [5, 6]}, {"text": "two words"}]
    data = calibration_batches(rows, tokenizer=chat_tokenizer)
    expected = [*encoded(chat_tokenizer, "one", CHAT_TEXT, "two words"), [5, 6]]
    assert sorted(rows_of(data)) == sorted(expected)
    assert rows_of(calibration_batches(tuple(rows), tokenizer=chat_tokenizer)) == rows_of(data)


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_input_ids_are_used_as_they_are(convert):
    rows = [{"input_ids": convert([3, 1, 4, 1, 5])}, {"input_ids": convert([9, 2]), "labels": convert([9, 2])}]
    assert rows_of(calibration_batches(rows)) == [[3, 1, 4, 1, 5], [9, 2]]
    assert rows_of(calibration_batches(rows, max_length=3)) == [[3, 1, 4], [9, 2]]


def test_padding_of_input_ids_goes_before_the_cut_and_inner_masking_stays():
    rows = [
        {"input_ids": [0, 0, 0, 7, 8, 9], "attention_mask": [0, 0, 0, 1, 1, 1]},
        {"input_ids": [5, 6, 7, 0, 0, 0, 0, 0], "attention_mask": [1, 0, 1, 0, 0, 0, 0, 0]},
        {"input_ids": [4, 4], "attention_mask": [0, 0]},
    ]
    data = calibration_batches(rows, max_length=3)
    assert data.batches[0]["input_ids"].tolist() == [[7, 8, 9], [5, 6, 7]]
    assert data.batches[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 1]]
    assert (data.num_samples, data.num_tokens, data.num_dropped_empty) == (2, 5, 1)
    assert calibration_batches(rows).batches[0]["input_ids"].shape == (2, 3)


def test_formatting_func(chat_tokenizer):
    rows = [{"question": "2+2?", "answer": "4", "text": "unused", "input_ids": [1]}]
    results = [
        ("2+2? 4", ["2+2? 4"]),
        (["first one", "second"], ["first one", "second"]),
        (CHAT, [CHAT_TEXT]),
    ]
    for result, texts in results:
        data = calibration_batches(rows, tokenizer=chat_tokenizer, formatting_func=lambda row, made=result: made)
        assert rows_of(data) == encoded(chat_tokenizer, *texts)
    seen = []
    calibration_batches(
        datasets.Dataset.from_list(rows),
        tokenizer=chat_tokenizer,
        formatting_func=lambda row: seen.append(row) or row["question"],
    )
    assert seen == rows  # one row at a time, with all its columns


def test_several_samples_a_row_stay_within_max_samples(tokenizer):
    rows = [{"n": i} for i in range(10)]
    data = calibration_batches(
        rows, tokenizer=tokenizer, formatting_func=lambda row: [f"{row['n']} a", f"{row['n']} b", ""], max_samples=7
    )
    assert data.num_samples + data.num_dropped_empty == 7
    data = calibration_batches(rows, tokenizer=tokenizer, formatting_func=lambda row: [] if row["n"] else "zero")
    assert data.num_samples == 1 and data.num_dropped_empty == 9


@pytest.mark.parametrize(
    ("row", "func"),
    [
        ({"question": "2+2?", "answer": "4"}, r"""lambda row: f"{row['question']}\n{row['answer']}" """),
        ({"id": "7", "topic_id": "x", "Question": "2+2?"}, """lambda row: f"{row['Question']}\""""),
        ({"a": "1", "b": "2", "c": "3", "d": "4"}, r"""lambda row: f"{row['a']}\n{row['b']}\n{row['c']}" """),
        ({"label": 1}, """lambda row: f"{row['label']}\""""),
        ({'the "x"': "1", "y": "2"}, """lambda row: f"{row['y']}\""""),
        ({"prompt": "half a form", "tools": "[]"}, r"""lambda row: f"{row['prompt']}\n{row['tools']}" """),
    ],
)
def test_the_suggested_formatting_function_works(row, func, tokenizer):
    for data in ([row], datasets.Dataset.from_list([row])):
        with pytest.raises(SieveError) as caught:
            calibration_batches(data, tokenizer=tokenizer)
        assert f"e.g. `calib_formatting_func={func.strip()}`." in str(caught.value)
        assert all(repr(column) in str(caught.value) for column in row)
        assert calibration_batches(data, tokenizer=tokenizer, formatting_func=eval(func.strip())).num_samples == 1


def test_the_columns_of_a_later_row_are_named(tokenizer):
    with pytest.raises(SieveError, match="has the columns 'body'"):
        calibration_batches([{"text": "a"}, {"body": "b"}], tokenizer=tokenizer)


def test_errors_of_the_formatting_function(tokenizer):
    rows = [{"question": "2+2?", "answer": "4"}]

    def made(func, data=rows):
        with pytest.raises(SieveError) as caught:
            calibration_batches(data, tokenizer=tokenizer, formatting_func=func)
        return str(caught.value)

    for wrong in (None, {"text": "a"}, ["a", 1]):
        text = made(lambda row, wrong=wrong: wrong)
        assert "calib_formatting_func must return a str, a list of str or a list of messages" in text
        assert f"got {wrong!r} for row 0" in text
    assert "failed on row 0 of the calibration data (columns 'question', 'answer') with KeyError: 'text'" in made(
        lambda row: row["text"]
    )
    assert "failed on row 0 of the calibration data with TypeError" in made(lambda row: row["text"], ["a"])
    assert "calib_formatting_func must be a function" in made("text")
    assert "has no chat template" in made(lambda row: CHAT)
    assert "batches ready for the model, which calib_formatting_func cannot change" in made(
        str, [{"input_ids": torch.ones(1, 2).long()}]
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([3], f"row 0 of the calibration data must be a str or a dict with {FORMS}, got 3"),
        (["ok", [1, 2]], "row 1 of the calibration data must be"),
        ([{"text": 3}], "`text` of row 0 of the calibration data must be a str, got 3"),
        (
            [{"messages": "hi"}],
            "`messages` of row 0 of the calibration data must be a list of messages (dicts with",
        ),
        ([{"messages": ["hi"]}], "`messages` of row 0 of the calibration data must be a list of messages"),
        (
            [{"prompt": [{"role": "user"}], "completion": ["x"]}],
            "`prompt` + `completion` of row 0 of the calibration data must be a list of messages",
        ),
        (
            [{"prompt": "a", "completion": []}],
            "two str or two lists of messages, got str and list",
        ),
        (
            [{"chosen": 3, "rejected": "b"}],
            "`chosen` of row 0 of the calibration data must be a str or a list of messages, got 3",
        ),
        ([{"messages": [], "tools": "{"}], "`tools` of row 0 of the calibration data is not JSON. Expecting"),
        (
            [{"input_ids": [[1]]}],
            "`input_ids` of row 0 of the calibration data must be a flat list of integers, got [[1]]",
        ),
        ([{"input_ids": "12"}], "`input_ids` of row 0 of the calibration data must be a flat list of integers"),
        ([{"input_ids": b"12"}], "`input_ids` of row 0 of the calibration data must be a flat list of integers"),
        ([{"input_ids": [1.5]}], "`input_ids` of row 0 of the calibration data must be a flat list of integers"),
        ([{"input_ids": [1, -100]}], "`input_ids` of row 0 of the calibration data must be at least 0, got -100"),
        (
            [{"input_ids": [1, 2], "attention_mask": [1]}],
            "`attention_mask` of row 0 of the calibration data has the length 1 and `input_ids` the length 2",
        ),
        ([{"question": "q", "n": 1}], f"has the columns 'question', 'n', which fit none of the forms {FORMS}. Pass a"),
        ([{"prompt": CHAT[:1], "answer": "4"}], "e.g. `calib_formatting_func=lambda row: row['prompt']`."),
    ],
)
def test_what_is_refused(data, text, tokenizer):
    assert_refused(data, text, tokenizer)
