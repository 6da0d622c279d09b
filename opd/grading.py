"""Grading: the last \\boxed{...} of a response, compared with the reference answer.

This file extracts answers and decides the plain cases, which are equal texts and pairs of integers. Everything else is
mathematics, and math-verify decides it in worker processes with a time limit. An answer that crashes or hangs a worker
is *ungraded*. It is reported as that and counts as wrong in every accuracy, because a model must not gain by answers
that nobody can read. A worker is `python -m opd.grading`; it reads and writes one line of JSON for each pair.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

VERSION = "boxed-math-verify-0.9.0-3"  # every evaluation records it, because its numbers depend on the grader
WORKER_BYTES = 4 * 2**30  # address space of a worker, so that the worker runs out of memory before the machine does


@dataclass(frozen=True)
class Verdict:
    """The answer of a response, and whether it is right."""

    extracted: str | None  # None when the response has no complete box
    correct: bool | None  # None when it is ungraded, which counts as wrong


class Grader:
    """Grades responses in parallel; workers start when the first answer needs mathematics.

    `start` returns at once, so that responses are graded while others are sampled.

    Args:
        seconds: time limit of one comparison.
        workers: number of processes; None takes one per core, and at most 8.
    """

    def __init__(self, seconds: float = 10.0, workers: int | None = None):
        self.seconds = seconds
        self.size = workers or min(8, os.cpu_count() or 1)
        self.local = threading.local()  # each thread of the pool has a worker of its own
        self.workers: list[_Worker] = []
        self.pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)  # a run that was stopped wants no more verdicts
            self.pool = None
        for worker in self.workers:
            worker.stop()
        self.workers.clear()

    def start(self, response: str, reference: str, answer_lines: bool = False) -> Callable[[], Verdict]:
        """Starts to grade a response; the returned function waits for its verdict.

        Args:
            answer_lines: in a response without a box, the last line that starts with "Answer:" gives the answer.
        """
        answer = extract(response, answer_lines)
        if answer is None:
            return lambda: Verdict(None, False)
        equal = self._start(answer, reference)
        return lambda: Verdict(answer, equal())

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (response, reference answer) pairs, in order."""
        started = [self.start(*pair) for pair in pairs]
        return [verdict() for verdict in started]

    def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Whether each pair of a prediction and a reference is the same answer; None where it is ungraded.

        A text is an expression, or a longer text whose last expression counts.
        """
        started = [self._start(*pair) for pair in pairs]
        return [equal() for equal in started]

    def _start(self, prediction: str, reference: str) -> Callable[[], bool | None]:
        """Starts to compare two answers; the returned function waits for the outcome."""
        plain = plainly_equal(prediction, reference)
        if plain is not None:
            return lambda: plain
        self.pool = self.pool or ThreadPoolExecutor(self.size)
        return self.pool.submit(self._verify, (prediction, reference)).result

    def _verify(self, pair: tuple[str, str]) -> bool | None:
        """The verdict of this thread's worker."""
        if not hasattr(self.local, "worker"):
            self.local.worker = _Worker()
            self.workers.append(self.local.worker)
        return self.local.worker.verify(*pair, self.seconds)


class _Worker:
    """One process that compares answers. A new process replaces it when it crashes or takes too long."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def verify(self, prediction: str, reference: str, seconds: float) -> bool | None:
        try:
            if self.process is None:
                self._start()
            line = json.dumps([prediction, reference]).encode() + b"\n"
            # In a thread, because a long line does not fit into the pipe and a stuck worker does not read it.
            threading.Thread(target=self._feed, args=(self.process, line), daemon=True).start()
            return json.loads(self._read(time.monotonic() + seconds))
        except (OSError, ValueError, EOFError, TimeoutError):
            self.stop()
            return None

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opd.grading"],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._read(time.monotonic() + 120)  # the worker writes a line when it has imported sympy

    @staticmethod
    def _feed(process: subprocess.Popen[bytes], line: bytes) -> None:
        with suppress(OSError, ValueError):  # after a failure no answer comes, which `_read` notices
            process.stdin.write(line)
            process.stdin.flush()

    def _read(self, deadline: float) -> bytes:
        """One line of the worker. Raises TimeoutError after the deadline and EOFError when the worker has ended."""
        answer = b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
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
    """For every response to every problem the answer that it votes for: the first of the answers that equal its own.

    A response without an answer, or with an empty one, votes for None. Equal answers are those with the same text
    without spaces, all right ones, because they equal the reference, and wrong ones that the grader finds equal. A pair
    that the grader gives up on is not equal. An ungraded answer equals its own text alone, because another comparison
    may cost the whole time limit again.
    """
    elected: list[dict[str, str]] = []  # per problem: an answer without its spaces -> the answer that it votes for
    waiting: list[list[str]] = []  # per problem: the different wrong answers that belong to no class yet
    for verdicts in problems:
        answered = [v for v in verdicts if v.extracted is not None and _bare(v.extracted)]
        written: dict[str, str] = {}  # an answer without its spaces -> as it was first written
        for verdict in answered:
            written.setdefault(_unspaced(verdict.extracted), verdict.extracted)
        right = {_unspaced(v.extracted) for v in answered if v.correct}
        wrong = {_unspaced(v.extracted) for v in answered if v.correct is False} - right
        first_right = next((answer for key, answer in written.items() if key in right), None)
        elected.append({k: first_right if k in right else answer for k, answer in written.items() if k not in wrong})
        waiting.append([answer for key, answer in written.items() if key in wrong])
    while any(waiting):
        _one_class_each(elected, waiting, grader)
    return [
        [None if v.extracted is None else votes_of_problem.get(_unspaced(v.extracted)) for v in verdicts]
        for votes_of_problem, verdicts in zip(elected, problems, strict=True)
    ]


def _one_class_each(elected: list[dict[str, str]], waiting: list[list[str]], grader: Grader) -> None:
    """Starts a class of equal answers per problem: its first waiting answer, and those waiting ones that equal it.

    The comparisons of all problems are made together, so that they share the grader's workers.
    """
    pairs = [(i, answer, answers[0]) for i, answers in enumerate(waiting) for answer in answers[1:]]
    equal = grader.equivalent([(answer, first) for _, answer, first in pairs])
    for votes_of_problem, answers in zip(elected, waiting, strict=True):
        if answers:
            votes_of_problem[_unspaced(answers[0])] = answers[0]
            answers.clear()
    for (i, answer, first), is_equal in zip(pairs, equal, strict=True):
        if is_equal:
            elected[i][_unspaced(answer)] = first
        else:
            waiting[i].append(answer)


def _unspaced(answer: str) -> str:
    return answer.replace(" ", "")


def extract(response: str, answer_lines: bool = False) -> str | None:
    """The answer in the text after the thinking part. A response that ends while it thinks has no answer."""
    thinking, _, rest = response.rpartition("</think>")
    text = rest if thinking or "<think>" not in rest else ""
    boxed = last_boxed(text)
    if boxed is None and answer_lines:
        lines = (line.strip(" \t*\r") for line in reversed(text.split("\n")))
        answers = (line[len("answer:") :].strip(" \t*") for line in lines if line.lower().startswith("answer:"))
        return next((answer for answer in answers if answer), None)
    return boxed


def last_boxed(text: str) -> str | None:
    """The content of the complete `\\boxed{...}` or `\\fbox{...}` that starts last; None when there is none.

    Braces may be nested. The text is read once, so every text takes linear time.
    """
    opened: list[int | None] = []  # per open brace: where the content of its box starts, or None if it opens no box
    last: tuple[int, int] | None = None
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\[{}\\]|[{}]", text):
        if token[0].endswith("{") and token[0] != "\\{":
            opened.append(token.end() if len(token[0]) > 1 else None)
        elif token[0] == "}" and opened:
            content = opened.pop()
            if content is not None and (last is None or content > last[0]):
                last = (content, token.start())
    return None if last is None else text[slice(*last)].strip()


def plainly_equal(left: str, right: str) -> bool | None:
    """Whether two texts are the same answer, where that is plain. None where it takes mathematics."""
    a, b = _bare(left), _bare(right)
    if a == b:
        return True
    integer = r"[+-]?\d{1,18}"
    if re.fullmatch(integer, a) and re.fullmatch(integer, b):
        return int(a) == int(b)
    return None if a else False


def _bare(answer: str) -> str:
    """An answer without dollar signs and spaces around it."""
    return answer.strip().strip("$").strip()


def _work() -> None:
    """The worker: it reads lines [prediction, reference] and writes true or false, or null for an ungraded pair."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the worker ends with a parent that is killed
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    sys.setrecursionlimit(3000)
    from math_verify import parse, verify

    def parsed(text: str) -> list:
        """The expression of a text: all of a bare expression, and the last one of a text that marks its mathematics."""
        text = re.sub(r"\\\$|\\!", "", text).replace("{,}", ",")  # currency signs and thin spaces are no mathematics
        marked = re.search(r"\$|\\boxed|\\\(|\\\[|\\begin\{(?:equation|align)", text)
        return parse(text if marked else f"${text}$", parsing_timeout=None, raise_on_error=True)

    print("ready", flush=True)
    for line in sys.stdin:
        prediction, reference = json.loads(line)
        try:
            # math-verify's own time limits are off, because the waiting process has the only clock.
            equal = bool(verify(parsed(reference), parsed(prediction), timeout_seconds=None, raise_on_error=True))
        except Exception:  # sympy can raise anything on strange input; the parent counts null as ungraded
            equal = None
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    _work()
