"""Packed rows are read as their samples, however they were packed."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_sieve import SieveError, profile_routing
from peft_sieve.routing.data.batches import CalibrationData, calibration_batches
from peft_sieve.training.warm_up import warm_up_profile
from tests.models import tiny_model

LENGTHS = (9, 4, 7, 1, 12, 5)


def samples() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]


def joined(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def restarting(lengths: Any) -> list[int]:
    return [position for length in lengths for position in range(length)]


def numbered(lengths: Any) -> list[int]:
    return [number for number, length in enumerate(lengths, 1) for _ in range(length)]


def halves() -> list[tuple[list[list[int]], list[int]]]:
    """Samples and their lengths, in two packed rows."""
    return [(samples()[:3], list(LENGTHS[:3])), (samples()[3:], list(LENGTHS[3:]))]


def packed_rows() -> list[dict[str, Any]]:
    return [{"input_ids": joined(ids), "lengths": lengths} for ids, lengths in halves()]


def by_trl() -> Any:
    return pack_dataset(Dataset.from_dict({"input_ids": samples()}), seq_length=20, strategy="bfd")


def by_axolotl() -> dict[str, torch.Tensor]:
    """Its collator's batch: rows padded on the right, and the number of the sample as mask."""
    batch: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "position_ids": [], "labels": []}
    for ids, lengths in halves():
        row = torch.tensor(joined(ids))
        batch["input_ids"].append(row)
        batch["attention_mask"].append(torch.tensor(numbered(lengths)))
        batch["position_ids"].append(torch.tensor(restarting(lengths)))
        batch["labels"].append(row)
    filling = {"labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filling.get(name, 0))
        for name, rows in batch.items()
    }


def features() -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": ids} for ids in samples()]


def without(batch: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in names}


FORMS: dict[str, Any] = {
    "lengths of TRL": by_trl,
    "positions": lambda: [
        {"input_ids": r["input_ids"], "position_ids": restarting(r["lengths"])} for r in packed_rows()
    ],
    "numbers in the mask": lambda: [
        {"input_ids": r["input_ids"] + [0, 0], "attention_mask": [*numbered(r["lengths"]), 0, 0]} for r in packed_rows()
    ],
    "batch of axolotl": lambda: [by_axolotl()],
    "its mask alone": lambda: [without(by_axolotl(), "position_ids")],
    "flattened": lambda: [DataCollatorWithFlattening(return_tensors="pt")(features())],
    "flattened for kernels": lambda: [
        without(
            DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(features()), "position_ids"
        )
    ],
    "flattened with numbers": lambda: [
        without(DataCollatorWithFlattening(return_tensors="pt", return_seq_idx=True)(features()), "position_ids")
    ],
    "padding-free of TRL": lambda: [
        DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=16)(features())
    ],
    "packed and padded by TRL": lambda: [
        DataCollatorForLanguageModeling(pad_token_id=0, return_position_ids=True, pad_to_multiple_of=16)(list(by_trl()))
    ],
}


def rows_of(data: CalibrationData) -> list[list[int]]:
    return sorted(
        ids[kept].tolist()
        for batch in data.batches
        for ids, kept in zip(batch["input_ids"], batch["attention_mask"] == 1, strict=True)
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_sample_is_a_row(form: str) -> None:
    data = calibration_batches(FORMS[form]())
    assert rows_of(data) == sorted(samples())
    assert (data.num_samples, data.num_tokens) == (len(LENGTHS), sum(LENGTHS))
    few = calibration_batches(FORMS[form](), max_samples=2)
    assert few.num_samples == 2 and all(ids in samples() for ids in rows_of(few))


@pytest.mark.parametrize("name", ["olmoe", "jamba"])
def test_the_profile_is_that_of_the_samples(name: str) -> None:
    model = tiny_model(name)
    expected = profile_routing(model, [{"input_ids": ids} for ids in samples()], batch_size=1)
    for form, make in FORMS.items():
        profile = profile_routing(model, make())
        assert profile.num_tokens == expected.num_tokens and profile.num_samples == expected.num_samples
        for path, counts in expected.counts.items():
            assert torch.equal(profile.counts[path], counts), (form, path)
            assert torch.allclose(profile.sample_mass[path], expected.sample_mass[path], rtol=1e-4), (form, path)


def test_a_long_row_is_cut_sample_by_sample() -> None:
    data = calibration_batches(by_trl(), max_length=6)
    assert rows_of(data) == sorted(ids[:6] for ids in samples())


def test_batches_are_no_larger_than_the_packed_one_and_keep_their_labels() -> None:
    batch = by_axolotl()
    batch["labels"][1, -4:] = -100
    batches = calibration_batches([batch]).batches
    assert all(part["input_ids"].numel() <= batch["input_ids"].numel() for part in batches)
    assert len(batches) == 2
    labels = [part["labels"][part["labels"] != -100].tolist() for part in batches]
    assert sorted(joined(labels)) == sorted(batch["labels"][batch["labels"] != -100].tolist())
    for part in batches:
        assert (part["labels"][part["attention_mask"] == 0] == -100).all()
        assert part["position_ids"].shape == part["input_ids"].shape


def test_what_is_not_packed_stays_as_it_is() -> None:
    ids = torch.arange(5, 17).view(2, 6)
    left = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (left.cumsum(-1) - 1).clamp(min=0)
    tree = torch.zeros(3, 2, 6, dtype=torch.long)
    tree[:, :, 2:4] = 1  # an image of two tokens
    for batch in (
        {"input_ids": ids, "attention_mask": left, "position_ids": positions},
        {"input_ids": ids, "attention_mask": left, "position_ids": positions.masked_fill(left == 0, 1)},
        {"input_ids": ids, "position_ids": torch.arange(6)[None]},
        {"input_ids": ids, "position_ids": tree},
        {"input_ids": ids, "attention_mask": 2 * left},
    ):
        (made,) = calibration_batches([batch]).batches
        assert made.keys() == batch.keys() and all(torch.equal(made[name], batch[name]) for name in batch)
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1], "position_ids": [[0, 1, 2]] * 3}
    assert calibration_batches([row]).num_samples == 1


def test_images_keep_a_batch_together_unless_its_samples_would_mix() -> None:
    batch = {**by_axolotl(), "pixel_values": torch.rand(99, 5)}
    of_a_decoder = {**by_axolotl(), "decoder_input_ids": torch.ones(2, 5, dtype=torch.long)}
    for data in (batch, of_a_decoder):
        with pytest.raises(SieveError, match="item 0 of .* has packed rows.*images.*one sample per row"):
            calibration_batches([data])
    (made,) = calibration_batches([without(batch, "attention_mask")]).batches
    assert made["position_ids"].shape == batch["position_ids"].shape


@pytest.mark.parametrize("lengths", [[3, 3], [6, -1], ["a"]])
def test_lengths_that_do_not_fit(lengths: Any) -> None:
    row = {"input_ids": [5, 6, 7, 8, 9]}
    with pytest.raises(SieveError, match="`seq_lengths` of row 0"):
        calibration_batches([{**row, "seq_lengths": lengths}])
    assert calibration_batches([{**row, "seq_lengths": 5}]).num_samples == 1  # a number of another kind


def test_a_warm_up_counts_samples() -> None:
    model = tiny_model("olmoe")
    profile = warm_up_profile(model, by_trl(), fraction=0.5, batch_size=1)
    assert profile.num_samples == 3
    assert warm_up_profile(model, [by_axolotl()], fraction=0.5).num_samples == 3
