"""Samples of calibration data -> token ids, as the tokenizer or its chat template gives them."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...checks import must_be, one_line
from ...errors import SieveError, out_of_memory
from .chats import ChatRenderer
from .conversations import Conversation
from .rows import Sample, TokenIds
from .tokenizer_settings import settings_restored

_TEXTS_PER_CALL = 64  # a fast tokenizer holds offsets and strings of a whole call: bounded for book-length rows
# A book is not tokenised for its first page. Where a text is cut changes the tokens next to the cut, hence the spare.
_CHARACTERS_PER_TOKEN = 16
_SPARE_TOKENS = 256


def tokenise(samples: Sequence[Sample], tokenizer: Any, max_length: int) -> list[TokenIds]:
    """Turns samples into token ids, each cut to its first `max_length` tokens.

    Args:
        samples: what `read_row` gave.
        tokenizer: a tokenizer, a processor that has one, or None if no sample needs it.
        max_length: tokens kept of a sample.

    Returns:
        Token ids in the order of `samples`; an empty sample has none.

    Raises:
        SieveError: there is text but no tokenizer or an empty one, messages but no chat template, either of them
            failed, or the chat template does not show a turn.
    """
    text_tokenizer = find_text_tokenizer(tokenizer)
    tokens = [sample if isinstance(sample, TokenIds) else TokenIds([]) for sample in samples]
    text_at = [i for i, sample in enumerate(samples) if isinstance(sample, str) and sample]
    chat_at = [i for i, sample in enumerate(samples) if isinstance(sample, Conversation) and sample.messages]
    if text_at or chat_at:
        if text_tokenizer is None:
            raise SieveError(
                "The calibration data are text, but there is no tokenizer. Pass tokenizer= to profile_routing, or "
                "calib_tokenizer= to SieveLoraConfig."
            )
        _check_vocabulary(text_tokenizer)
        with settings_restored(text_tokenizer):
            texts = [str(samples[i]) for i in text_at]
            for i, ids in zip(text_at, _tokenise_texts(texts, text_tokenizer, max_length), strict=True):
                tokens[i] = TokenIds(ids)
            renderer = ChatRenderer(tokenizer, text_tokenizer)
            for i in chat_at:
                conversation = samples[i]
                assert isinstance(conversation, Conversation)
                tokens[i] = TokenIds(renderer.token_ids(conversation))
            renderer.warn()
    return [TokenIds(item.ids[:max_length], item.mask and item.mask[:max_length]) for item in tokens]


def find_text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, the one inside a processor, or None for None."""
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(inner):
        advice = "Load it with AutoTokenizer.from_pretrained or AutoProcessor.from_pretrained."
        raise must_be("The calibration tokenizer", "a tokenizer, or a processor that has one", tokenizer, advice)
    return inner


def _check_vocabulary(tokenizer: Any) -> None:
    """Refuse what transformers makes of a folder without the files of a tokenizer.

    Raises:
        SieveError: apart from special tokens, there is none with a letter or a digit.
    """
    if not hasattr(tokenizer, "get_vocab"):
        return
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*getattr(tokenizer, "all_special_tokens", ()), *(str(token) for token in added if token.special)}
    if not any(any(map(str.isalnum, token)) for token in tokenizer.get_vocab() if token not in special):
        place = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise SieveError(
            f"The tokenizer of {place!r} is empty: it has special tokens only. Save the files of the model's tokenizer "
            "there, or pass it as tokenizer, which is calib_tokenizer in a configuration."
        )


def _tokenise_texts(texts: list[str], tokenizer: Any, max_length: int) -> Iterator[list[int]]:
    """Token ids of each text: at least those that the cut to `max_length` keeps."""
    wanted = max_length + _SPARE_TOKENS
    limit = wanted * _CHARACTERS_PER_TOKEN
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = texts[start : start + _TEXTS_PER_CALL]
        for text, ids in zip(chunk, _encode([text[:limit] for text in chunk], tokenizer), strict=True):
            yield ids if len(text) <= limit or len(ids) >= wanted else _encode([text], tokenizer)[0]


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    try:
        encoded = tokenizer(texts, padding=False, truncation=False, return_attention_mask=False)["input_ids"]
        return [list(ids) for _, ids in zip(texts, encoded, strict=True)]
    except Exception as error:
        if out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {one_line(error)}"
        name = type(tokenizer).__name__
        raise SieveError(f"The tokenizer {name} failed on the calibration text. {problem}.") from error
