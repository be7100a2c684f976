"""Rows with images: read by the model's processor as in training, or refused."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from peft import get_peft_model
from transformers import AutoProcessor, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from peft_sieve import SieveLoraConfig, profile_routing
from peft_sieve.errors import SieveError
from peft_sieve.routing.data.batches import calibration_batches
from tests.architectures.recount import recounted
from tests.models import TINY_OLMOE
from tests.routing.data.pictures import PLACEHOLDER, aria_model, picture, qwen_model, qwen_processor
from tests.routing.data.samples import CHAT, assert_refused, assert_same, rows_of

TURN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}


@pytest.fixture(scope="module")
def processor():
    return qwen_processor()


@pytest.fixture(scope="module")
def model(processor):
    return qwen_model(processor)


def chats() -> list[dict[str, Any]]:
    return [
        {"messages": CHAT, "images": [picture(0)]},
        {"messages": [TURN, ANSWER], "images": [picture(1, 16, 16)]},
        {"messages": [TURN, ANSWER, TURN], "images": [picture(2), picture(3, 12, 30)]},
    ]


def collated(processor, rows, max_length=2048):
    """What TRL's collator makes of rows, which it changes."""
    collator = DataCollatorForVisionLanguageModeling(processor, max_length=max_length)
    batch = dict(collator([dict(row) for row in rows]))
    del batch["labels"]
    return batch


def assert_same_batch(batch, other):
    assert set(batch) == set(other)
    for name in batch:
        assert torch.equal(batch[name], other[name]), name


def test_the_batches_are_those_of_training(processor):
    rows = chats()
    data = calibration_batches(rows, tokenizer=processor, batch_size=2)
    assert len(data.batches) == 2 and data.num_samples == 3
    assert_same_batch(data.batches[0], collated(processor, rows[:2]))
    assert_same_batch(data.batches[1], collated(processor, rows[2:]))
    assert {"pixel_values", "image_grid_thw", "mm_token_type_ids"} <= set(data.batches[0])

    dataset = datasets.Dataset.from_list([{"messages": CHAT, "images": [picture(i)]} for i in range(3)])
    for source in (dataset, dataset.with_format("torch"), dataset.to_iterable_dataset()):
        made = calibration_batches(source, tokenizer=processor)
        assert sorted(map(len, rows_of(made))) == sorted(collated(processor, list(dataset))["attention_mask"].sum(1))

    texts = [{"text": f"one {PLACEHOLDER} two", "image": picture(4)}, {"text": PLACEHOLDER, "image": picture(5)}]
    made = calibration_batches(texts, tokenizer=processor)
    assert_same_batch(made.batches[0], collated(processor, texts))


def test_the_counts_are_those_of_the_models_own_forward(processor, model):
    rows = chats()
    profile = profile_routing(model, rows, tokenizer=processor, batch_size=2, progress=False)
    with recounted(model, dict.fromkeys(profile.counts, 8)) as counts, torch.no_grad():
        for row in rows:  # one at a time, so that nothing is padded
            model(**collated(processor, [row]))
    assert len(counts) == 2
    for path, expected in counts.items():
        assert profile.counts[path].tolist() == expected.tolist(), path
    text_only = [{"messages": row["messages"]} for row in rows[:1]]
    assert profile.num_tokens > profile_routing(model, text_only, tokenizer=processor, progress=False).num_tokens + 20


def test_every_form_of_a_row(processor):
    one = picture(0)
    expected = rows_of(calibration_batches([{"messages": [TURN, ANSWER], "images": [one]}], tokenizer=processor))
    own = {"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": "What is it?"}]}
    plain = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    forms = [
        {"messages": [TURN, ANSWER], "image": one},
        {"messages": [own, ANSWER]},
        {"messages": [own, ANSWER], "images": []},
        {"messages": plain, "images": [one]},
        {"prompt": [TURN], "completion": [ANSWER], "images": [one]},
        {
            "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}],
            "image": one,
        },
        {"text": f"<user>{PLACEHOLDER}What is it?<assistant>A cat.", "images": [one]},
        {"prompt": f"<user>{PLACEHOLDER}What is it?", "completion": "<assistant>A cat.", "images": [one]},
    ]
    for row in forms:
        data = calibration_batches([row], tokenizer=processor)
        assert rows_of(data) == expected, row
        assert "pixel_values" in data.batches[0], row
    preferences = {"prompt": [TURN], "chosen": [ANSWER], "rejected": CHAT[1:], "images": [one]}
    assert rows_of(calibration_batches([preferences], tokenizer=processor))[0] == expected[0]
    formatted = calibration_batches(
        [{"pic": 1, "image": one}], tokenizer=processor, formatting_func=lambda row: [TURN, ANSWER]
    )
    assert rows_of(formatted) == expected


def test_rows_with_and_without_images_in_one_data_set(processor):
    rows = [*chats()[:1], {"messages": CHAT, "images": []}, {"messages": CHAT, "images": None}, "plain text"]
    data = calibration_batches(rows, tokenizer=processor, batch_size=2)
    assert [set(batch) for batch in data.batches[:2]] == [{"input_ids", "attention_mask"}] * 2
    assert_same_batch(data.batches[2], collated(processor, rows[:1]))
    assert data.num_samples == 4
    text = processor.tokenizer("".join(f"<{turn['role']}>{turn['content']}" for turn in CHAT))["input_ids"]
    assert rows_of(data)[:2] == [text, text]
    shares = [calibration_batches(rows, tokenizer=processor, batch_size=2, shard=(rank, 2)) for rank in (0, 1)]
    assert sorted(ids for share in shares for ids in rows_of(share)) == sorted(rows_of(data))
    assert {share.fingerprint for share in shares} == {data.fingerprint}


def test_without_a_processor(processor, tokenizer):
    tokenizer.chat_template = processor.chat_template
    needed = "row 0 of the calibration data has images, but TokenizersBackend reads text only."
    for row in (*chats(), {"text": "one", "image": picture(0)}, {"chosen": CHAT, "images": [picture(0)]}):
        assert_refused([row], needed, tokenizer)
    assert_refused(datasets.Dataset.from_list([{"text": "one", "image": picture(0)}]), needed, tokenizer)
    with pytest.raises(SieveError, match="has images, but there is no tokenizer"):
        calibration_batches(chats())


def test_the_processor_comes_from_the_model(tmp_path):
    model = aria_model(str(tmp_path))
    rows = [{"messages": CHAT, "images": [picture(0)]}, {"messages": CHAT}]
    whole, text = (profile_routing(model, data, progress=False) for data in (rows, rows[1:]))
    assert whole.num_tokens > 2 * text.num_tokens + 100
    processor, tokenizer = AutoProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    given, found = (calibration_batches(rows, tokenizer=reader) for reader in (processor, tokenizer))
    assert given.fingerprint == found.fingerprint
    assert_same_batch(given.batches[1], found.batches[1])
    model.to(torch.bfloat16)  # its vision tower takes no other type then
    assert profile_routing(model, rows, progress=False).num_tokens == whole.num_tokens
    config = SieveLoraConfig(r=2, calib_dataset=rows, calib_tokenizer=processor)
    assert get_peft_model(model, config).peft_config["default"].calibration["tokens"] == whole.num_tokens
    tokenizer.add_tokens(["<new>"])  # the saved processor does not have it
    with pytest.raises(SieveError, match="Pass the model's processor"):
        calibration_batches(rows, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {"messages": [TURN, ANSWER]},
            "has 0 images in its columns 'images', 'image', and its messages have 1 placeholders",
        ),
        ({"messages": [TURN], "images": [picture(0), picture(1)]}, "has 2 images in its columns"),
        (
            {"messages": CHAT[1:], "images": [picture(0)]},
            "has 1 images in its columns 'images', 'image', and its messages have 0 placeholders",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "has a part of the type 'image_url', which calibration does not read.",
        ),
        (
            {"messages": CHAT, "images": ["no/such.png"]},
            "The processor ImagesOnly failed on row 0 of the calibration data",
        ),
        (
            {"input_ids": [1, 2], "pixel_values": [[0.5]]},
            "has `input_ids` and 'pixel_values', which a row of token ids would",
        ),
        (
            {"input_ids": [1, 2], "images": [picture(0)]},
            "has `input_ids` and 'images', which a row of token ids would lose.",
        ),
    ],
)
def test_what_is_refused(row, text, processor):
    assert_refused([row], text, processor)


def test_sound_and_videos_are_left_out_with_a_word(processor):
    rows = [{"messages": CHAT, "videos": ["a.mp4"]}, {"messages": CHAT, "videos": ["b.mp4"]}]
    for data in (rows, datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows).to_iterable_dataset()):
        with pytest.warns(UserWarning, match="have the columns 'videos', which are left out") as caught:
            made = calibration_batches(data, tokenizer=processor)
        assert len(caught) == 1
        assert_same(made, calibration_batches([{"messages": CHAT}] * 2, tokenizer=processor))
    broken = {"bytes": b"no sound", "path": None}
    heard = datasets.Dataset.from_list([{"text": "one", "audio": broken}]).cast_column("audio", datasets.Audio())
    with pytest.warns(UserWarning, match="'audio'"):  # not decoded
        assert calibration_batches(heard, tokenizer=processor).num_samples == 1


def test_the_processor_is_left_as_it_was(processor):
    before = processor.tokenizer.backend_tokenizer.to_str()
    calibration_batches(chats(), tokenizer=processor)
    assert processor.tokenizer.backend_tokenizer.to_str() == before
    assert processor.tokenizer.padding_side == AutoTokenizer.from_pretrained(TINY_OLMOE).padding_side


def test_what_the_template_leaves_out_is_said_of_images_too(processor, monkeypatch):
    template = processor.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    monkeypatch.setattr(processor, "chat_template", template)
    with pytest.warns(UserWarning, match="does not show `content` of turn 0 of row 0 .* nor 2 other parts"):
        calibration_batches([{**row, "system": "Be brief."} for row in chats()], tokenizer=processor, batch_size=2)


def test_an_image_is_not_cut(processor):
    with pytest.raises(SieveError, match=r"ImagesOnly failed .*raise max_length \(calib_max_length\), which is 5\."):
        calibration_batches(chats(), tokenizer=processor, max_length=5)
    made = calibration_batches(chats(), tokenizer=processor, max_length=40)
    assert_same_batch(made.batches[0], collated(processor, chats(), max_length=40))
