"""The messages of a prompt, in the form that chat templates of transformers take.

A message has a role and a content: a text, or a list of text parts, which are put together because many templates leave
a list out without a word. An assistant's message may call tools, and a message of role `tool` holds what one returned.
"""

import json
from collections.abc import Mapping
from typing import Any

from opd.errors import InputError
from opd.files import parse_json


def read_messages(value: Any, field: str, where: str) -> tuple[Mapping[str, Any], ...]:
    """The messages that a field of a problem holds; a text is one message of the user.

    Raises InputError that begins with `where` and names the field and the message.
    """
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if isinstance(value, list) and value:
        return tuple(_message(item, f"{where}: field {field!r}, message {n}") for n, item in enumerate(value, 1))
    raise InputError(
        f"{where}: field {field!r} is {_short(value)}, expected a non-empty string or a list of "
        '{"role": ..., "content": ...} messages.'
    )


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise InputError(f'{where} is {_short(item)}, expected {{"role": ..., "content": ...}}.')
    message = {**item, "content": item.get("content")}
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = _tool_calls(calls, where)
    if isinstance(message["content"], list):
        message["content"] = "".join(_text(part, f"{where}, part {n}") for n, part in enumerate(message["content"], 1))
    if not isinstance(message["content"], str) and not (message["content"] is None and calls):
        raise InputError(
            f'{where} has the content {_short(message["content"])}, expected a text or a list of {{"type": "text", '
            '"text": ...} parts. Only a message with tool_calls may lack it.'
        )
    return message


def _text(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InputError(
            f'{where} is {_short(part)}, expected {{"type": "text", "text": ...}}. Models read text alone.'
        )
    return part["text"]


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects. Many data sets hold them as JSON texts, as the API of OpenAI does."""
    expected = 'a list of {"type": "function", "function": {"name": ..., "arguments": {...}}}'
    if not isinstance(calls, list):
        raise InputError(f"{where} has the tool_calls {_short(calls)}, expected {expected}.")
    checked = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{where} has the tool call {_short(call)}, expected {expected}.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{where}, arguments of {function['name'][:80]!r}", "a JSON object")
        if not isinstance(arguments, dict):
            raise InputError(f"{where} calls {function['name'][:80]!r} with {_short(arguments)}, expected an object.")
        function = function | {"arguments": arguments}
        checked.append({**call, "function": function} if "function" in call else function)
    return checked


def _short(value: Any) -> str:
    """The beginning of a value for a message; a value of a parquet file may be one that JSON lacks."""
    return json.dumps(value, default=str)[:80]
