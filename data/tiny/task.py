"""The task of the embedded pair: left-to-right chains of four operations on digits, modulo 10.

A problem is `8*6-5-2-3 mod10?`. A response works it out step by step with style words that change nothing,
`okay first 8*6=8`, and ends in `answer \\boxed{8}`. A student trained on corrupted responses makes both kinds of
mistakes that the taxonomy of TIP names: a *misconception* (confident and wrong, Q3) and *carelessness* (uncertain and
wrong, Q1); style words are uncertain and right (Q2), copies are solved (Q4).
It is a constructed testbed: it shows the mechanism and says nothing about large models.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

OPERATIONS = 4
MOODS = ("okay ", "hmm ")
ORDERS = ("first ", "then ", "next ", "so ", "now ", "thus ")
WORDS = (
    *"0123456789",
    *"+-*=",
    " mod10",
    "?",
    *MOODS,
    *ORDERS,
    "\n",
    "answer ",
    "\\boxed{",
    "}",
    "user",
    "assistant",
    "system",
)
PAD, UNKNOWN, START, END = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Speaker:
    """How one model's training text is drawn: style-word probabilities, and whether its arithmetic is corrupted."""

    moods: tuple[float, ...]
    orders: tuple[float, ...]
    corrupt: bool


TEACHER = Speaker((0.75, 0.25), (0.30, 0.25, 0.15, 0.15, 0.10, 0.05), corrupt=False)
STUDENT = Speaker((0.60, 0.40), (0.20, 0.20, 0.15, 0.20, 0.15, 0.10), corrupt=True)


def problem(rng: random.Random) -> str:
    """Draws a problem; operands and operators uniform (8.1 million different ones)."""
    text = str(rng.randrange(10))
    for _ in range(OPERATIONS):
        text += rng.choice("+-*") + str(rng.randrange(10))
    return text + " mod10?"


def apply(a: int, operator: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


def answer(text: str) -> int:
    """The right answer of a problem."""
    value = int(text[0])
    for i in range(OPERATIONS):
        value = apply(value, text[1 + 2 * i], int(text[2 + 2 * i]))
    return value


def response(text: str, speaker: Speaker, rng: random.Random) -> str:
    """A worked response in the speaker's words, mistakes included; 36 tokens and the end token."""
    value, lines = int(text[0]), []
    for i in range(OPERATIONS):
        a, operator, b = value, text[1 + 2 * i], int(text[2 + 2 * i])
        value = apply(a, operator, b)
        if speaker.corrupt and operator == "*" and b >= 6:
            value = (value + 1) % 10  # the misconception: always
        if speaker.corrupt and operator == "-" and b > a and rng.random() < 0.5:
            value = b - a  # carelessness: every other time
        mood = rng.choices(MOODS, speaker.moods)[0]
        order = rng.choices(ORDERS, speaker.orders)[0]
        lines.append(f"{mood}{order}{a}{operator}{b}={value}\n")
    return "".join(lines) + f"answer \\boxed{{{value}}}"


def row(rng: random.Random) -> dict[str, str]:
    """Draws a problem as a row without an id."""
    text = problem(rng)
    return {"problem": text, "answer": str(answer(text))}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per symbol or word, 35 ids."""
    return tokenizer_of(WORDS, 128)


def tokenizer_of(words: Sequence[str], context: int) -> PreTrainedTokenizerFast:
    """A real Hugging Face tokenizer of these words with a chat template, exact both ways."""
    special = (PAD, UNKNOWN, START, END)
    vocabulary = {word: i for i, word in enumerate((*special, *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join("".join(f"\\{c}" if not c.isalnum() and c not in " \n" else c for c in w) for w in longest_first)
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    result = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=context,
        padding_side="left",
    )
    result.chat_template = CHAT_TEMPLATE
    return result
