"""A tokenizer, with and without a chat template, and a cache of the datasets library for each test."""

import copy
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from tests.routing.data.samples import CHAT_TEMPLATE

TINY_OLMOE = Path(__file__).parents[3] / "examples" / "tiny-olmoe"


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
