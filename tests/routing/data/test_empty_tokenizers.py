"""A folder without the files of a tokenizer, of which transformers makes one of special tokens only."""

import re

import pytest
import torch
from peft import get_peft_model
from transformers import CONFIG_MAPPING, AutoTokenizer, ByT5Tokenizer

from peft_sieve import SieveLoraConfig, profile_routing
from peft_sieve.errors import SieveError
from peft_sieve.routing.data.batches import calibration_batches
from tests.models import tiny_model
from tests.routing.data.samples import CHAT, encoded, rows_of


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "dbrx", "nllb-moe", "switch_transformers", "zaya"])
def test_an_empty_tokenizer_is_refused_by_its_folder(name, tmp_path):
    CONFIG_MAPPING[name]().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    for row in ("two words", {"messages": CHAT}):
        with pytest.raises(
            SieveError, match=re.escape(f"The tokenizer of '{tmp_path}' is empty: it has special tokens")
        ):
            calibration_batches([row], tokenizer=tokenizer)
    assert rows_of(calibration_batches([{"input_ids": [1, 2]}], tokenizer=tokenizer)) == [[1, 2]]


def test_the_base_models_folder(tmp_path, tokenizer):
    model = tiny_model("olmoe", vocab_size=4096)
    model.name_or_path = str(tmp_path)
    model.config.save_pretrained(tmp_path)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SieveError, match=re.escape(str(tmp_path))):
        profile_routing(model, ["two words"])
    with pytest.raises(SieveError, match=re.escape(str(tmp_path))):
        get_peft_model(model, SieveLoraConfig(calib_dataset=["two words"], task_type="CAUSAL_LM"))
    assert [name for name, _ in model.named_modules()] == before
    assert profile_routing(model, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]).num_tokens == 3
    tokenizer.save_pretrained(tmp_path)
    assert profile_routing(model, ["two words"]).num_tokens == len(encoded(tokenizer, "two words")[0])


@pytest.mark.parametrize("broken", ["{", "{}", "[]"])
def test_a_broken_file_of_the_tokenizer_is_needed_for_text_only(broken, tmp_path):
    model = tiny_model("olmoe")
    model.name_or_path = str(tmp_path)
    model.config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(SieveError, match="there is no tokenizer"):
        profile_routing(model, ["two words"])
    with pytest.raises(SieveError, match=re.escape(f"the tokenizer '{tmp_path}' cannot be loaded")):
        profile_routing(model, ["two words"], tokenizer=str(tmp_path))
    assert profile_routing(model, [{"input_ids": [3, 4]}]).num_tokens == 2


def test_tokenizers_of_bytes_and_of_added_words_are_not_empty(tmp_path):
    CONFIG_MAPPING["qwen3_moe"]().save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    words.add_tokens(["two", "words"])
    for tokenizer in (words, ByT5Tokenizer()):
        assert rows_of(calibration_batches(["two words"], tokenizer=tokenizer)) == encoded(tokenizer, "two words")
