"""Batches that come ready for the model pass as they are."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from peft_sieve.routing.data.batches import calibration_batches
from tests.routing.data.samples import assert_refused, assert_same, numbers, rows_of


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


@pytest.mark.parametrize(
    ("data", "text"),
    [
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
def test_what_is_refused(data, text, tokenizer):
    assert_refused(data, text, tokenizer)
