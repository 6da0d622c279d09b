"""Is a response right? The last \\boxed{...} of a response, compared with the reference answer.

Extraction and the plain cases (equal integers, equal text) are decided here; everything else is mathematics, and
math-verify does it, in worker processes with a time limit. What crashes or hangs a worker is *ungraded*: it is reported
as that and counts as wrong in every accuracy, for a model must not gain by answers that nobody can read. A worker is
`python -m opd.grading`: one JSON object per line in, one out.
"""

import ctypes
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

VERSION = "boxed-math-verify-0.9.0-3"  # written into every evaluation: a grader is part of what a number means
WORKER_BYTES = 4 * 2**30  # address space of a worker; beyond it, it fails instead of the machine


@dataclass(frozen=True)
class Verdict:
    extracted: str | None  # None: the response has no complete box
    correct: bool | None  # None: ungraded, because the grader crashed or ran out of time; counts as wrong


class Grader:
    """Grades responses in parallel; workers start when the first answer needs mathematics.

    Args:
        seconds: time limit of one comparison.
        workers: processes; None: one per core, at most 8.
    """

    def __init__(self, seconds: float = 10.0, workers: int | None = None):
        self.seconds = seconds
        self.size = workers or min(8, os.cpu_count() or 1)
        self.local = threading.local()  # a worker per thread of the pool
        self.workers: list[_Worker] = []
        self.pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None
        for worker in self.workers:
            worker.stop()
        self.workers.clear()

    def grade(self, pairs: Sequence[tuple[str, str]], answer_lines: bool = False) -> list[Verdict]:
        """Verdicts of (response, reference answer) pairs, in order.

        Args:
            answer_lines: without a box, take what follows the last line that starts with "Answer:".
        """
        extracted = [extract(response, answer_lines) for response, _ in pairs]
        answered = [i for i, answer in enumerate(extracted) if answer is not None]
        same = self.equivalent([(extracted[i], pairs[i][1]) for i in answered])
        correct = dict(zip(answered, same, strict=True))
        return [Verdict(answer, correct.get(i, False)) for i, answer in enumerate(extracted)]

    def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Whether (prediction, reference) are the same answer, None: ungraded; only what is not plain goes to a worker.

        Each is an expression, or a text whose last one counts.
        """
        same = [plainly_equal(*pair) for pair in pairs]
        open_ones = [i for i, verdict in enumerate(same) if verdict is None]
        for i, verdict in zip(open_ones, self._verify([pairs[i] for i in open_ones]), strict=True):
            same[i] = verdict
        return same

    def _verify(self, pairs: list[tuple[str, str]]) -> list[bool | None]:
        if not pairs:
            return []
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.size)
        return list(self.pool.map(self._verify_one, pairs))

    def _verify_one(self, pair: tuple[str, str]) -> bool | None:
        if not hasattr(self.local, "worker"):
            self.local.worker = _Worker()
            self.workers.append(self.local.worker)
        return self.local.worker.verify(*pair, self.seconds)


class _Worker:
    """One process that compares; replaced when it crashes or takes too long."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def verify(self, prediction: str, reference: str, seconds: float) -> bool | None:
        try:
            if self.process is None:
                self._start()
            line = json.dumps([prediction, reference]).encode() + b"\n"
            feeder = threading.Thread(target=self._feed, args=(self.process, line), daemon=True)
            feeder.start()  # a long line does not fit the pipe, and a stuck worker would not read it
            answer = self._read(time.monotonic() + seconds)
            return json.loads(answer)
        except (OSError, ValueError, EOFError, TimeoutError):
            self.stop()
            return None

    def _start(self) -> None:
        root = Path(__file__).resolve().parent.parent
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opd.grading"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._read(time.monotonic() + 120)  # it says when it has imported sympy

    @staticmethod
    def _feed(process: subprocess.Popen[bytes], line: bytes) -> None:
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except (OSError, ValueError):
            pass  # the reader notices: no answer comes

    def _read(self, until: float) -> bytes:
        answer = b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(self.process.stdout.fileno(), 65536)
            if not part:
                raise EOFError
            answer += part
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


def votes(problems: Sequence[Sequence[Verdict]], grader: Grader) -> list[list[str | None]]:
    """For every answer of every problem, the answer it votes for: the first of those that are held equal to it.

    None: there is no answer, or an empty one. Equal are: answers that are the same text without spaces; right answers,
    for all of them equal the reference; wrong ones that the grader holds equal. A pair that the grader gives up on is
    not equal, and an ungraded answer equals its own text alone: to compare it again may cost the whole time limit.
    """
    chosen: list[dict[str, str | None]] = []  # per problem: an answer without its spaces -> the answer it votes for
    waiting: list[list[str]] = []  # per problem: the different wrong answers that have no class yet
    for verdicts in problems:
        answered = [v for v in verdicts if v.extracted is not None and _bare(v.extracted)]
        written: dict[str, str] = {}  # an answer without its spaces -> as it was first written
        for verdict in answered:
            written.setdefault(_unspaced(verdict.extracted), verdict.extracted)
        right = {_unspaced(v.extracted) for v in answered if v.correct}
        wrong = {_unspaced(v.extracted) for v in answered if v.correct is False} - right
        all_right = next((answer for key, answer in written.items() if key in right), None)
        chosen.append({k: all_right if k in right else answer for k, answer in written.items() if k not in wrong})
        waiting.append([answer for key, answer in written.items() if key in wrong])
    while any(waiting):
        _one_class_each(chosen, waiting, grader)
    return [
        [None if v.extracted is None else known.get(_unspaced(v.extracted)) for v in verdicts]
        for known, verdicts in zip(chosen, problems, strict=True)
    ]


def _one_class_each(chosen: list[dict[str, str | None]], waiting: list[list[str]], grader: Grader) -> None:
    """The first waiting answer of every problem starts a class; the waiting ones that equal it join and wait no more.

    All problems' comparisons are made at once, so that they share the grader's workers.
    """
    pairs = [(i, answer, answers[0]) for i, answers in enumerate(waiting) for answer in answers[1:]]
    same = grader.equivalent([(answer, first) for _, answer, first in pairs])
    for known, answers in zip(chosen, waiting, strict=True):
        if answers:
            known[_unspaced(answers[0])] = answers[0]
            answers.clear()
    for (i, answer, first), equal in zip(pairs, same, strict=True):
        if equal:
            chosen[i][_unspaced(answer)] = first
        else:
            waiting[i].append(answer)


def _unspaced(answer: str) -> str:
    return answer.replace(" ", "")


def extract(response: str, answer_lines: bool = False) -> str | None:
    """The answer in what follows the thinking part; a response that is still thinking at its end has none."""
    thinking, _, rest = response.rpartition("</think>")
    said = rest if thinking or "<think>" not in rest else ""
    boxed = last_boxed(said)
    if boxed is None and answer_lines:
        lines = (line.strip(" \t*\r") for line in reversed(said.split("\n")))
        answers = (line[len("answer:") :].strip(" \t*") for line in lines if line.lower().startswith("answer:"))
        return next((answer for answer in answers if answer), None)
    return boxed


def last_boxed(text: str) -> str | None:
    """Content of the complete `\\boxed{...}` (or `\\fbox`) that starts last, braces nested; None when there is none.

    One pass: linear time in the length of the text, whatever is in it.
    """
    opened: list[int | None] = []  # for every open brace, where a box's content starts, or None for another brace
    best: tuple[int, int] | None = None
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\[{}\\]|[{}]", text):
        if token[0].endswith("{") and token[0] != "\\{":
            opened.append(token.end() if len(token[0]) > 1 else None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[slice(*best)].strip()


def plainly_equal(left: str, right: str) -> bool | None:
    """True or False where it is plain, None where it takes mathematics: equal text is equal, two integers compare."""
    a, b = _bare(left), _bare(right)
    if a == b:
        return True
    integer = r"[+-]?\d{1,18}"
    if re.fullmatch(integer, a) and re.fullmatch(integer, b):
        return int(a) == int(b)
    return None if a else False


def _bare(answer: str) -> str:
    return answer.strip().strip("$").strip()


def _work() -> None:
    """The worker: reads [prediction, reference], writes true or false. A failure ends it, and so is seen as one."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive a parent that was killed
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    sys.setrecursionlimit(3000)
    from math_verify import parse, verify

    def parsed(text: str) -> list:
        """Of a bare expression, the expression; of a text with marked mathematics, the last of it."""
        text = re.sub(r"\\\$|\\!", "", text).replace("{,}", ",")  # currency signs and thin spaces are no mathematics
        marked = re.search(r"\$|\\boxed|\\\(|\\\[|\\begin\{(?:equation|align)", text)
        return parse(text if marked else f"${text}$", parsing_timeout=None, raise_on_error=True)

    print("ready", flush=True)
    for line in sys.stdin:
        prediction, reference = json.loads(line)
        try:
            # no time limits inside: they are signals, and the process that waits has the only clock
            same = bool(verify(parsed(reference), parsed(prediction), timeout_seconds=None, raise_on_error=True))
        except Exception:  # sympy raises anything on strange input; the parent counts null as ungraded
            same = None
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    _work()
