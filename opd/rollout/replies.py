"""What an environment says -> the token ids between two turns of a model.

The model's own turns are never rendered: a chat template may change them, and another spelling in tokens would not be
what the model sampled. So the template renders the messages behind a marked turn, and the text behind the mark is cut
at the token that ends the turn. That token is the model's; what comes after it is the environment's, up to the place
where the next turn begins. The messages of one reply are rendered together, because some templates group them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.errors import InputError, first_line

MARK = "this turn is cut away"
SHORTEST = 2  # characters of an added token that can be broken by a space


class Replies:
    """Renders the messages of an environment with a tokenizer's chat template.

    Args:
        eos_ids: what ends a turn.
        arguments: further variables of the chat template.
    Raises:
        InputError: the template does not render a conversation, or its turns do not end in an EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], arguments: Mapping[str, Any]):
        self.tokenizer, self.eos_ids, self.arguments = tokenizer, frozenset(eos_ids), arguments
        added = [token for token in tokenizer.get_added_vocab() if len(token.strip()) >= SHORTEST]
        longest_first = sorted(added, key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.longest_token = max(map(len, tokenizer.get_vocab()))  # in characters
        ids = self._behind_the_mark([{"role": "user", "content": "?"}])
        self.end_id = ids[self._end(ids)]  # what ends a turn that can be answered

    def ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[tuple[int, ...], int]:
        """The ids behind the end of a turn, up to the beginning of the next one.

        Texts of added tokens in the messages are neutralised: no control token comes from what a tool says. The number
        of these texts is returned beside the ids.
        """
        safe, neutralised = [], 0
        for message in messages:
            content, count = self.neutral(message["content"])
            safe.append({"role": message["role"], "content": content})
            neutralised += count
        ids = self._behind_the_mark(safe)
        return tuple(ids[self._end(ids) + 1 :]), neutralised

    def neutral(self, text: str) -> tuple[str, int]:
        """The text with a space inside every text of an added token, and how many these are."""
        count = 0
        while self.added.search(text):  # a space can leave another one, which overlapped
            text, broken = self.added.subn(_broken, text)
            count += broken
        return text, count

    def is_longer_than(self, messages: Sequence[Mapping[str, str]], tokens: int) -> bool:
        """Whether messages have more characters than so many of the longest tokens. This bounds what is tokenised."""
        return sum(len(message["content"]) for message in messages) > tokens * self.longest_token

    def _behind_the_mark(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        marked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}, *messages]
        try:
            text = self.tokenizer.apply_chat_template(
                marked, add_generation_prompt=True, tokenize=False, **self.arguments
            )
        except Exception as error:  # a template is a program of the checkpoint's author: it can raise anything
            raise InputError(
                f"the chat template refuses what an environment says ({first_line(error)}). It must take a message of "
                f"the role {messages[-1]['role']} after the assistant's. Set student.chat_template, or let the "
                "environment speak in another role."
            ) from error
        _, mark, tail = text.partition(MARK)
        if not mark:
            raise InputError(
                "the chat template leaves out what the assistant says, so an environment's place cannot be found. Set "
                "student.chat_template to another one."
            )
        return self.tokenizer.encode(tail, add_special_tokens=False)

    def _end(self, ids: Sequence[int]) -> int:
        """The place of the token that ends the marked turn."""
        for place, token in enumerate(ids):
            if token in self.eos_ids:
                return place
        raise InputError(
            f"the chat template ends a turn with {self.tokenizer.decode(ids[:8])[:80]!r}, in which no token is one of "
            f"the student's EOS tokens {sorted(self.eos_ids)}. So an environment would never hear that a turn is over. "
            "Add that token to eos_token_id of the checkpoint's generation_config.json."
        )


def _broken(match: re.Match[str]) -> str:
    """The text of an added token with a space behind its first character that is not a space itself.

    A space in front of the token would leave it whole.
    """
    text = match[0]
    first = len(text) - len(text.lstrip()) + 1
    return f"{text[:first]} {text[first:]}"
