"""Do training problems stand in an evaluation set? `python -m data.contamination TRAIN EVAL [EVAL ...]`

Two texts overlap when they share at least half of the 10-word spans of the shorter one, or are equal. Words are
lower-cased `\\w+`; Chinese has no spaces, so each of its characters is a word. A paraphrase or a translation passes.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.commands import COMMANDS
from data.sources import BOXED
from opd.cli import main, say
from opd.data import read_problems
from opd.errors import InputError
from opd.files import write_whole

SPAN = 10
THRESHOLD = 0.5


@dataclass(frozen=True)
class Overlap:
    train_id: str
    eval_id: str
    share: float  # of the spans of the shorter text; 1.0 for equal texts
    train_text: str
    eval_text: str


def words(text: str) -> list[str]:
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower())


def spans(text: str) -> frozenset[tuple[str, ...]]:
    """Distinct 10-word spans; a shorter text is one span, so that equal short texts overlap."""
    found = words(text)
    return frozenset(tuple(found[i : i + SPAN]) for i in range(max(1, len(found) - SPAN + 1)))


def overlaps(train: Sequence[tuple[str, str]], evaluation: Sequence[tuple[str, str]]) -> list[Overlap]:
    """All overlapping pairs of (id, text) rows, in training order."""
    eval_spans = [spans(text) for _, text in evaluation]
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, found in enumerate(eval_spans):
        for span in found:
            where[span].append(number)
    pairs = []
    for train_id, text in train:
        own = spans(text)
        shared = Counter(number for span in own for number in where.get(span, ()))
        for number, count in sorted(shared.items()):
            share = count / min(len(own), len(eval_spans[number]))
            if share >= THRESHOLD:
                pairs.append(Overlap(train_id, evaluation[number][0], share, text, evaluation[number][1]))
    return pairs


def texts(path: str | Path, prompt_field: str = "prompt") -> list[tuple[str, str]]:
    """(id, text) of the problems of a source, without the instruction that preparation adds to training prompts."""
    problems = read_problems(path, prompt_field, None)
    return [(p.id, "\n".join((m["content"] or "").removesuffix(BOXED) for m in p.messages)) for p in problems]


def command(arguments: list[str]) -> None:
    options = COMMANDS["contamination"].parser().parse_args(arguments)
    if options.out and options.out.exists() and not options.out.is_file():
        raise InputError(f"--out {options.out}: it is a folder or a device, expected a file. Give the name of a file.")
    train = texts(options.train, options.field)
    found = [pair for path in options.evaluation for pair in overlaps(train, texts(path, options.field))]
    rows = len({pair.train_id for pair in found})
    say(f"{rows} of {len(train)} training problems overlap {len({p.eval_id for p in found})} evaluation problems")
    if options.out:
        try:
            write_whole(options.out, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in found))
        except OSError as error:
            raise InputError(f"--out {options.out}: cannot be written ({error.strerror}).") from None
    print(rows)


if __name__ == "__main__":
    main(command)
