"""Texts and messages -> token ids, and a tokenizer that is left as it was."""

import copy
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from peft_sieve.errors import SieveError
from peft_sieve.routing.data.batches import calibration_batches
from tests.routing.data.samples import CHAT, CHAT_TEMPLATE, CHAT_TEXT, encoded, rows_of


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
    assert seen[0] == {"role": "user", "content": "hi"}


@pytest.mark.parametrize("wrap", [list, np.array, torch.tensor])
def test_chat_templates_that_return_bare_ids(chat_tokenizer, wrap, monkeypatch):
    monkeypatch.setattr(chat_tokenizer, "apply_chat_template", lambda messages, **options: wrap([1, 2, 3]))
    assert rows_of(calibration_batches([{"messages": CHAT}], tokenizer=chat_tokenizer)) == [[1, 2, 3]]


def test_a_chat_equals_what_the_tokenizer_renders_and_is_cut(chat_tokenizer):
    data = calibration_batches([{"messages": CHAT}], tokenizer=chat_tokenizer, max_length=4)
    assert rows_of(data) == [chat_tokenizer.apply_chat_template(CHAT, return_dict=False)[:4]]


def test_the_tokenizer_is_restored_after_an_error(chat_tokenizer):
    chat_tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    backend = chat_tokenizer.backend_tokenizer.to_str()
    with pytest.raises(SieveError, match="no such role"):
        calibration_batches(["text", {"messages": [{"role": "forbidden", "content": ""}]}], tokenizer=chat_tokenizer)
    assert chat_tokenizer.backend_tokenizer.to_str() == backend


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
