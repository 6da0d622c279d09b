"""Conversations: the student and an environment take turns.

Any sampler draws the turns. All conversations of a batch take a turn together, and those that have ended leave. A turn
is kept as the ids that were sampled, and the environment's reply is appended to them as ids (opd/rollout/replies.py).
So a conversation is one sequence of ids with the spans of the model in it.

A turn begins only when a whole one fits: what is drawn for a conversation never depends on the others. Turn 0 has the
seed of a response without an environment; turn t has `("turn", t)` behind it.
"""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd import distributed
from opd.cli import say
from opd.config import DataSection, EnvironmentSection
from opd.data import Prompt, Rollout
from opd.errors import InputError
from opd.models import LanguageModel
from opd.rollout import Decoding, Sampler, environment
from opd.rollout.environment import Environment, Score, checked_messages, checked_score
from opd.rollout.replies import Replies

LIMITS = ("max_turns", "max_turn_tokens", "max_reply_tokens", "max_response_tokens")  # each can end a conversation
SHOWN = 2000  # characters of a traceback in a warning


@dataclass
class Conversation:
    """A conversation that goes on, or has ended."""

    place: int  # of its prompt among those that are answered
    prompt: Prompt
    seed: tuple[int | str, ...]
    ids: tuple[int, ...] = ()  # all behind the prompt
    turns: list[tuple[int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # what the model has said
    finish_reason: str | None = None  # None while it goes on
    limit: str | None = None
    neutralised: int = 0

    def end(self, finish_reason: str, limit: str | None = None) -> None:
        self.finish_reason, self.limit = finish_reason, limit

    @property
    def prompt_of_next_turn(self) -> Prompt:
        return replace(self.prompt, token_ids=self.prompt.token_ids + self.ids)

    @property
    def seed_of_next_turn(self) -> tuple[int | str, ...]:
        return (*self.seed, "turn", len(self.turns)) if self.turns else self.seed

    def rollout(self) -> Rollout:
        return Rollout(
            sequence_id=self.place,
            prompt=self.prompt,
            response_ids=self.ids,
            finish_reason=self.finish_reason,
            turns=tuple(self.turns),
            limit=self.limit,
            neutralised=self.neutralised,
        )


def open_dialogue(section: EnvironmentSection | None, lm: LanguageModel, data: DataSection) -> "Dialogue | None":
    """What answers a model; None where a response is one turn.

    Raises InputError for an environment that cannot be used, or not with the model's chat template.
    """
    answers = environment.load(section)
    return None if answers is None else Dialogue(answers, section, lm, data)


def _with_tools(data: DataSection, tools: Sequence[Mapping[str, Any]]) -> DataSection:
    """The section with the environment's tools among the variables of the chat template.

    Raises InputError where the section has tools of its own.
    """
    if not tools:
        return data
    if "tools" in data.chat_template_args:
        raise InputError(
            "data.chat_template_args sets 'tools', and the environment has tools of its own. Remove them from one."
        )
    return replace(data, chat_template_args=data.chat_template_args | {"tools": list(map(dict, tools))})


class Dialogue:
    """An environment with its limits, and a model's tokenizer with which both sides speak.

    Raises InputError where the chat template cannot place what the environment says.
    """

    def __init__(self, answers: Environment, limits: EnvironmentSection, lm: LanguageModel, data: DataSection):
        self.environment, self.limits, self.tokenizer = answers, limits, lm.tokenizer
        self.data = _with_tools(data, answers.tools)  # makes the prompts
        self.replies = Replies(lm.tokenizer, lm.eos_ids, self.data.chat_template_args)
        self.faults = 0  # how often the environment has raised

    def check(self, lm: LanguageModel) -> None:
        """Raises InputError for a model whose turns the environment would never answer."""
        if self.replies.end_id not in lm.eos_ids:
            token = self.tokenizer.convert_ids_to_tokens(self.replies.end_id)
            raise InputError(
                f"the chat template ends a turn with {token!r}, which is no EOS token of the {lm.name} (it has "
                f"{list(lm.eos_ids)}), so no turn of its would be answered. Add its id {self.replies.end_id} to "
                "eos_token_id of generation_config.json."
            )

    def texts(self, rollout: Rollout) -> list[str]:
        """What the model has said in each turn, special tokens included, without the token that ends a turn."""
        return [self._text(rollout.response_ids[first:end]) for first, end in rollout.turns]

    def score(self, rollout: Rollout) -> Score | None:
        """The environment's verdict; None where it could not answer or cannot judge."""
        if rollout.finish_reason == "error":
            return None
        texts = self.texts(rollout)
        try:
            return checked_score(self.environment.score(rollout.prompt.row, texts))
        except Exception:
            self._warn("score", rollout.prompt, len(texts))
            return None

    def hear(self, conversation: Conversation, drawn: Rollout) -> None:
        """Adds a turn that the model has taken. A turn without the end that the template gives it is the last."""
        first = len(conversation.ids)
        conversation.ids += drawn.response_ids
        conversation.turns.append((first, len(conversation.ids)))
        conversation.texts.append(self._text(drawn.response_ids))
        if drawn.finish_reason == "length":
            conversation.end("length", "max_turn_tokens")
        elif drawn.response_ids[-1] != self.replies.end_id:
            conversation.end("stop")

    def answer(self, conversations: Sequence[Conversation], most: int) -> None:
        """Lets the environment answer, or ends the conversations that have no next turn.

        The first process asks the environment, and all processes hear the same.

        Args:
            most: tokens of a whole conversation behind its prompt.
        """
        said = [self._ask(conversation) for conversation in conversations] if distributed.is_first() else []
        for conversation, reply in zip(
            conversations, json.loads(distributed.from_first(json.dumps(said))), strict=True
        ):
            if reply["ends"]:
                conversation.end(reply["ends"], reply["limit"])
            else:
                self._append(conversation, reply["messages"], most)

    def _ask(self, conversation: Conversation) -> dict[str, Any]:
        """What the environment answers, as plain data: how the conversation ends, or messages."""
        try:
            said = self.environment.reply(conversation.prompt.row, conversation.texts)
            messages = None if said is None else checked_messages(said)
        except Exception:  # an environment's fault must not end the run: it would end it again when it continues
            self._warn("reply", conversation.prompt, len(conversation.turns))
            return {"ends": "error", "limit": None}
        if messages is None:
            return {"ends": "stop", "limit": None}
        if len(conversation.turns) >= self.limits.max_turns:
            return {"ends": "turns", "limit": "max_turns"}
        if self.replies.is_longer_than(messages, self.limits.max_reply_tokens):
            return {"ends": "length", "limit": "max_reply_tokens"}
        return {"ends": None, "messages": messages}

    def _append(self, conversation: Conversation, messages: Sequence[Mapping[str, str]], most: int) -> None:
        """Appends a reply, where it fits and a whole turn fits behind it. So no conversation ends with a reply."""
        try:
            ids, neutralised = self.replies.ids(messages)
        except InputError:  # the template takes other replies: it was tried with one before the run began
            self._warn("reply", conversation.prompt, len(conversation.turns))
            return conversation.end("error")
        if len(ids) > self.limits.max_reply_tokens:
            conversation.end("length", "max_reply_tokens")
        elif len(conversation.ids) + len(ids) + self.limits.max_turn_tokens > most:
            conversation.end("length", "max_response_tokens")
        else:
            conversation.ids += ids
            conversation.neutralised += neutralised

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids[:-1] if ids[-1] in self.replies.eos_ids else ids)

    def _warn(self, method: str, prompt: Prompt, turn: int) -> None:
        """Tells of the first exception of the environment; the others are counted."""
        self.faults += 1
        if self.faults == 1:
            report = "".join(c if c.isprintable() or c == "\n" else "?" for c in traceback.format_exc()[-SHOWN:])
            say(
                f"warning: {method} of environment {self.limits.name} failed at problem {prompt.id} after turn {turn}. "
                "Its conversation counts as an error of the environment and is not learnt from; further ones are "
                f"counted and not shown.\n{report}"
            )


def converse(
    sampler: Sampler,
    dialogue: Dialogue | None,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    vocab_size: int,
    seeds: Sequence[tuple[int | str, ...]],
    advance: Callable[[int, int], None] = lambda responses, tokens: None,
) -> list[Rollout]:
    """As Sampler.sample, for conversations with an environment; without one it is the sampler's own answer.

    `decoding.max_response_tokens` bounds a whole conversation behind its prompt.
    """
    if dialogue is None:
        return sampler.sample(prompts, decoding, vocab_size, seeds, advance)
    one_turn = replace(decoding, max_response_tokens=dialogue.limits.max_turn_tokens)
    conversations = [Conversation(i, prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
    running = conversations
    while running:
        drawn = sampler.sample(
            [conversation.prompt_of_next_turn for conversation in running],
            one_turn,
            vocab_size,
            [conversation.seed_of_next_turn for conversation in running],
            lambda _, tokens: advance(0, tokens),
        )
        for conversation, turn in zip(running, drawn, strict=True):
            dialogue.hear(conversation, turn)
        dialogue.answer([c for c in running if c.finish_reason is None], decoding.max_response_tokens)
        going_on = [conversation for conversation in running if conversation.finish_reason is None]
        advance(len(running) - len(going_on), 0)
        running = going_on
    return [conversation.rollout() for conversation in conversations]
