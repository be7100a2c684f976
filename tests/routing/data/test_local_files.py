"""Rows of files of every kind, with and without the datasets library."""

import csv
import gzip
import json
import lzma
import re
import sys

import datasets
import pytest

from peft_sieve.errors import SieveError
from peft_sieve.routing.data.batches import calibration_batches
from tests.routing.data.samples import TEXTS, assert_same, encoded, rows_of


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


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.JSON.gz", "./missing", "/missing", "~/missing", "a/b/c"])
def test_a_missing_file(name, tokenizer):
    with pytest.raises(SieveError, match=re.escape(f"The calibration file {name!r} does not exist.")):
        calibration_batches(name, tokenizer=tokenizer)


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
