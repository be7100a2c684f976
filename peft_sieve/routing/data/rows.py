"""One row of a calibration data set -> samples -> token ids.

The forms follow TRL's trainers, so that the router is profiled on the text that training shows it.
"""

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...errors import SieveError

ROW_FORMS = "`text`, `messages`, `prompt` + `completion`, `chosen` + `rejected`, `input_ids` or `conversations`"
# Every column that a row's form may read.
ROW_COLUMNS = (
    "input_ids",
    "attention_mask",
    "messages",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "conversations",
    "text",
    "tools",
    "chat_template_kwargs",
)

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_TEXTS_PER_CALL = 64  # a fast tokenizer holds offsets and strings of a whole call: bounded for book-length rows
# A book is not tokenised for its first page. Where a text is cut changes the tokens next to the cut, hence the spare.
_CHARACTERS_PER_TOKEN = 16
_SPARE_TOKENS = 256
_TOO_LONG_WARNING = "sequence-length-is-longer-than-the-specified-maximum"


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template, with the keyword arguments that their row gives it."""

    messages: list[dict[str, Any]]
    where: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenIds:
    """The token ids of a sample; a `mask` of None means that every token counts."""

    ids: list[int]
    mask: list[int] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not masked."""
        return len(self.ids) if self.mask is None else sum(self.mask)

    def used_ids(self) -> list[int]:
        """The ids that are not masked."""
        return (
            self.ids if self.mask is None else [token for token, used in zip(self.ids, self.mask, strict=True) if used]
        )


Sample = str | Conversation | TokenIds
RowFormatter = Callable[[Any], str | list[str] | list[dict[str, Any]]]


def read_row(row: Any, where: str, formatting_func: RowFormatter | None = None) -> list[Sample]:
    """Reads the samples of one row.

    Args:
        row: a str, or a mapping in one of `ROW_FORMS`; anything that `formatting_func` takes, if that is given.
        where: names the row in error texts.
        formatting_func: turns the row into a str, a list of str (several samples) or a list of messages.

    Returns:
        At least one sample; an empty row is the empty str.

    Raises:
        SieveError: the row, or what `formatting_func` made of it, fits no form.
    """
    if formatting_func is not None:
        return _format_row(row, where, formatting_func)
    if isinstance(row, str):
        return [row]
    if not isinstance(row, Mapping):
        raise SieveError(
            f"{where} of the calibration data is of type {_type_name(row)}; expected a str or a dict with {ROW_FORMS}."
        )
    if row.get("input_ids") is not None:
        return [_read_token_ids(row, where)]
    if row.get("messages") is not None:
        return [_conversation(row["messages"], "messages", row, where)]
    if row.get("prompt") is not None and row.get("completion") is not None:
        return [_read_answer(row, "completion", where)]
    answers = [name for name in ("chosen", "rejected") if row.get(name) is not None]
    if answers:
        # Preference training shows the model both.
        return [_read_answer(row, name, where) for name in answers]
    if row.get("conversations") is not None:
        return [_conversation(row["conversations"], "conversations", row, where)]
    if row.get("text") is not None:
        return [_expect_text(row["text"], "text", where)]
    if fits_a_form(row):
        return [""]  # the column is there and holds None: an empty row, not an unknown form
    raise _unknown_columns(row)


def fits_a_form(columns: Iterable[Any]) -> bool:
    """Whether rows with these columns are in one of `ROW_FORMS`."""
    names = set(columns)
    alone = {"input_ids", "messages", "conversations", "text", "chosen", "rejected"}
    return bool(names & alone) or {"prompt", "completion"} <= names


def _format_row(row: Any, where: str, formatting_func: RowFormatter) -> list[Sample]:
    try:
        made = formatting_func(row)
    except Exception as error:
        columns = f" (columns {_quoted(row)})" if isinstance(row, Mapping) else ""
        raise SieveError(
            f"calib_formatting_func failed on {where}{columns} with {type(error).__name__}: {error}; it is called "
            "with one row and must return its text."
        ) from error
    if isinstance(made, str):
        return [made]
    if isinstance(made, (list, tuple)):
        texts = [item for item in made if isinstance(item, str)]
        if len(texts) == len(made):
            return [*texts] or [""]
        if all(_is_message(item) for item in made):
            return [_conversation(made, "messages", row if isinstance(row, Mapping) else {}, where)]
    raise SieveError(
        f"calib_formatting_func returned {_type_name(made)} for {where}; it must return a str, a list of str or a "
        "list of messages (dicts with `role` and `content`)."
    )


def _read_answer(row: Mapping[str, Any], column: str, where: str) -> Sample:
    """An answer after its prompt; the answers of a preference row may have the prompt in them."""
    prompt, answer = row.get("prompt"), row[column]
    names = column if prompt is None else f"prompt` + `{column}"
    if isinstance(answer, str) and isinstance(prompt, str | None):
        return (prompt or "") + answer
    if isinstance(answer, (list, tuple)) and isinstance(prompt, list | tuple | None):
        return _conversation([*(prompt or ()), *answer], names, row, where)
    given, expected = f"a `{column}` of type {_type_name(answer)}", "a str or a list of messages"
    if prompt is not None:
        given, expected = f"a `prompt` of type {_type_name(prompt)} and {given}", "two str or two lists of messages"
    raise SieveError(f"{where} of the calibration data has {given}; expected {expected}.")


def _read_token_ids(row: Mapping[str, Any], where: str) -> TokenIds:
    ids = _expect_ints(row["input_ids"], "input_ids", where)
    if ids and min(ids) < 0:
        raise SieveError(
            f"{where} of the calibration data has the negative token id {min(ids)} in `input_ids`; expected "
            "ids of the vocabulary."
        )
    if row.get("attention_mask") is None:
        return TokenIds(ids)
    mask = [int(used != 0) for used in _expect_ints(row["attention_mask"], "attention_mask", where)]
    if len(mask) != len(ids):
        raise SieveError(
            f"{where} of the calibration data has {len(ids)} `input_ids` but an `attention_mask` of length "
            f"{len(mask)}; expected the same length."
        )
    if 1 not in mask:
        return TokenIds([])
    # Padding at either end goes, so that cutting to max_length keeps tokens and batches carry no foreign padding.
    start, stop = mask.index(1), len(mask) - mask[::-1].index(1)
    return TokenIds(ids[start:stop], mask[start:stop])


def _conversation(value: Any, column: str, row: Mapping[str, Any], where: str) -> Conversation:
    if not isinstance(value, (list, tuple)) or not all(_is_message(message) for message in value):
        raise SieveError(
            f"{where} of the calibration data holds no list of messages in `{column}`; expected a list of dicts with "
            "`role` and `content`."
        )
    messages = []
    for message in value:
        # Arrow fills the keys that a message lacks with None, which chat templates would print.
        plain = {key: item for key, item in message.items() if item is not None}
        if "from" in plain:
            speaker = plain.pop("from")
            plain["role"] = _SHAREGPT_ROLES.get(speaker, speaker)
        if "value" in plain:
            plain["content"] = plain.pop("value")
        messages.append(plain)
    tools = row.get("tools") or None
    if isinstance(tools, str):  # TRL takes them as JSON too
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise SieveError(f"{where} of the calibration data holds no JSON in `tools` ({error}).") from error
    return Conversation(messages, where, {"tools": tools, **(row.get("chat_template_kwargs") or {})})


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _expect_text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise SieveError(
            f"{where} of the calibration data holds {_type_name(value)} in `{column}`; expected a str: convert the "
            "column or pass calib_formatting_func."
        )
    return value


def _expect_ints(value: Any, column: str, where: str) -> list[int]:
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return [operator.index(item) for item in value]
    except TypeError:
        raise SieveError(
            f"{where} of the calibration data holds no flat list of integers in `{column}`; expected the token ids "
            "of one sample, or a 2-D tensor for a model-ready batch."
        ) from None


def _unknown_columns(row: Mapping[str, Any]) -> SieveError:
    names = [name for name in row if isinstance(name, str) and not {'"', "\\"} & set(repr(name))]
    named_ids = {name for name in names if name.lower() in ("id", "idx", "index") or name.lower().endswith("_id")}
    texts = [name for name in names if isinstance(row[name], str) and name not in named_ids]
    shown = (texts or names)[:3] or ["column"]
    body = 'f"' + r"\n".join(f"{{row[{name!r}]}}" for name in shown) + '"'
    for name in names:
        if isinstance(row[name], (list, tuple)) and row[name] and all(map(_is_message, row[name])):
            body = f"row[{name!r}]"
    return SieveError(
        f"the calibration data has the columns {_quoted(row)}, which fit none of the forms {ROW_FORMS}; pass a "
        f"function that turns one row into text, e.g. `calib_formatting_func=lambda row: {body}`."
    )


def tokenise(samples: Sequence[Sample], tokenizer: Any, max_length: int) -> list[TokenIds]:
    """Turns samples into token ids, each cut to its first `max_length` tokens.

    Args:
        samples: what `read_row` gave.
        tokenizer: a tokenizer, a processor that has one, or None if no sample needs it.
        max_length: tokens kept of a sample.

    Returns:
        Token ids in the order of `samples`; an empty sample has none.

    Raises:
        SieveError: there is text but no tokenizer, messages but no chat template, or either of them failed.
    """
    text_tokenizer = find_text_tokenizer(tokenizer)
    tokens = [sample if isinstance(sample, TokenIds) else TokenIds([]) for sample in samples]
    text_at = [i for i, sample in enumerate(samples) if isinstance(sample, str) and sample]
    chat_at = [i for i, sample in enumerate(samples) if isinstance(sample, Conversation) and sample.messages]
    if text_at or chat_at:
        if text_tokenizer is None:
            raise SieveError(
                "the calibration data are text but there is no tokenizer; pass tokenizer= to profile_routing, or "
                "calib_tokenizer= to SieveLoraConfig."
            )
        with _settings_restored(text_tokenizer):
            texts = [str(samples[i]) for i in text_at]
            for i, ids in zip(text_at, _tokenise_texts(texts, text_tokenizer, max_length), strict=True):
                tokens[i] = TokenIds(ids)
            for i in chat_at:
                conversation = samples[i]
                assert isinstance(conversation, Conversation)
                tokens[i] = TokenIds(_tokenise_chat(conversation, tokenizer, text_tokenizer))
    return [TokenIds(item.ids[:max_length], item.mask and item.mask[:max_length]) for item in tokens]


def find_text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, the one inside a processor, or None for None."""
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(inner):
        raise SieveError(
            f"the calibration tokenizer is of type {_type_name(tokenizer)}; expected a tokenizer, or a processor that "
            "has one, as AutoTokenizer.from_pretrained or AutoProcessor.from_pretrained give."
        )
    return inner


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
        return tokenizer(texts, padding=False, truncation=False, return_attention_mask=False)["input_ids"]
    except Exception as error:
        raise SieveError(
            f"the tokenizer {_type_name(tokenizer)} failed on the calibration text with {type(error).__name__}: "
            f"{error}."
        ) from error


def _tokenise_chat(conversation: Conversation, tokenizer: Any, text_tokenizer: Any) -> list[int]:
    # A processor may keep the template while its tokenizer has none.
    has_template = getattr(text_tokenizer, "chat_template", None) is not None
    owner = tokenizer if not has_template and hasattr(tokenizer, "apply_chat_template") else text_tokenizer
    try:
        encoded = owner.apply_chat_template(
            conversation.messages, tokenize=True, return_dict=True, **conversation.template_kwargs
        )
    except Exception as error:
        if getattr(owner, "chat_template", None) is None:
            raise SieveError(
                f"the calibration data are messages but the tokenizer {_type_name(tokenizer)} has no chat template; "
                "set tokenizer.chat_template, or pass a calib_formatting_func that returns text."
            ) from error
        raise SieveError(
            f"the chat template failed on {conversation.where} of the calibration data with "
            f"{type(error).__name__}: {error}."
        ) from error
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return ids[0] if ids and isinstance(ids[0], list) else ids  # a processor answers with a batch of one


@contextmanager
def _settings_restored(tokenizer: Any) -> Iterator[None]:
    """Leaves the tokenizer as it was: a call switches off truncation and padding that its file asked for."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    warned = getattr(tokenizer, "deprecation_warnings", None)
    before = dict(warned) if warned is not None else {}
    if warned is not None:
        warned[_TOO_LONG_WARNING] = True  # samples are cut after tokenising: the warning would mislead
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
        if warned is not None:
            warned.clear()
            warned.update(before)


def _quoted(row: Mapping[Any, Any]) -> str:
    return ", ".join(repr(name) for name in row)


def _type_name(value: Any) -> str:
    return type(value).__name__
