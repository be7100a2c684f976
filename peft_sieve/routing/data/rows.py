"""One row of a calibration data set -> samples: texts, messages or token ids.

The forms follow TRL's trainers, so that the router is profiled on the text that training shows it.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ...checks import must_be, one_line, quoted, shown
from ...errors import SieveError, out_of_memory
from .conversations import MESSAGES, Conversation, conversation, is_message, read_tools, tool_names
from .images import IMAGE_COLUMNS, Captioned, images_of, wants_images, with_images
from .packed import samples_of

ROW_FORMS = "`text`, `messages`, `prompt` + `completion`, `chosen` + `rejected`, `input_ids` or `conversations`"
# What the chat template takes beside the messages.
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Every column that a row's form may read.
ROW_COLUMNS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "seq_lengths",
    "messages",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "conversations",
    "text",
    "system",
    "instruction",
    "input",
    "question",
    "query",
    *_TEMPLATE_COLUMNS,
    *IMAGE_COLUMNS,
)
# What a processor made of images or sound, and a row of token ids would lose.
_PROCESSED = ("pixel_values", "input_features", "input_values")
# What others call a prompt: beside answers that are plain text, it would be lost.
_PROMPTS = ("system", "instruction", "input", "question", "query")


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


Sample = str | Captioned | Conversation | TokenIds
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
        raise must_be(where, f"a str or a dict with {ROW_FORMS}", row)
    images = images_of(row)
    samples = _read_columns(row, where)
    if any(isinstance(sample, TokenIds) for sample in samples):
        _check_nothing_processed(row, where)
    # A conversation has them already.
    return [Captioned(each, images, where) if images and each and isinstance(each, str) else each for each in samples]


def _read_columns(row: Mapping[str, Any], where: str) -> list[Sample]:
    """The samples of a row, by the first form that it fits."""
    if row.get("input_ids") is not None:
        return _read_token_ids(row, where)
    if row.get("messages") is not None:
        return [_chat(row["messages"], "messages", row, where)]
    if row.get("prompt") is not None and row.get("completion") is not None:
        return [_read_answer(row, "completion", where)]
    answers = [name for name in ("chosen", "rejected") if row.get(name) is not None]
    if answers:
        # Preference training shows the model both.
        return [_read_answer(row, name, where) for name in answers]
    if row.get("conversations") is not None:
        return [_chat(row["conversations"], "conversations", row, where)]
    if row.get("text") is not None:
        if not isinstance(row["text"], str):
            raise must_be(f"`text` of {where}", "a str", row["text"], "Convert it or pass calib_formatting_func.")
        return [row["text"]]
    if fits_a_form(row):
        return [""]  # the column is there and holds None: an empty row, not an unknown form
    raise _unknown_columns(row)


def is_read(column: Any) -> bool:
    """Whether a row with this column is read otherwise, or refused, because of it."""
    return column in ROW_COLUMNS or (isinstance(column, str) and column.startswith(_PROCESSED))


def fits_a_form(columns: Iterable[Any]) -> bool:
    """Whether rows with these columns are in one of `ROW_FORMS`."""
    names = set(columns)
    alone = {"input_ids", "messages", "conversations", "text", "chosen", "rejected"}
    return bool(names & alone) or {"prompt", "completion"} <= names


def _format_row(row: Any, where: str, formatting_func: RowFormatter) -> list[Sample]:
    try:
        made = formatting_func(row)
    except Exception as error:
        if out_of_memory(error):
            raise
        columns = f" (columns {quoted(row)})" if isinstance(row, Mapping) else ""
        raise SieveError(
            f"calib_formatting_func failed on {where}{columns} with {type(error).__name__}: {one_line(error)}. It gets "
            "one row and must return its text."
        ) from error
    if isinstance(made, str):
        return [made]
    if isinstance(made, (list, tuple)):
        texts = [item for item in made if isinstance(item, str)]
        if len(texts) == len(made):
            return [*texts] or [""]
        if all(is_message(item) for item in made):
            given = row if isinstance(row, Mapping) else {}
            chat = conversation(made, "messages", {name: given.get(name) for name in _TEMPLATE_COLUMNS}, where)
            return [with_images(chat, images_of(given) if wants_images(chat) else [])]
    kind = f"a str, a list of str or {MESSAGES}"
    raise SieveError(f"calib_formatting_func must return {kind}, got {shown(made)} for {where}.")


def _chat(value: Any, column: str, row: Mapping[str, Any], where: str) -> Conversation:
    return with_images(conversation(value, column, row, where), images_of(row))


def _read_answer(row: Mapping[str, Any], column: str, where: str) -> Sample:
    """An answer after its prompt; the answers of a preference row may have the prompt in them."""
    prompt, answer = row.get("prompt"), row[column]
    if prompt is None and column != "completion" and row.get("conversations") is not None:
        prompt = row["conversations"]  # preferences in ShareGPT's form
    answer = [answer] if is_message(answer) else answer
    if isinstance(answer, (list, tuple)) and column != "completion" and _holds(answer, prompt):
        prompt = None
    names = column if prompt is None else f"prompt` + `{column}"
    if isinstance(answer, str) and isinstance(prompt, str | None):
        text = (prompt or "") + answer
        _check_nothing_beside(row, text, names, where, _PROMPTS if prompt is None else _PROMPTS[:1])
        return text
    if isinstance(answer, (list, tuple)) and isinstance(prompt, list | tuple | None):
        return _chat([*(prompt or ()), *answer], names, row, where)
    if prompt is None:
        raise must_be(f"`{column}` of {where}", "a str or a list of messages", answer)
    given = f"{type(prompt).__name__} and {type(answer).__name__}"
    raise SieveError(f"`{names}` of {where} must be two str or two lists of messages, got {given}.")


def _holds(messages: Sequence[Any], prompt: Any) -> bool:
    """Whether a prompt that is text is one of the messages already, as in some preference data."""
    return isinstance(prompt, str) and any(is_message(each) and each.get("content") == prompt for each in messages)


def _check_nothing_beside(row: Mapping[str, Any], text: str, names: str, where: str, columns: Iterable[str]) -> None:
    """Refuse text with columns that belong to the sample, and are not part of the text."""
    beside = {column: [row[column]] for column in columns if isinstance(row.get(column), str) and row[column].strip()}
    beside["tools"] = tool_names(read_tools(row, where))
    for column, parts in beside.items():
        if any(part.strip() not in text for part in parts):
            raise SieveError(
                f"`{names}` of {where} is text without what stands in the column {column!r}. Pass messages, leave "
                f"the column out, or pass a calib_formatting_func that makes one text of them."
            )


def _read_token_ids(row: Mapping[str, Any], where: str) -> list[Sample]:
    """The samples of a row, of which a packed one has several."""
    ids = _expect_ints(row["input_ids"], "input_ids", where)
    if ids and min(ids) < 0:
        raise must_be(f"`input_ids` of {where}", "at least 0", min(ids))
    mask = [1] * len(ids)
    if row.get("attention_mask") is not None:
        mask = _expect_ints(row["attention_mask"], "attention_mask", where)
    if len(mask) != len(ids):
        lengths = f"{len(mask)} and `input_ids` the length {len(ids)}"
        raise SieveError(f"`attention_mask` of {where} has the length {lengths}. They must be the same.")
    # Padding at either end goes, so that cutting to max_length keeps tokens and batches carry no foreign padding.
    samples = samples_of(mask, _positions(row, ids), _ends(row, ids, where))
    used = None if row.get("attention_mask") is None else [int(value != 0) for value in mask]
    return [TokenIds(ids[tokens], used and used[tokens]) for tokens in samples] or [TokenIds([])]


def _positions(row: Mapping[str, Any], ids: list[int]) -> list[int] | None:
    """The positions of tokens, if each has one: those in images have several."""
    positions: Any = row.get("position_ids")
    positions = positions.tolist() if hasattr(positions, "tolist") else positions
    fits = isinstance(positions, list | tuple) and len(positions) == len(ids)
    return list(positions) if fits and all(isinstance(position, int) for position in positions) else None


def _ends(row: Mapping[str, Any], ids: list[int], where: str) -> list[int]:
    """Where samples end, as TRL notes it when it packs them."""
    given: Any = row.get("seq_lengths")
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, list | tuple):
        return []
    lengths = _expect_ints(given, "seq_lengths", where)
    if sum(lengths) != len(ids) or min(lengths, default=0) < 0:
        raise SieveError(
            f"`seq_lengths` of {where} is {shown(lengths)}, and `input_ids` has {len(ids)} tokens. The lengths must "
            "add up to the number of tokens."
        )
    return list(accumulate(lengths))


def _check_nothing_processed(row: Mapping[str, Any], where: str) -> None:
    for column in row:
        lost = column in IMAGE_COLUMNS or (isinstance(column, str) and column.startswith(_PROCESSED))
        if lost and row[column] is not None:
            raise SieveError(
                f"{where} has `input_ids` and {column!r}, which a row of token ids would lose. Pass model-ready "
                "batches (dicts with 2-D `input_ids`), such as a DataLoader gives."
            )


def _expect_ints(value: Any, column: str, where: str) -> list[int]:
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        numbers = [operator.index(item) for item in value]
        np.asarray(numbers, dtype=np.int64)
        return numbers
    except (TypeError, OverflowError):
        advice = "Pass a 2-D tensor for a model-ready batch."
        raise must_be(f"`{column}` of {where}", "a flat list of integers", value, advice) from None


def _unknown_columns(row: Mapping[str, Any]) -> SieveError:
    names = [name for name in row if isinstance(name, str) and not {'"', "\\"} & set(repr(name))]
    named_ids = {name for name in names if name.lower() in ("id", "idx", "index") or name.lower().endswith("_id")}
    texts = [name for name in names if isinstance(row[name], str) and name not in named_ids]
    told = (texts or names)[:3] or ["column"]
    body = 'f"' + r"\n".join(f"{{row[{name!r}]}}" for name in told) + '"'
    for name in names:
        if isinstance(row[name], (list, tuple)) and row[name] and all(map(is_message, row[name])):
            body = f"row[{name!r}]"
    return SieveError(
        f"The calibration data has the columns {quoted(row)}, which fit none of the forms {ROW_FORMS}. Pass a "
        f"function that turns one row into text, e.g. `calib_formatting_func=lambda row: {body}`."
    )
