"""The data of the token map, packed so that a browser opens a million tokens in a moment, and the page around it.

The page is `token_map.html`. What it shows lies in it as *blobs*: zlib-compressed, in base64, one element each, which
the page unpacks when it needs them. So a model's text is never markup and never script.

    strings         every different text of a token or a prompt, as JSON
    columns-R-U     the columns of all tokens of update U of run R, one after another (`columns_of`, then the marks)
    top5-R-U-K      the five likeliest tokens of student and teacher at every token of rollout K: numbers, probabilities
    about           everything else, as JSON

Numbers are little-endian. Shapes: n tokens of a rollout; N tokens of an update; b bytes of marks per token.
"""

import base64
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import nlargest
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from opd.errors import InputError
from opd.files import check, step_number
from opd.record import dump
from opd.record.dump import MODELS
from opd.record.metrics import read_metrics
from tip.divergences import DIVERGENCES, Divergence
from tip.results.figures import QUADRANT_COLOURS
from tip.results.runs import axis_of

PAGE = Path(__file__).with_name("token_map.html")
LIKELIEST = 5
MISTAKES = 200  # how many confident mistakes of a run are listed
BEFORE, AFTER = 12, 4  # tokens of context around a listed mistake


@dataclass(frozen=True)
class Rollout:
    """What the page lists of a rollout."""

    id: str
    tokens: int
    prompt: int  # string number
    teacher_prompt: int | None  # string number; None: the teacher reads the same
    answer: str | None
    verdict: float | None  # 1 right, 0 wrong, an environment's share; None: unknown
    replies: tuple[tuple[int, int], ...]  # place of a token, and string number of what an environment said before it


@dataclass(frozen=True)
class Mistake:
    """A confident mistake: a token of quadrant 3, with its place and its context."""

    size: float  # KL(P_T || P_S) (1 - h), the score of the rule q3 before its axis is mapped to [0, 1]
    update: int  # places in the lists of the page
    rollout: int
    token: int
    before: str
    text: str
    after: str
    teacher: str  # the teacher's likeliest token


@dataclass(frozen=True)
class Update:
    """What the page knows of the dumped tokens of an update before it unpacks its columns."""

    step: int
    thresholds: tuple[float, float] | None  # of h and of d; None: they were not logged
    share: tuple[float, ...]  # of the tokens, by quadrant
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class MappedRun:
    """A run on the page."""

    name: str
    divergence: Divergence  # what d is
    vocab_size: int
    marks: tuple[str, ...]  # `<rule>@<retention>`, or `<rule>`: bit i of the marks of a token
    updates: tuple[Update, ...]
    mistakes: tuple[Mistake, ...]


class Packer:
    """Packs the dumps of runs, one after another, and writes the page."""

    def __init__(self) -> None:
        self.number_of: defaultdict[str, int] = defaultdict(lambda: len(self.number_of))  # of every different text
        self.blobs, self.runs = {}, []

    def add(
        self,
        name: str,
        dumps: Iterable[tuple[int, Iterable[dict[str, Any]]]],
        thresholds: Mapping[int, tuple[float, float]],
        axis: str,
    ) -> None:
        """Adds a run.

        Args:
            name: what the page calls it.
            dumps: per dumped update its number and the rollouts of its dump (opd.record.dump), one or more.
            thresholds: number of an update -> thresholds of its quadrants.
            axis: its tip.axis, which names the column of d.
        """
        marks, vocab_size, updates, mistakes = (), 0, [], []
        for step, rollouts in dumps:
            place, listed, columns = (len(self.runs), len(updates)), [], []
            for row in rollouts:
                marks = tuple(key.removeprefix("keep/") for key in row if key.startswith("keep/"))
                vocab_size = row["vocab_size"]
                mistakes += _mistakes(row, len(updates), len(listed))
                self.blobs["top5-{}-{}-{}".format(*place, len(listed))] = self._likeliest(row)
                columns.append(self._columns(row, axis, marks))
                listed.append(self._rollout(row))
            joined = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
            self.blobs["columns-{}-{}".format(*place)] = packed(b"".join(column.tobytes() for column in joined))
            counts = np.bincount(joined[-2], minlength=5)[1:]
            share = tuple((counts / max(counts.sum(), 1)).tolist())
            updates.append(Update(step, thresholds.get(step), share, tuple(listed)))
            mistakes = nlargest(MISTAKES, mistakes, key=lambda mistake: mistake.size)
        run = MappedRun(name, DIVERGENCES[axis], vocab_size, marks, tuple(updates), tuple(mistakes))
        self.runs.append(run)

    def _rollout(self, row: Mapping[str, Any]) -> Rollout:
        privileged = row.get("teacher_prompt")
        return Rollout(
            id=str(row["id"]),
            tokens=len(row["tokens"]),
            prompt=self.number_of[row["prompt"]],
            teacher_prompt=None if privileged is None else self.number_of[privileged],
            answer=row["answer"],
            verdict=next(iter(row.get("verdict", [])), None),
            replies=self._replies(row),
        )

    def _replies(self, row: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        """As Rollout.replies. Dumps of runs without environments may lack them."""
        replies, turns = row.get("replies", {}), row.get("turn", [])
        begins = {str(turn): place for place, turn in reversed(list(enumerate(turns)))}
        return tuple((begins[turn], self.number_of[text]) for turn, text in replies.items() if turn in begins)

    def page(self, title: str) -> str:
        """The HTML page."""
        about = {"title": title, "runs": [asdict(run) for run in self.runs]}
        blobs = self.blobs | {
            "strings": packed(json.dumps(list(self.number_of)).encode()),
            "about": packed(json.dumps(about).encode()),
        }
        data = "".join(f'<script type="text/plain" id="blob-{name}">{blob}</script>\n' for name, blob in blobs.items())
        colours = " ".join(f"--q{q}: {colour};" for q, colour in QUADRANT_COLOURS.items())
        return PAGE.read_text(encoding="utf-8").replace("/* colours */", colours).replace("<!-- data -->", data)

    def _columns(self, row: Mapping[str, Any], axis: str, marks: Sequence[str]) -> list[np.ndarray]:
        """Texts (n,) uint32, numbers (n,) float32 each, quadrants (n,) uint8, and marks, (n, b) uint8."""
        texts = np.array([self.number_of[text] for text in row["tokens"]], "<u4")
        numbers = [np.array(row[name], "<f4") for name in columns_of(axis)]
        kept = np.array([row[f"keep/{label}"] for label in marks], np.uint8).reshape(len(marks), len(texts))
        bits = np.packbits(kept.T, axis=1, bitorder="little")
        return [texts, *numbers, np.array(row["quadrant"], np.uint8), bits]

    def _likeliest(self, row: Mapping[str, Any]) -> str:
        """Per model the string numbers, (n, 5) uint32, then their probabilities, (n, 5) uint16 of 65,535."""
        count = len(row["tokens"])
        numbers = np.zeros((len(MODELS), count, LIKELIEST), "<u4")
        probabilities = np.zeros((len(MODELS), count, LIKELIEST), "<u2")
        for m, model in enumerate(MODELS):
            for i, likeliest in enumerate(row[f"{model}_top5"]):
                for k, (text, probability) in enumerate(likeliest):
                    numbers[m, i, k], probabilities[m, i, k] = self.number_of[text], round(65535 * probability)
        return packed(numbers.tobytes() + probabilities.tobytes())


def columns_of(axis: str) -> tuple[str, ...]:
    """The columns of numbers; the page knows their order."""
    return ("student_entropy", axis, "forward_kl", "score", "weight")


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def _mistakes(row: Mapping[str, Any], update: int, rollout: int) -> list[Mistake]:
    """The tokens of quadrant 3 of a dumped rollout."""
    tokens, found = row["tokens"], []
    for i, quadrant in enumerate(row["quadrant"]):
        if quadrant == 3:
            size = row["forward_kl"][i] * (1 - row["student_entropy"][i] / math.log(row["vocab_size"]))
            before, after = "".join(tokens[max(0, i - BEFORE) : i]), "".join(tokens[i + 1 : i + 1 + AFTER])
            found.append(Mistake(size, update, rollout, i, before, tokens[i], after, row["teacher_top5"][i][0][0]))
    return found


class Marked(TypedDict):
    """The columns of tip that the page needs; `keep/<rule>@<retention>` stand beside them."""

    quadrant: list[int]
    score: list[float]
    turn: NotRequired[list[int]]
    verdict: NotRequired[list[float | None]]
    teacher_prompt: NotRequired[str | None]
    replies: NotRequired[dict[str, str]]


def dumped_updates(run_dir: Path) -> list[Path]:
    """The token dumps of a run, the earliest first."""
    paths = (path for path in (run_dir / "tokens").glob("step_*.jsonl") if step_number(path) is not None)
    return sorted(paths, key=step_number)


def can_be_mapped(run_dir: Path) -> bool:
    """Whether a run has token dumps, and with the columns of tip, which runs of opd.train lack."""
    paths = dumped_updates(run_dir)
    return bool(paths) and "quadrant" in next(dump.rows(paths[0]), {})


def page_of(runs: Mapping[str, Path], title: str, rollouts: int | None = None) -> str:
    """The page of some runs, by the names that it gives them.

    Args:
        rollouts: of each update only the first so many; None shows all.
    Raises:
        InputError: a run has no token dump, or one that cannot be read or lacks the columns of tip.
    """
    packer = Packer()
    for name, folder in runs.items():
        paths = dumped_updates(folder)
        if not paths:
            raise InputError(
                f"{folder}: no token dumps in it. Train with tip.train and log.token_dump_every above 0, for example "
                "--set log.token_dump_every=10."
            )
        axis = axis_of(folder)
        dumps = ((step_number(path), _marked(path, axis, rollouts)) for path in paths)
        packer.add(name, dumps, _thresholds(folder), axis)
    return packer.page(title)


def _marked(path: Path, axis: str, rollouts: int | None) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(islice(dump.rows(path), rollouts), 1):
        if "quadrant" not in row:
            raise InputError(
                f"{path}: no quadrants in it, because opd.train wrote it. Train with tip.train, which does the same "
                "with --set tip.rule=all."
            )
        where = f"{path}, rollout {number}"
        check(row, Marked, where, "a token dump of tip.train")
        check(row.get(axis), list[float], f"{where}: {axis}", "a token dump of a run with this tip.axis")
        for name, column in row.items():
            if name.startswith("keep/"):
                check(column, list[int], f"{where}: {name[:80]}", "a token dump of tip.train")
        yield row


def _thresholds(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Number of an update -> the thresholds of its quadrants, where they were logged."""
    names = ("tip/threshold_entropy", "tip/threshold_divergence")
    return {int(row["step"]): tuple(row[n] for n in names) for row in read_metrics(run_dir) if row.keys() >= set(names)}
