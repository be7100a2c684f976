"""Samples -> batches, fingerprints and shares; nothing is left behind."""

import copy
import hashlib
import random
import re
import struct

import datasets
import numpy as np
import pytest
import torch

from peft_sieve.errors import SieveError
from peft_sieve.routing.data.batches import calibration_batches
from tests.routing.data.samples import CHAT, TEXTS, assert_same, encoded, numbers, rows_of


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
