"""Data sets, folders, the Hub, sequences and streams -> the chosen rows."""

import re
from collections.abc import Sequence

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from peft_sieve.errors import SieveError
from peft_sieve.routing.data.batches import calibration_batches
from tests.routing.data.samples import (
    CHAT,
    CHAT_TEXT,
    TEXTS,
    assert_refused,
    assert_same,
    chosen_numbers,
    encoded,
    numbers,
    rows_of,
)

ACCEPTED = "Pass a Hub id or a local file (str), a datasets.Dataset, a list of str or dicts, or an iterable of "


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
    dataset = datasets.Dataset.from_list([{"text": "one", "cover": broken}]).cast_column("cover", datasets.Image())
    assert rows_of(calibration_batches(dataset, tokenizer=tokenizer)) == encoded(tokenizer, "one")
    needed = dataset.rename_column("cover", "image")
    for data in (needed, needed.to_iterable_dataset()):
        assert_refused(data, "could not be read: UnidentifiedImageError: cannot identify image", tokenizer)


def test_iterators_and_torch_datasets(tokenizer):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(TEXTS)

        def __getitem__(self, index):
            return {"text": TEXTS[index]}

    expected = calibration_batches(TEXTS, tokenizer=tokenizer, max_samples=3)
    assert_same(calibration_batches(Rows(), tokenizer=tokenizer, max_samples=3), expected)
    assert_same(calibration_batches(iter(TEXTS), tokenizer=tokenizer, max_samples=3), expected)


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


def test_a_data_frame_is_refused_not_read_by_its_column_names(tokenizer):
    frame = datasets.Dataset.from_list([{"text": "one"}]).to_pandas()
    with pytest.raises(SieveError, match="a DataFrame, yield items of type str"):
        calibration_batches(frame, tokenizer=tokenizer)


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
    ],
)
def test_what_is_refused(data, text, tokenizer):
    assert_refused(data, text, tokenizer)
