"""Conversations as a chat template renders them, and a look at what it leaves out."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import ProcessorMixin

from ...checks import one_line
from ...errors import SieveError
from .conversations import Conversation, tool_names

_SYSTEM = ("system", "developer")
_SPOKEN = ("content", "tool_calls", "function_call")
# Keys that a template may show or not without a turn being lost; earlier turns lose their reasoning.
_ASIDE = ("role", "name", "id", "tool_call_id", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class _Piece:
    """A part of a turn that was given a sign."""

    sign: str
    turn: int
    key: str


class ChatRenderer:
    """Renders conversations with the template of a tokenizer or a processor, as TRL does.

    Args:
        tokenizer: what the user passed, whose own template comes first.
        text_tokenizer: the tokenizer in it.
    """

    def __init__(self, tokenizer: Any, text_tokenizer: Any):
        own = getattr(tokenizer, "chat_template", None) is not None and hasattr(tokenizer, "apply_chat_template")
        self.owner = tokenizer if own else text_tokenizer
        self.name = type(tokenizer).__name__
        self.left_out: list[str] = []

    def token_ids(self, conversation: Conversation) -> list[int]:
        """The token ids of a conversation.

        Raises:
            SieveError: there is no template, it failed, or it does not show a turn.
        """
        encoded = self._rendered(conversation, tokenize=True, return_dict=True)
        ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        self._look_for_losses(conversation)
        return ids[0] if ids and isinstance(ids[0], list) else ids  # a processor answers with a batch of one

    def text(self, conversation: Conversation) -> str:
        """The text of a conversation, with a placeholder for every image.

        Raises:
            SieveError: as `token_ids`.
        """
        rendered = self._rendered(conversation, tokenize=False)
        self._look_for_losses(conversation)
        return rendered

    def warn(self) -> None:
        """Say once what templates left out of the conversations so far, where they meant to."""
        if self.left_out:
            warnings.warn(
                f"The chat template does not show {self.left_out[0]}"
                + (f", nor {len(self.left_out) - 1} other parts of the data" if len(self.left_out) > 1 else "")
                + ". The calibration goes without them, as training with this template does.",
                UserWarning,
            )

    def _rendered(self, conversation: Conversation, **options: Any) -> Any:
        messages: list[dict[str, Any]] = conversation.messages
        if isinstance(self.owner, ProcessorMixin):  # their templates go through the parts of a content
            messages = [_in_parts(message) for message in messages]
        try:
            return self.owner.apply_chat_template(messages, **options, **conversation.template_kwargs)
        except Exception as error:
            if getattr(self.owner, "chat_template", None) is None:
                raise SieveError(
                    f"The calibration data are messages, but {self.name} has no chat template. Set "
                    "tokenizer.chat_template, or pass a calib_formatting_func that returns text."
                ) from error
            problem = f"{type(error).__name__}: {one_line(error)}"
            raise SieveError(f"The chat template failed on {conversation.where}. {problem}.") from error

    def _look_for_losses(self, conversation: Conversation) -> None:
        """Refuse turns of which nothing is shown, and note what is left out of others.

        A system prompt may be left out on purpose: some templates show it only in certain places.

        Every part of a turn gets a sign, which the rendered text must have: whatever else a template does to a part
        (trim it, drop its reasoning, write it as JSON), the part was shown.
        """
        messages, pieces = _with_signs(conversation.messages)
        try:
            text = self._rendered(replace(conversation, messages=messages), tokenize=False)
        except SieveError:
            return  # without the signs it worked
        if not isinstance(text, str):
            return
        shown = {piece.turn for piece in pieces if piece.sign in text}
        for piece in pieces:
            if piece.sign in text:
                continue
            role, turn = conversation.roles[piece.turn], f"turn {piece.turn} of {conversation.where}"
            if piece.turn not in shown and not (role in _SYSTEM and self._asks_for(role)):
                raise SieveError(
                    f"The chat template shows nothing of {turn} (role {role!r}, key {piece.key!r}). Use a role and a "
                    "form that the template knows, or leave such turns out with a calib_formatting_func that returns "
                    "messages."
                )
            self.left_out.append(f"`{piece.key}` of {turn} ({role})")
        missing = [name for name in tool_names(conversation.template_kwargs.get("tools")) if name not in text]
        if missing:
            self.left_out.append(f"the tool {missing[0]!r} of {conversation.where}")

    def _asks_for(self, role: str) -> bool:
        """Whether the template has `message['role'] == 'system'` or the like, and leaves turns out knowingly."""
        given = self.owner.chat_template
        templates = given.values() if isinstance(given, Mapping) else [given]
        return any(re.search(rf"role[^%{{}}]*['\"]{role}['\"]", str(template)) for template in templates)


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_signs(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[_Piece]]:
    """The messages with a sign in every part, and which sign stands where."""
    made: list[dict[str, Any]] = []
    pieces: list[_Piece] = []
    for turn, message in enumerate(messages):
        signed = dict(message)
        keys = [key for key in _SPOKEN if key in message] or [key for key in message if key not in _ASIDE]
        for key in keys:
            sign = f"zq{len(pieces)}qz"
            value = _signed(message[key], sign)
            if value is not None:
                signed[key] = value
                pieces.append(_Piece(sign, turn, key))
        made.append(signed)
    return made, pieces


def _signed(value: Any, sign: str) -> Any:
    """A value with the sign in its text, or in the name of the function that it calls; None if it has neither."""
    if isinstance(value, str):
        return value + sign if value.strip() else None
    if isinstance(value, Mapping):
        for key in ("function", "name", "text"):
            inner = _signed(value.get(key), sign)
            if inner is not None:
                return {**value, key: inner}
        return None
    if isinstance(value, list | tuple):
        items = [_signed(item, sign) for item in value]
        if all(item is None for item in items):
            return None
        return [old if new is None else new for old, new in zip(value, items, strict=True)]
    return None
