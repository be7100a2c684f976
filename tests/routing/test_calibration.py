"""Calibration data in every accepted form -> token batches."""

import copy
import csv
import gzip
import hashlib
import json
import logging
import lzma
import random
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from peft_sieve.errors import SieveError
from peft_sieve.routing.data.batches import calibration_batches

TINY_OLMOE = Path(__file__).parents[2] / "examples" / "tiny-olmoe"
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


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def shared_tokenizer():
    return AutoTokenizer.from_pretrained(TINY_OLMOE)


@pytest.fixture
def tokenizer(shared_tokenizer):
    return copy.deepcopy(shared_tokenizer)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


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


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_right_padded_int64_and_longest_first(tokenizer):
    data = calibration_batches(TEXTS, tokenizer=tokenizer, batch_size=2)

    assert [len(batch["input_ids"]) for batch in data.batches] == [2, 2, 1]
    assert rows_of(data) == encoded(tokenizer, *TEXTS)
    for batch in data.batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert set(batch) == {"input_ids", "attention_mask"}
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape == mask.shape == (len(ids), int(mask.sum(1).max()))  # no wider than its longest sample
        assert (mask.diff(dim=1) <= 0).all()  # ones, then zeros
        assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    assert data.num_samples == len(TEXTS)
    assert data.num_tokens == sum(map(len, encoded(tokenizer, *TEXTS)))
    assert data.num_dropped_empty == 0


def test_samples_of_equal_length_keep_their_order():
    data = calibration_batches([{"input_ids": [i, i]} for i in range(7)], batch_size=3)
    assert [ids[0] for ids in rows_of(data)] == list(range(7))


def test_samples_of_one_token_and_empty_ones(tokenizer):
    data = calibration_batches(["a", "", "b", {"text": None}, {"messages": []}], tokenizer=tokenizer)
    assert rows_of(data) == [[66], [67]]
    assert data.num_samples == 2 and data.num_tokens == 2 and data.num_dropped_empty == 3


def test_long_sample_keeps_its_beginning_and_no_warning(tokenizer, caplog):
    text = " ".join(map(str, range(4_000)))  # longer than the model_max_length of the tokenizer
    expected = tokenizer(text)["input_ids"]
    assert len(expected) > 10_000
    tokenizer.deprecation_warnings.clear()
    logger = logging.getLogger("transformers")  # does not propagate
    logger.addHandler(caplog.handler)
    caplog.clear()
    try:
        for max_length in (1, 100, 10_000):
            data = calibration_batches([text], tokenizer=tokenizer, max_length=max_length)
            assert rows_of(data) == [expected[:max_length]]
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records and tokenizer.deprecation_warnings == {}


def test_a_book_is_not_tokenised_for_its_first_page():
    given = []

    class EveryNthCharacter(WithSpecialTokens):
        step = 2

        def __call__(self, texts, **options):
            given.extend(map(len, texts))
            return super().__call__([text[:: self.step] for text in texts], **options)

    tokenizer = EveryNthCharacter()
    book = "page" * 250_000
    data = calibration_batches([book], tokenizer=tokenizer, max_length=10)
    assert rows_of(data) == [[1, *map(ord, book[:18:2])]]
    assert sum(given) < 10_000
    tokenizer.step = 1_000  # so few tokens that the first page does not fill max_length
    data = calibration_batches([book], tokenizer=tokenizer, max_length=500)
    assert rows_of(data) == [[1, *map(ord, book[: 499 * 1_000 : 1_000])]]


def test_the_first_tokens_of_a_long_text_do_not_depend_on_where_it_is_cut():
    class LengthsOfWords(WithSpecialTokens):
        def __call__(self, texts, **options):
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    data = calibration_batches(["w" * 150 + " ww" * 10_000], tokenizer=LengthsOfWords(), max_length=1)
    assert rows_of(data) == [[150]]


def test_unicode_reaches_the_tokenizer_unchanged(tokenizer):
    text = "东京 ﷺ 🏳️‍🌈 e\u0301 \u2028 \x00 tab\t"
    data = calibration_batches([text], tokenizer=tokenizer)
    assert tokenizer.decode(rows_of(data)[0]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert "🏳️‍🌈" in tokenizer.decode(rows_of(data)[0])


class WithSpecialTokens:
    """A tokenizer that is no Hugging Face class: adds 1 before and 2 after the codes of the characters."""

    pad_token_id = None
    eos_token_id = None

    def __init__(self, pad=None, eos=None):
        self.pad_token_id, self.eos_token_id = pad, eos

    def __len__(self):
        return 200

    def __call__(self, texts, **options):
        assert options.get("add_special_tokens", True) and not options["truncation"] and not options["padding"]
        return {"input_ids": [[1, *map(ord, text), 2] for text in texts]}


def test_special_tokens_are_those_of_the_tokenizer_and_an_empty_text_is_dropped():
    data = calibration_batches(["A", ""], tokenizer=WithSpecialTokens())
    assert rows_of(data) == [[1, 65, 2]]
    assert data.num_dropped_empty == 1


@pytest.mark.parametrize(
    ("pad", "eos", "used"), [(7, 8, 7), (None, 8, 8), (None, None, 0), (-1, 8, 8), (200, None, 0), (199, None, 199)]
)
def test_pad_id_is_of_the_vocabulary(pad, eos, used):
    batch = calibration_batches(["A", "AB"], tokenizer=WithSpecialTokens(pad, eos)).batches[0]
    assert batch["input_ids"][1, -1] == used
    assert batch["attention_mask"][1, -1] == 0


def test_many_texts_are_tokenised_in_order(tokenizer):
    texts = [f"sample number {i} of many" for i in range(150)]
    assert rows_of(calibration_batches(texts, tokenizer=tokenizer)) == encoded(tokenizer, *texts)


# --- rows ------------------------------------------------------------------------------------------------------------


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


def test_a_chat_equals_what_the_tokenizer_renders_and_is_cut(chat_tokenizer):
    data = calibration_batches([{"messages": CHAT}], tokenizer=chat_tokenizer, max_length=4)
    assert rows_of(data) == [chat_tokenizer.apply_chat_template(CHAT, return_dict=False)[:4]]


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


# --- sources ---------------------------------------------------------------------------------------------------------


def write_files(folder):
    records = [{"text": text} for text in TEXTS]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "b.json").write_text(lines, encoding="utf-8-sig")  # with a byte order mark
    (folder / "c.json").write_text("\n " + json.dumps(records, indent=1), encoding="utf-8")
    (folder / "strings.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    with open(folder / "d.CSV", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows({"id": i, "text": text} for i, text in enumerate(TEXTS))
    (folder / "e.txt").write_text("\n\n".join(TEXTS) + "\n  \n", encoding="utf-8")
    datasets.Dataset.from_list(records).to_parquet(folder / "f.parquet")
    (folder / "g.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (folder / "h.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "i.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS).encode()))
    return sorted(folder.iterdir())


def test_files_of_every_suffix(tmp_path, tokenizer):
    expected = calibration_batches(TEXTS, tokenizer=tokenizer)
    paths = write_files(tmp_path)
    assert len(paths) == 10
    for path in paths:
        for given in (path, str(path)):
            data = calibration_batches(given, tokenizer=tokenizer)
            assert_same(data, expected)
            assert data.name == str(path)


def test_files_give_the_same_subset_as_a_list(tmp_path, tokenizer):
    expected = calibration_batches(TEXTS, tokenizer=tokenizer, max_samples=3, seed=5)
    for path in write_files(tmp_path):
        assert_same(calibration_batches(path, tokenizer=tokenizer, max_samples=3, seed=5), expected)


def test_long_csv_field_and_the_field_limit(tmp_path, tokenizer):
    text = "word " * 40_000
    (tmp_path / "long.csv").write_text(f'text\n"{text}"\n')
    limit = 131_072
    csv.field_size_limit(limit)
    data = calibration_batches(tmp_path / "long.csv", tokenizer=tokenizer)
    assert rows_of(data) == [tokenizer(text)["input_ids"][:2048]]
    assert csv.field_size_limit() == limit


def test_a_txt_row_is_formatted_as_a_dict(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one\n")
    data = calibration_batches(
        tmp_path / "a.txt", tokenizer=tokenizer, formatting_func=lambda row: row["text"] + " two"
    )
    assert rows_of(data) == encoded(tokenizer, "one two")


def test_home_is_expanded(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.txt").write_text("one\n")
    assert calibration_batches("~/a.txt", tokenizer=tokenizer).name == "~/a.txt"


def test_folders(tmp_path, tokenizer):
    expected = calibration_batches(TEXTS, tokenizer=tokenizer)
    dataset = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "dict")
    (tmp_path / "plain").mkdir()
    dataset.to_json(tmp_path / "plain" / "test.jsonl")
    for folder in ("one", "dict", "plain"):
        data = calibration_batches(tmp_path / folder, tokenizer=tokenizer, split="test")
        assert_same(data, expected)
        assert data.name == str(tmp_path / folder)
    assert calibration_batches(tmp_path / "plain", tokenizer=tokenizer, split="test[:2]").num_samples == 2
    for folder in ("dict", "plain"):
        with pytest.raises(SieveError, match="has no split 'dev'. Pass one of 'test' as calib_split"):
            calibration_batches(tmp_path / folder, tokenizer=tokenizer, split="dev")


def test_a_hub_id_goes_through_load_dataset(tokenizer, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{"text": text} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = calibration_batches("org/name", tokenizer=tokenizer, split="validation")
    assert asked == [("org/name", "validation")]
    assert data.name == "org/name"
    assert_same(data, calibration_batches(TEXTS, tokenizer=tokenizer))


def test_datasets_objects(tokenizer, tmp_path):
    dataset = datasets.Dataset.from_list([{"text": text, "id": i} for i, text in enumerate(TEXTS)])
    expected = calibration_batches(TEXTS, tokenizer=tokenizer)
    stream = dataset.to_iterable_dataset()
    same = [dataset, dataset["text"], dataset.with_format("torch"), dataset.with_format("numpy")]
    same.append(dataset.with_transform(lambda batch: {"text": batch["text"]}))
    same.append(datasets.DatasetDict(dev=dataset))
    for data in same:
        assert_same(calibration_batches(data, tokenizer=tokenizer, split="dev"), expected)
    for data in (stream, stream.with_format("torch"), datasets.IterableDatasetDict(dev=stream)):
        made = calibration_batches(data, tokenizer=tokenizer, split="dev")
        assert sorted(rows_of(made)) == sorted(rows_of(expected))
    assert calibration_batches(dataset, tokenizer=tokenizer).name == "Dataset"
    dataset.to_parquet(tmp_path / "a.parquet")
    from_file = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"))
    assert calibration_batches(from_file, tokenizer=tokenizer).name == "Dataset"  # not "parquet"
    dataset.info.dataset_name = "gsm8k"
    assert calibration_batches(dataset, tokenizer=tokenizer).name == "gsm8k"


def test_chat_of_a_dataset(chat_tokenizer):
    rows = [{"messages": CHAT}, {"messages": [{"role": "user", "content": "x", "name": "Bo"}]}]
    dataset = datasets.Dataset.from_list(rows)
    for made in (dataset, dataset.with_format("numpy"), dataset.to_iterable_dataset().with_format("numpy")):
        data = calibration_batches(made, tokenizer=chat_tokenizer)
        assert rows_of(data) == encoded(chat_tokenizer, CHAT_TEXT, "<user>xBo")  # no "None" for the missing name


def test_a_format_decides_on_the_columns():
    dataset = datasets.Dataset.from_list([{"input_ids": [1, 2], "attention_mask": [1, 0]}])
    assert rows_of(calibration_batches(dataset.with_format("torch"))) == [[1]]
    assert rows_of(calibration_batches(dataset.with_format("torch", columns=["input_ids"]))) == [[1, 2]]


def test_a_transform_of_the_dataset_makes_the_rows():
    dataset = datasets.Dataset.from_list([{"n": 3}, {"n": 4}])
    transformed = dataset.with_transform(lambda batch: {"input_ids": [[n] * n for n in batch["n"]]})
    assert rows_of(calibration_batches(transformed)) == [[4] * 4, [3] * 3]


def test_a_column_no_form_reads_is_not_decoded(tokenizer):
    broken = {"bytes": b"no image", "path": None}
    dataset = datasets.Dataset.from_list([{"text": "one", "image": broken}]).cast_column("image", datasets.Image())
    assert rows_of(calibration_batches(dataset, tokenizer=tokenizer)) == encoded(tokenizer, "one")


def test_iterators_and_torch_datasets(tokenizer):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(TEXTS)

        def __getitem__(self, index):
            return {"text": TEXTS[index]}

    expected = calibration_batches(TEXTS, tokenizer=tokenizer, max_samples=3)
    assert_same(calibration_batches(Rows(), tokenizer=tokenizer, max_samples=3), expected)
    assert_same(calibration_batches(iter(TEXTS), tokenizer=tokenizer, max_samples=3), expected)


def test_a_processor(chat_tokenizer):
    rows = ["one two", {"messages": CHAT}]
    expected = encoded(chat_tokenizer, "one two", CHAT_TEXT)
    assert rows_of(calibration_batches(rows, tokenizer=SimpleNamespace(tokenizer=chat_tokenizer))) == expected

    plain = copy.deepcopy(chat_tokenizer)
    plain.chat_template = None

    class Processor:  # keeps the template itself and answers with a batch, as multimodal processors do
        tokenizer = plain
        chat_template = CHAT_TEMPLATE

        def apply_chat_template(self, messages, **options):
            return chat_tokenizer.apply_chat_template([messages], **options)

    assert rows_of(calibration_batches(rows, tokenizer=Processor())) == expected


def test_chat_templates_see_no_none(chat_tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(chat_tokenizer, "apply_chat_template", lambda messages, **options: seen.extend(messages) or [1])
    calibration_batches([{"messages": [{"role": "user", "content": "hi", "name": None}]}], tokenizer=chat_tokenizer)
    assert seen == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("wrap", [list, np.array, torch.tensor])
def test_chat_templates_that_return_bare_ids(chat_tokenizer, wrap, monkeypatch):
    monkeypatch.setattr(chat_tokenizer, "apply_chat_template", lambda messages, **options: wrap([1, 2, 3]))
    assert rows_of(calibration_batches([{"messages": CHAT}], tokenizer=chat_tokenizer)) == [[1, 2, 3]]


# --- which samples ---------------------------------------------------------------------------------------------------


def test_the_subset_depends_on_the_seed_alone():
    rows = numbers(200)
    first = calibration_batches(rows, max_samples=20)
    assert first.num_samples == 20
    assert len(set(chosen_numbers(first))) == 20
    assert_same(calibration_batches(rows, max_samples=20), first)
    other_batches = calibration_batches(rows, max_samples=20, batch_size=3)
    assert_same(other_batches, first)
    assert len(other_batches.batches) == 7
    assert_same(calibration_batches(datasets.Dataset.from_list(rows), max_samples=20), first)
    other = calibration_batches(rows, max_samples=20, seed=1)
    assert chosen_numbers(other) != chosen_numbers(first)
    assert max(chosen_numbers(first)) > 100  # not the first rows
    assert_same(calibration_batches(rows, max_samples=20, seed=-3), calibration_batches(rows, max_samples=20, seed=-3))


def test_all_rows_are_used_where_they_suffice():
    rows = numbers(20)
    data = calibration_batches(rows, max_samples=20)
    assert chosen_numbers(data) == list(range(20))
    assert_same(data, calibration_batches(rows, seed=9))


def test_no_more_rows_are_read_than_needed():
    class Counted(Sequence[dict[str, list[int]]]):
        read = 0

        def __len__(self):
            return 10_000

        def __getitem__(self, index):
            self.read += 1
            return {"input_ids": [index]}

    rows = Counted()
    calibration_batches(rows, max_samples=10)
    assert rows.read <= 11  # one to see what they are

    read = []

    def transform(batch):
        read.extend(batch["n"])
        return {"input_ids": [[n] for n in batch["n"]]}

    dataset = datasets.Dataset.from_dict({"n": list(range(1000))}).with_transform(transform)
    assert chosen_numbers(calibration_batches(dataset, max_samples=10)) == sorted(read)


def test_a_stream_is_read_as_far_as_its_buffer():
    read = []

    def stream():
        for i in range(10**9):
            read.append(i)
            yield {"input_ids": [i]}

    hub = datasets.IterableDataset.from_generator(stream)
    first, again = (calibration_batches(hub, max_samples=10) for _ in range(2))
    assert_same(first, again)
    assert max(chosen_numbers(first)) > 20  # shuffled, not the first ten
    assert max(read) < 1_100
    assert chosen_numbers(calibration_batches(hub, max_samples=10, seed=1)) != chosen_numbers(first)
    read.clear()
    first, again = (calibration_batches(stream(), max_samples=10) for _ in range(2))
    assert_same(first, again)
    assert max(chosen_numbers(first)) > 20
    assert max(read) < 1_100


def test_fingerprint_is_over_the_token_ids_in_sample_order():
    rows = [{"input_ids": [1]}, {"input_ids": [2, 3]}]
    fingerprint = calibration_batches(rows).fingerprint
    assert fingerprint == hashlib.sha256(struct.pack("<5q", 1, 1, 2, 2, 3)).hexdigest()
    others = [
        rows[::-1],
        [{"input_ids": [1, 2]}, {"input_ids": [3]}],
        [{"input_ids": [1]}, {"input_ids": [2, 4]}],
        rows[1:],
    ]
    assert len({fingerprint, *(calibration_batches(other).fingerprint for other in others)}) == 5
    padded = [{"input_ids": [1, 0], "attention_mask": [1, 0]}, {"input_ids": [2, 3]}, {"input_ids": []}]
    assert calibration_batches(padded).fingerprint == fingerprint
    batch = {"input_ids": torch.tensor([[1, 0], [2, 3]]), "attention_mask": torch.tensor([[1, 0], [1, 1]])}
    assert calibration_batches([batch]).fingerprint == fingerprint
    inner = [{"input_ids": [1]}, {"input_ids": [2, 9, 3], "attention_mask": [1, 0, 1]}]
    assert calibration_batches(inner).fingerprint == fingerprint


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_make_up_the_whole(world_size):
    rows = [*numbers(50), {"input_ids": []}]
    whole = calibration_batches(rows, max_samples=40, batch_size=4)
    shares = [
        calibration_batches(rows, max_samples=40, batch_size=4, shard=(rank, world_size)) for rank in range(world_size)
    ]
    assert sorted(ids for share in shares for ids in rows_of(share)) == sorted(rows_of(whole))
    assert sum(share.num_samples for share in shares) == whole.num_samples
    assert sum(share.num_tokens for share in shares) == whole.num_tokens
    assert {share.fingerprint for share in shares} == {whole.fingerprint}
    assert {share.num_dropped_empty for share in shares} == {whole.num_dropped_empty}
    counts = [share.num_samples for share in shares]
    tokens = [share.num_tokens for share in shares]
    assert max(counts) - min(counts) <= 1
    assert max(tokens) - min(tokens) <= 5  # no more than one sample: dealt out by length


def test_a_share_may_be_empty_but_not_the_whole():
    share = calibration_batches(numbers(2), shard=(2, 3))
    assert share.batches == [] and share.num_samples == 0 and share.num_tokens == 0
    assert share.fingerprint == calibration_batches(numbers(2)).fingerprint
    with pytest.raises(SieveError, match="All 1 samples"):
        calibration_batches([{"input_ids": []}], shard=(2, 3))


# --- batches that come ready for the model ---------------------------------------------------------------------------


def collate(rows):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.clone()}


def test_a_dataloader_passes_through():
    loader = DataLoader(numbers(11), batch_size=4, collate_fn=collate)
    data = calibration_batches(loader, max_length=2, batch_size=1)
    expected = list(loader)
    assert len(data.batches) == 3
    for batch, original in zip(data.batches, expected, strict=True):
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert torch.equal(batch["input_ids"], original["input_ids"])
        assert torch.equal(batch["attention_mask"], original["attention_mask"])
        assert batch["attention_mask"].dtype == torch.int64
    assert data.num_samples == 11
    assert data.num_tokens == sum(int(batch["attention_mask"].sum()) for batch in expected)
    assert data.name == "DataLoader"


def test_a_shuffling_dataloader_is_deterministic_and_leaves_the_rng():
    loader = DataLoader(numbers(50), batch_size=5, collate_fn=collate, shuffle=True)
    state = torch.get_rng_state()
    first = calibration_batches(loader, max_samples=20)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert_same(calibration_batches(loader, max_samples=20), first)
    assert calibration_batches(loader, max_samples=20, seed=1).fingerprint != first.fingerprint
    torch.set_rng_state(state)


def test_ready_batches_stop_at_max_samples_and_trim_the_last():
    drawn = []

    def batches():
        for i in range(10**9):
            drawn.append(i)
            yield {
                "input_ids": torch.full((4, 3), i, dtype=torch.int32),
                "attention_mask": torch.ones(4, 3, dtype=torch.bool),
                "pixel_values": torch.arange(8).view(4, 2),
                "names": list("abcd"),
                "use_cache": False,
                "scale": torch.tensor(1.0),
                "token_type_ids": np.zeros((4, 3)),
                "labels": torch.zeros(4, 3),
            }

    data = calibration_batches(batches(), max_samples=6)
    assert drawn == [0, 1]
    assert data.num_samples == 6 and data.num_tokens == 18
    whole, last = data.batches
    assert whole["input_ids"].tolist() == [[0] * 3] * 4
    assert last["input_ids"].tolist() == [[1] * 3] * 2
    assert last["input_ids"].dtype == last["attention_mask"].dtype == torch.int64
    assert last["pixel_values"].tolist() == [[0, 1], [2, 3]]
    assert last["names"] == ["a", "b"] and last["use_cache"] is False and last["scale"] == 1.0
    assert isinstance(last["token_type_ids"], torch.Tensor) and len(last["token_type_ids"]) == 2
    assert len(last["labels"]) == 2


def test_a_ready_batch_whose_inputs_are_not_by_rows_is_not_torn():
    batch = {"input_ids": torch.ones(4, 3, dtype=torch.long), "pixel_values": torch.rand(99, 5)}
    data = calibration_batches([batch], max_samples=2)
    assert data.num_samples == 4 and len(data.batches[0]["input_ids"]) == 4


def test_position_ids_are_trimmed_by_their_layout_and_take_the_place_of_a_mask():
    ids = torch.arange(12).view(4, 3)
    layouts = {(4, 3): (2, 3), (1, 3): (1, 3), (3, 4, 3): (3, 2, 3), (4, 4, 3): (4, 2, 3)}
    for shape, trimmed in layouts.items():
        batch = {"input_ids": ids, "position_ids": torch.zeros(shape, dtype=torch.long)}
        made = calibration_batches([batch], max_samples=2).batches[0]
        assert made["position_ids"].shape == trimmed
        assert made["input_ids"].shape == (2, 3)
        assert "attention_mask" not in made
    nothing = {"input_ids": ids, "attention_mask": None}
    assert calibration_batches([nothing]).batches[0]["attention_mask"].tolist() == [[1] * 3] * 4
    assert "attention_mask" not in calibration_batches([{**nothing, "position_ids": ids}]).batches[0]


def test_forms_of_ready_batches(tokenizer):
    encoding = tokenizer(["one", "two three"], padding=True, return_tensors="pt")
    expected = calibration_batches([dict(encoding)])
    assert expected.num_samples == 2
    arrays = tokenizer(["one", "two three"], padding=True, return_tensors="np")
    for data in (encoding, [encoding], (encoding,), iter([encoding]), [dict(arrays)]):
        assert_same(calibration_batches(data), expected)
    with_mask_4d = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 1, 3, 3)}
    no_rows = {"input_ids": torch.ones(0, 3, dtype=torch.long)}
    assert len(calibration_batches([no_rows, *expected.batches, no_rows]).batches) == 1
    made = calibration_batches([with_mask_4d])
    assert made.batches[0]["attention_mask"].shape == (2, 1, 3, 3) and made.num_tokens == 6


def test_shares_of_ready_batches_make_up_the_whole():
    loader = DataLoader(numbers(30), batch_size=4, collate_fn=collate)
    whole = calibration_batches(loader, max_samples=26)
    shares = [calibration_batches(loader, max_samples=26, shard=(rank, 3)) for rank in range(3)]
    assert sorted(ids for share in shares for ids in rows_of(share)) == sorted(rows_of(whole))
    assert sum(share.num_samples for share in shares) == whole.num_samples == 26
    assert sum(share.num_tokens for share in shares) == whole.num_tokens
    assert {share.fingerprint for share in shares} == {whole.fingerprint}


# --- nothing is left behind ------------------------------------------------------------------------------------------


def global_rng_states():
    return str((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))


def test_global_rng_states_are_untouched_and_not_drawn_from(chat_tokenizer, tmp_path):
    def noisy(row):
        return f"{row['text']} {random.random()} {np.random.rand()} {torch.rand(1).item()}"

    def failing(row):
        random.random(), np.random.rand(), torch.rand(1)
        raise RuntimeError

    dataset = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    dataset.to_parquet(tmp_path / "a.parquet")
    for source in (dataset, dataset.to_iterable_dataset(), [{"text": "x"}], tmp_path / "a.parquet"):
        made = []
        for state in (1, 2):
            random.seed(state), np.random.seed(state), torch.manual_seed(state)
            before = global_rng_states()
            made.append(calibration_batches(source, tokenizer=chat_tokenizer, formatting_func=noisy, max_samples=3))
            assert global_rng_states() == before
            with pytest.raises(SieveError):
                calibration_batches(source, tokenizer=chat_tokenizer, formatting_func=failing)
            assert global_rng_states() == before
        assert_same(*made)


def test_neither_tokenizer_nor_data_are_changed(chat_tokenizer):
    tokenizer = chat_tokenizer
    tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token = "left", "left", None
    tokenizer.backend_tokenizer.enable_truncation(max_length=3, direction="left")
    tokenizer.backend_tokenizer.enable_padding(length=9, pad_id=1)
    backend = tokenizer.backend_tokenizer.to_str()
    attributes = (dict(tokenizer.deprecation_warnings), dict(tokenizer.init_kwargs), tokenizer.special_tokens_map)
    rows = [
        {"text": "one two three four five six seven", "extra": [1]},
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "hi", "weight": None}]},
        {"input_ids": torch.tensor([1, 2, 3]), "attention_mask": torch.tensor([0, 1, 1])},
    ]
    before = copy.deepcopy(rows)
    data = calibration_batches(rows, tokenizer=tokenizer)
    assert data.num_samples == 4 and max(map(len, rows_of(data))) > 9  # the limits of the backend did not apply
    assert repr(rows) == repr(before)
    assert tokenizer.backend_tokenizer.to_str() == backend
    assert (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token) == ("left", "left", None)
    assert (tokenizer.deprecation_warnings, tokenizer.init_kwargs, tokenizer.special_tokens_map) == attributes

    dataset = datasets.Dataset.from_list([{"text": "one"}]).with_format("torch")
    fingerprint, form = dataset._fingerprint, dict(dataset.format)
    calibration_batches(dataset, tokenizer=tokenizer)
    assert (dataset._fingerprint, dataset.format) == (fingerprint, form)

    batch = {"input_ids": torch.ones(3, 2, dtype=torch.int32), "labels": torch.ones(3, 2)}
    calibration_batches([batch], max_samples=2)
    assert list(batch) == ["input_ids", "labels"] and batch["input_ids"].dtype == torch.int32


def test_the_tokenizer_is_restored_after_an_error(chat_tokenizer):
    chat_tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    backend = chat_tokenizer.backend_tokenizer.to_str()
    with pytest.raises(SieveError, match="no such role"):
        calibration_batches(["text", {"messages": [{"role": "forbidden", "content": ""}]}], tokenizer=chat_tokenizer)
    assert chat_tokenizer.backend_tokenizer.to_str() == backend


def test_datasets_is_not_needed_for_files_and_lists(tmp_path, tokenizer, monkeypatch):
    paths = write_files(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes `import datasets` fail
    expected = calibration_batches(TEXTS, tokenizer=tokenizer)
    for path in paths:
        if path.suffix != ".parquet":
            assert_same(calibration_batches(path, tokenizer=tokenizer), expected)
    for name in (str(tmp_path / "f.parquet"), "org/name", str(tmp_path)):
        with pytest.raises(
            SieveError, match=re.escape(f"{name!r} needs the datasets library. Run pip install peft-sieve[data].")
        ) as caught:
            calibration_batches(name, tokenizer=tokenizer)
        assert isinstance(caught.value.__cause__, ImportError)


# --- errors ----------------------------------------------------------------------------------------------------------

FORMS = "`text`, `messages`, `prompt` + `completion`, `chosen` + `rejected`, `input_ids` or `conversations`"
ACCEPTED = "Pass a Hub id or a local file (str), a datasets.Dataset, a list of str or dicts, or an iterable of "


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (7, "The calibration data are of type int. " + ACCEPTED),
        (None, "of type NoneType. " + ACCEPTED),
        (b"bytes", "of type bytes. " + ACCEPTED),
        ({"train": ["a"]}, "of type dict. " + ACCEPTED),
        ("", "has an empty str as its name. " + ACCEPTED),
        (iter([]), "a list_iterator, yield nothing. Pass data that have not been consumed"),
        ((row for row in ()), "a generator, yield nothing"),
        (DataLoader([], batch_size=2), "a DataLoader, yield nothing"),
        (
            {"a"},
            "a set, yield items of type str, not model-ready batches (dicts with 2-D `input_ids`). Pass rows",
        ),
        (DataLoader(["a", "b"], batch_size=2), "a DataLoader, yield items of type list, not model-ready"),
        ([], "The calibration data set 'list' is empty. Pass at least one row"),
        (datasets.Dataset.from_list([]), "The calibration data set 'Dataset' is empty"),
        (
            ["", ""],
            "All 2 samples of the calibration data 'list' are empty",
        ),
        ([{"input_ids": [1], "attention_mask": [0]}], "All 1 samples of the calibration data 'list' are empty"),
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
        (
            [{"input_ids": torch.ones(1, 2).long()}, "text"],
            "item 1 of the calibration data must be a dict with 2-D `input_ids` like those before it, got 'text'",
        ),
        (
            [{"input_ids": torch.ones(1, 2)}],
            "`input_ids` of item 0 of the calibration data must be integers, got torch.float32",
        ),
        (
            [{"input_ids": -torch.ones(1, 2).long()}],
            "`input_ids` of item 0 of the calibration data must be at least 0, got -1",
        ),
        (
            [{"input_ids": torch.ones(2, 2).long(), "attention_mask": torch.ones(1, 2)}],
            "`attention_mask` of item 0 of the calibration data has the shape (1, 2) and `input_ids` the shape (2, 2)",
        ),
        (
            [{"input_ids": torch.ones(2, 2).long(), "attention_mask": torch.zeros(2, 2)}],
            "All 2 samples of the calibration data 'list' are empty",
        ),
        ([{"input_ids": torch.ones(0, 2).long()}], "All 0 samples of the calibration data 'list' are empty"),
    ],
)
def test_errors_of_the_data(data, text, tokenizer):
    with pytest.raises(SieveError, match=re.escape(text)) as caught:
        calibration_batches(data, tokenizer=tokenizer)
    assert str(caught.value).endswith(".")


def test_a_data_frame_is_refused_not_read_by_its_column_names(tokenizer):
    frame = datasets.Dataset.from_list([{"text": "one"}]).to_pandas()
    with pytest.raises(SieveError, match="a DataFrame, yield items of type str"):
        calibration_batches(frame, tokenizer=tokenizer)


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


def test_errors_of_the_tokenizer(tokenizer, chat_tokenizer, shared_tokenizer):
    assert shared_tokenizer.chat_template is None
    no_tokenizer = "The calibration data are text, but there is no tokenizer. Pass tokenizer= to profile_routing, or "
    for rows in (["text"], [{"messages": CHAT}]):
        with pytest.raises(SieveError, match=re.escape(no_tokenizer + "calib_tokenizer= to SieveLoraConfig.")):
            calibration_batches(rows)
    with pytest.raises(SieveError, match="TokenizersBackend has no chat template"):
        calibration_batches([{"messages": CHAT}], tokenizer=shared_tokenizer)
    with pytest.raises(SieveError, match="has no chat template"):
        calibration_batches([{"messages": CHAT}], tokenizer=SimpleNamespace(tokenizer=shared_tokenizer))
    with pytest.raises(SieveError, match="calibration tokenizer must be .*got 'org/name'"):
        calibration_batches([{"input_ids": [1]}], tokenizer="org/name")
    with pytest.raises(SieveError, match="calibration tokenizer must be .*got namespace"):
        calibration_batches(["a"], tokenizer=SimpleNamespace(tokenizer=3))
    rows = [{"messages": CHAT}, {"messages": [{"role": "forbidden", "content": ""}]}]
    with pytest.raises(SieveError, match="The chat template failed on row 1 of the calibration data. Templ") as caught:
        calibration_batches(rows, tokenizer=chat_tokenizer)
    assert caught.value.__cause__ is not None
    with pytest.raises(SieveError, match="TokenizersBackend failed on the calibration text"):
        calibration_batches(["\ud83d is half a character"], tokenizer=tokenizer)


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", None, True])
@pytest.mark.parametrize("setting", ["max_samples", "max_length", "batch_size"])
def test_errors_of_the_settings(setting, value):
    with pytest.raises(
        SieveError, match=rf"^{setting} \(calib_\w+\) must be a positive whole number, got {value!r}\.$"
    ):
        calibration_batches(numbers(3), **{setting: value})


def test_errors_of_seed_and_shard():
    with pytest.raises(SieveError, match=re.escape("seed (calib_seed) must be a whole number, got 'x'.")):
        calibration_batches(numbers(3), seed="x")
    for shard in [(1, 1), (-1, 2), (0,), 0, ("0", "1"), (0, 0), (0, 1, 2)]:
        with pytest.raises(SieveError, match=re.escape(f"0 <= rank < world_size, got {shard!r}.")):
            calibration_batches(numbers(3), shard=shard)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.JSON.gz", "./missing", "/missing", "~/missing", "a/b/c"])
def test_a_missing_file(name, tokenizer):
    with pytest.raises(SieveError, match=re.escape(f"The calibration file {name!r} does not exist.")):
        calibration_batches(name, tokenizer=tokenizer)


def test_a_name_that_does_not_load(tokenizer, monkeypatch):
    def load_dataset(name, split):
        raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = (
        "'org/name', which is not a local file, could not be read: ValueError: Config name is missing. Please pick one "
        "among: ['main', 'socratic']. Load it"
    )
    with pytest.raises(SieveError, match=re.escape(text)) as caught:
        calibration_batches("org/name", tokenizer=tokenizer)
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_unreadable_folder(tmp_path, tokenizer):
    with pytest.raises(SieveError, match="is a local folder, could not be read"):
        calibration_batches(tmp_path, tokenizer=tokenizer)


def test_errors_of_splits(tokenizer):
    dataset = datasets.Dataset.from_list([{"text": "a"}])
    for data in (
        datasets.DatasetDict(test=dataset, validation=dataset),
        datasets.IterableDatasetDict(test=dataset.to_iterable_dataset(), validation=dataset.to_iterable_dataset()),
    ):
        text = (
            f"The calibration data set '{type(data).__name__}' has no split 'train'. Pass one of 'test', "
            "'validation' as calib_split."
        )
        with pytest.raises(SieveError, match=re.escape(text)):
            calibration_batches(data, tokenizer=tokenizer)


def test_errors_of_files(tmp_path, tokenizer):
    def made(file_name, content):
        path = tmp_path / file_name
        path.write_bytes(content)
        with pytest.raises(SieveError) as caught:
            calibration_batches(path, tokenizer=tokenizer)
        return str(caught.value).replace(str(path), file_name)

    assert "'a.docx' has the suffix '.docx'. Use .jsonl, .json, .csv, .txt, .parquet" in made("a.docx", b"")
    for name, content, problem in [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "ValueError: Line 3 is not JSON (Expecting value"),
        ("b.json", b'{\n "data": []\n}', "ValueError: Line 1 is not JSON"),
        ("c.json", b"[{]", "JSONDecodeError: "),
        ("d.txt", b"\xff\xfe", "UnicodeDecodeError"),
        ("e.jsonl.gz", b"no gzip", "BadGzip"),
        ("f.jsonl.xz", b"no xz", "LZMAError"),
    ]:
        assert f"The calibration file '{name}' could not be read. {problem}" in made(name, content)
    assert "'g.parquet', which is a local file, could not be read: " in made("g.parquet", b"no parquet")
    for name in ("h.txt", "i.jsonl", "j.csv", "k.json"):
        content = b"[]" if name == "k.json" else b"text\n" if name == "j.csv" else b"\n\n"
        assert made(name, content) == f"The calibration data set '{name}' is empty. Pass at least one row."
    assert "has the columns 'q', 'a'" in made("l.csv", b"q,a\n1,2\n")
