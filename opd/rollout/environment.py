"""Environments: what answers the student between its turns, such as tools or a simulator.

An environment is a pure function of a problem and of what the model has said about it so far. It keeps nothing about a
conversation, so nothing of it is saved with a checkpoint, a run that was stopped repeats its conversations, and any
process can compute any reply. An environment sees texts; token ids, masks and limits are the trainer's.

It is a class that a configuration names. Its module is imported and runs in this process, so a configuration with an
environment is as trusted as a program.
"""

import json
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

from opd.config import EnvironmentSection
from opd.errors import InputError, first_line

PARTS = ("version", "tools", "reply", "score")
ROLES = ("tool", "user")  # in whose name an environment speaks


@dataclass(frozen=True)
class Score:
    """The verdict on a conversation."""

    correct: bool  # everything that was asked holds
    share: float  # the share of what was asked that holds, in [0, 1]
    extracted: str | None = None  # the final answer; None where the model has delivered none
    parts: Mapping[str, bool] = field(default_factory=dict)  # whether each part of what was asked holds


@runtime_checkable
class Environment(Protocol):
    """Answers the turns of a model. It is made once per process, from the settings that the configuration names."""

    version: str  # stands beside every number; another version makes another run
    tools: Sequence[Mapping[str, Any]]  # schemas for the chat template; may be empty

    def reply(self, problem: Mapping[str, Any], turns: Sequence[str]) -> Sequence[Mapping[str, str]] | None:
        """What comes after the model's last turn; None where that turn was the final one.

        A call that is malformed, unknown or fails is answered with a message that says so. An exception is a fault of
        the environment, and it ends the conversation.

        Args:
            problem: all fields of the problem's row.
            turns: what the model has said, special tokens included, without the token that ends a turn.
        Returns:
            messages as {"role": "tool" or "user", "content": text}, at least one.
        """
        ...

    def score(self, problem: Mapping[str, Any], turns: Sequence[str]) -> Score:
        """The verdict on a conversation that has ended, for whatever reason."""
        ...


def load(section: EnvironmentSection | None) -> Environment | None:
    """The environment that a configuration names; the same one for the same name and settings.

    Raises InputError when it cannot be imported or made, or is no environment.
    """
    return None if section is None else _made(section.name, json.dumps(section.settings, sort_keys=True))


@cache
def _made(name: str, settings: str) -> Environment:
    where = f"environment {name!r}"
    try:
        kind = pkgutil.resolve_name(name)
    except Exception as error:  # the module is a program of its author: it can raise anything
        raise InputError(
            f"{where} cannot be imported ({type(error).__name__}: {first_line(error)}). Expected package.module:Class, "
            "importable from the folder in which the command is started."
        ) from error
    try:
        environment = kind(**json.loads(settings))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{where} cannot be made with the settings {settings[:200]} ({type(error).__name__}: {first_line(error)}). "
            "Check its settings, and the files that it reads."
        ) from error
    if not isinstance(environment, Environment):
        missing = [part for part in PARTS if not hasattr(environment, part)]
        raise InputError(f"{where} lacks {', '.join(missing)}. Expected what opd.rollout.environment.Environment says.")
    if not isinstance(environment.version, str) or not environment.version:
        raise InputError(f"{where} has the version {environment.version!r}, expected a text that is not empty.")
    try:
        json.dumps(list(map(dict, environment.tools)))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where} has tools that are no list of JSON objects ({first_line(error)}). Expected schemas of functions "
            "as chat templates take them."
        ) from None
    return environment


def checked_messages(said: Any) -> list[dict[str, str]]:
    """The messages of a reply. Raises TypeError or ValueError for what is no list of messages with text."""
    if not isinstance(said, Sequence) or isinstance(said, str) or not said:
        raise TypeError(f"reply returned {type(said).__name__} {repr(said)[:80]}, expected messages or None")
    messages = []
    for message in said:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise TypeError(f"reply returned the message {repr(message)[:80]}, expected one of the role tool or user")
        content = message.get("content")
        if not isinstance(content, str):
            raise TypeError(f"reply returned a message with the content {repr(content)[:80]}, expected a text")
        content.encode()  # raises for half of a character, which no tokenizer takes
        messages.append({"role": message["role"], "content": content})
    return messages


def checked_score(score: Any) -> Score:
    """The score itself. Raises TypeError or ValueError for what is none."""
    if not isinstance(score, Score) or not isinstance(score.correct, bool):
        raise TypeError(f"score returned {repr(score)[:80]}, expected an opd.rollout.environment.Score")
    if not (isinstance(score.share, int | float) and math.isfinite(score.share) and 0 <= score.share <= 1):
        raise ValueError(f"score returned the share {score.share!r}, expected a number in [0, 1]")
    if not isinstance(score.extracted, str | None):
        raise TypeError(f"score returned the answer {repr(score.extracted)[:80]}, expected a text or None")
    if not all(isinstance(name, str) and isinstance(holds, bool) for name, holds in score.parts.items()):
        raise TypeError(f"score returned the parts {repr(score.parts)[:80]}, expected names with True or False")
    return score
