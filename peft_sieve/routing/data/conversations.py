"""The conversation that a row holds, in the words of chat templates, with the system prompt and the tools beside it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...checks import must_be, one_line, shown
from ...errors import SieveError

MESSAGES = "a list of messages (dicts with `role` and `content`)"

# Who speaks in ShareGPT's `from`, as LLaMA-Factory and axolotl read it; others keep their name.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_CALL = "function_call"


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template, with the keyword arguments that their row gives it.

    Attributes:
        messages: as chat templates take them.
        roles: of each, as the row names it.
        where: names the row in errors.
        template_kwargs: tools, and others that the template may know.
    """

    messages: list[dict[str, Any]]
    roles: list[str]
    where: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def is_message(value: Any) -> bool:
    """Whether `value` is one turn of a conversation."""
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def conversation(value: Any, column: str, row: Mapping[str, Any], where: str) -> Conversation:
    """The messages of a column, and what the columns beside it add: `system`, `tools` and `chat_template_kwargs`.

    Args:
        value: the messages.
        column: where they come from, for errors.
        row: the whole row.
        where: names the row in errors.

    Raises:
        SieveError: they are not messages, or a column beside them cannot be read.
    """
    if not isinstance(value, (list, tuple)) or not all(is_message(message) for message in value):
        raise must_be(f"`{column}` of {where}", MESSAGES, value)
    messages = [_turn(message, f"turn {i} of {where}") for i, message in enumerate(value)]
    roles = [message["role"] if message.get("from") is None else message["from"] for message in value]
    system = row.get("system")
    # As in LLaMA-Factory and axolotl, a system turn wins over the column.
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
        roles.insert(0, "system")
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise must_be(f"`chat_template_kwargs` of {where}", "a mapping", kwargs)
    return Conversation(messages, roles, where, {"tools": read_tools(row, where), **kwargs})


def read_tools(row: Mapping[str, Any], where: str) -> Any:
    """The tools of a row, also if they are JSON; None if there are none.

    Raises:
        SieveError: they are a str that is not JSON.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):  # TRL takes them as JSON too
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise SieveError(f"`tools` of {where} is not JSON. {one_line(error)}.") from error
    return tools


def tool_names(tools: Any) -> list[str]:
    """The names of the tools that are described as mappings."""
    described = [tool for tool in tools if isinstance(tool, Mapping)] if isinstance(tools, Sequence) else []
    names = [_called(tool).get("name") for tool in described]
    return [name for name in names if isinstance(name, str)]


def _called(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a tool or a call says of its function, with or without OpenAI's wrapping."""
    inner = call.get("function")
    return inner if isinstance(inner, Mapping) else call


def _turn(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One message with `role` and `content` or `tool_calls`."""
    # Arrow fills the keys that a message, or a part of it, lacks with None, which chat templates would print.
    plain = _without_none(message)
    if "from" in plain:
        plain["role"] = _SHAREGPT_ROLES.get(plain["from"], plain["from"])
        del plain["from"]
        if plain["role"] == _CALL and "tool_calls" not in plain:
            call = plain.pop("value", plain.pop("content", None))
            # Some templates want a content, too.
            return {**plain, "role": "assistant", "content": "", "tool_calls": _tool_calls(call, where)}
    if "value" in plain:
        plain["content"] = plain.pop("value")
    if not isinstance(plain.get("role"), str):
        raise must_be(f"The role in {where}", "a str", plain.get("role"))
    if isinstance(plain.get("content"), (list, tuple)):
        parts = plain["content"]
        plain["content"] = [_without_none(part) if isinstance(part, Mapping) else part for part in parts]
    return plain


def _without_none(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's text of one call or of several as chat templates take them."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
        made = []
        for call in calls if isinstance(calls, list) else [calls]:
            function = _called(call)
            arguments = function.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            made.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
        return made
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SieveError(
            f"The role of {where} is {_CALL!r}, but its text is not a call in JSON with `name` and `arguments`: "
            f"{shown(value)}."
        ) from error
