"""The tool calls in a model's turn, in the format of Qwen and Hermes: JSON between <tool_call> and </tool_call>."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.errors import InputError
from opd.files import NotJson, parse_json

BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.S)
EXPECTED = '{"name": ..., "arguments": {...}}'


@dataclass(frozen=True)
class Call:
    """A call, or the fault for which it is none."""

    name: str = ""
    arguments: Any = None
    fault: str | None = None


def spoken(turn: str) -> str:
    """What a turn says behind its thinking. A turn that is still thinking at its end says nothing."""
    said = turn.rpartition("</think>")[2]
    return "" if "<think>" in said else said


def parse_calls(turn: str) -> list[Call]:
    """The calls of a turn, in order. A block that is no call becomes a Call with a fault, never an exception."""
    return [_parse(block) for block in BLOCK.findall(spoken(turn))]


def _parse(block: str) -> Call:
    try:
        value = parse_json(block, "tool call", EXPECTED)
    except InputError as error:
        return Call(fault=str(error))
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return Call(fault=f"tool call: no text 'name' in it. Expected {EXPECTED}.")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # as in the format of OpenAI, where the arguments are a JSON text
        try:
            arguments = parse_json(arguments, "tool call", EXPECTED)
        except NotJson:
            arguments = {}
        except InputError as error:
            return Call(fault=str(error))
    return Call(value["name"], arguments)
