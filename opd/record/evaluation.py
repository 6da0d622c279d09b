"""The figures of an evaluation and the files that hold them: summary.json, and <benchmark>.jsonl with every response.

Whoever only reads evaluations imports this and needs no model: opd.evaluate makes them.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NotRequired

from typing_extensions import TypedDict

from opd import speculative
from opd.accuracy import majority, pass_at, standard_error
from opd.errors import InputError
from opd.files import check, read_object, read_rows, sha256
from opd.measures import CONVERSATIONS, GREEDY, MEASURES, by_problem

ACCEPTED = f"accepted_of_{speculative.GAMMA}"
_Timed = TypedDict("_Timed", {"time/evaluation": float})  # seconds


class Figures(_Timed):
    """The part of summary.json about one benchmark; `summarise` says what the accuracies are."""

    problems: int
    greedy: float | None
    greedy_se: float | None
    k: int
    mean_at_k: float | None
    mean_at_k_se: float | None
    mean_at_k_se_passes: float | None
    pass_at: dict[str, float]
    maj_at_k: float | None
    reverse_kl: float | None
    acceptance: NotRequired[float | None]  # this and the next one are missing in evaluations by older versions
    accepted_of_4: NotRequired[float | None]
    ungraded: int
    truncated: float
    unformatted: float
    length_mean: float
    share_at_k: NotRequired[float | None]  # this and the next ones only where an environment scores
    share_at_k_se: NotRequired[float | None]
    share_best_at_2: NotRequired[float | None]
    share_best_at_2_se: NotRequired[float | None]
    share_best_at_k: NotRequired[float | None]
    share_best_at_k_se: NotRequired[float | None]
    share_greedy: NotRequired[float | None]
    delivered: NotRequired[float]
    delivered_se: NotRequired[float | None]
    turns_mean: NotRequired[float]
    environment: NotRequired[str]  # its version
    benchmark: dict[str, Any]
    grader: str
    seed: int
    responses_sha256: str  # digest of the file <benchmark>.jsonl in the same folder


class Response(TypedDict):
    """A line of <benchmark>.jsonl."""

    id: str
    sample: int  # GREEDY, or 0 to k - 1
    prompt: str
    response: str
    extracted: str | None
    vote: str | None  # the answer that it votes for in maj@k; None when it takes part in no vote
    answer: str | None
    correct: bool | None  # None when the grader or the environment failed; such an answer counts as wrong
    finish_reason: str
    tokens: int  # that the model sampled
    reverse_kl: NotRequired[float]  # this and the next two only where the response was compared with the teacher
    acceptance: NotRequired[float]
    accepted_of_4: NotRequired[float]
    share: NotRequired[float | None]  # of what was asked; this and the next ones only where an environment scores
    parts: NotRequired[dict[str, bool]]  # whether each part of what was asked holds
    turns: NotRequired[list[str]]  # what the model said in each of them


def finished(folder: Path, names: Collection[str]) -> dict[str, Figures] | None:
    """The figures of a finished evaluation on exactly these benchmarks.

    None where there is none, and where a file of it differs from the one that was written.
    """
    try:
        summary = read_summary(folder)
        unchanged = all(sha256(folder / f"{n}.jsonl") == figures["responses_sha256"] for n, figures in summary.items())
    except (InputError, OSError):
        return None
    return summary if summary and unchanged and set(summary) == set(names) else None


def read_summary(folder: Path) -> dict[str, Figures]:
    """Benchmark -> figures, from an evaluation's summary.json. Raises InputError that names the fault."""
    path, expected = folder / "summary.json", "the figures of an evaluation"
    return check(read_object(path, expected), dict[str, Figures], str(path), expected)


def read_responses(path: Path) -> list[Response]:
    """The lines of an evaluation's <benchmark>.jsonl. Raises InputError that names the faulty line."""
    expected = "the responses of an evaluation"
    rows = [check(row, Response, f"{path}, line {number}", expected) for number, row in read_rows(path, expected)]
    if not rows:
        raise InputError(f"{path}: nothing is in it. Expected {expected}.")
    return rows


def summarise(rows: Sequence[dict]) -> dict[str, Any]:
    """The figures of one benchmark's responses, without those that `evaluate` adds.

    Accuracies are shares in [0, 1] of all responses, and an ungraded answer is not right. A figure that was not
    measured is None.

    mean_at_k is the mean over problems of the share of right samples. mean_at_k_se is its standard error over problems,
    and mean_at_k_se_passes its standard error over the k passes. pass_at holds the unbiased pass@j for j = 1, 2, 4, ...
    and k. maj_at_k is the share of problems whose most frequent answer is right, where ties count in parts.

    The last three are means over the tokens of the sampled responses, or of the greedy ones where there are no samples.
    reverse_kl is KL(student || teacher) in nats. acceptance is the probability that the teacher accepts a token that
    the model drafts in speculative decoding at temperature 1, and accepted_of_4 is how many tokens of a block of 4 it
    accepts. The block's is an unbiased estimate where the responses are sampled at temperature 1 and top-p 1.
    """
    greedy = [float(row["correct"] is True) for row in rows if row["sample"] == GREEDY]
    problems, passes = defaultdict(list), defaultdict(list)
    for row in rows:
        if row["sample"] != GREEDY:
            problems[row["id"]].append(row)
            passes[row["sample"]].append(float(row["correct"] is True))
    groups = list(problems.values())
    right = [sum(row["correct"] is True for row in group) for group in groups]
    means = [count / len(group) for count, group in zip(right, groups, strict=True)]
    k = max(map(len, groups), default=0)
    sizes = sorted({2**i for i in range(k.bit_length())} | {k} - {0})
    return {
        "problems": len({row["id"] for row in rows}),
        "greedy": fmean(greedy) if greedy else None,
        "greedy_se": standard_error(greedy),
        "k": k,
        "mean_at_k": fmean(means) if means else None,
        "mean_at_k_se": standard_error(means),
        "mean_at_k_se_passes": standard_error([fmean(accuracies) for accuracies in passes.values()]),
        "pass_at": {
            str(j): fmean(pass_at(len(group), count, j) for count, group in zip(right, groups, strict=True))
            for j in sizes
        },
        "maj_at_k": fmean(majority((row["vote"], row["correct"]) for row in group) for group in groups)
        if groups
        else None,
        **{name: _mean_over_tokens(rows, name) for name in ("reverse_kl", "acceptance", ACCEPTED)},
        "ungraded": sum(row["correct"] is None for row in rows),
        "truncated": fmean(row["finish_reason"] in ("length", "turns") for row in rows),
        "unformatted": fmean(row["extracted"] is None for row in rows),
        "length_mean": fmean(row["tokens"] for row in rows),
        **(_conversation_figures(rows) if "share" in rows[0] else {}),
    }


def _mean_over_tokens(rows: Sequence[dict], name: str) -> float | None:
    """The mean of a number of responses, each weighed by its tokens; None where no response has it."""
    known = [row for row in rows if name in row]
    return sum(row[name] * row["tokens"] for row in known) / sum(row["tokens"] for row in known) if known else None


def _conversation_figures(rows: Sequence[dict]) -> dict[str, Any]:
    """The figures that only an environment gives, each as a mean over problems with its standard error.

    share_at_k is of the mean share of what was asked, share_best_at_2 of the unbiased best share of two samples, and
    share_best_at_k of the best sample's share. A conversation without a verdict has the share 0. Nobody votes on
    conversations.
    """
    problems = by_problem(rows)
    greedy = [row["share"] or 0.0 for row in rows if row["sample"] == GREEDY]
    figures: dict[str, Any] = {"maj_at_k": None, "share_greedy": fmean(greedy) if greedy else None}
    for name in CONVERSATIONS:
        numbers = [number for group in problems.values() if (number := MEASURES[name].of(group)) is not None]
        figures |= {name: fmean(numbers) if numbers else None, f"{name}_se": standard_error(numbers)}
    return figures | {"turns_mean": fmean(len(row["turns"]) for row in rows)}


def scalars(summary: dict[str, dict], prefix: str) -> dict[str, float]:
    """The figures under TensorBoard names, <prefix>/<benchmark>/<figure>."""
    names = ("greedy", "mean_at_k", "maj_at_k", "reverse_kl", "ungraded", "truncated", "unformatted", "length_mean")
    names += ("acceptance", ACCEPTED, *CONVERSATIONS, "share_greedy", "turns_mean")
    return {
        f"{prefix}/{benchmark}/{name}": figures[name]
        for benchmark, figures in summary.items()
        for name in names
        if figures.get(name) is not None
    }


def seconds_of(summary: dict[str, Figures]) -> float:
    """How long an evaluation took, whichever process has made it."""
    return sum(figures["time/evaluation"] for figures in summary.values())


def line(summary: dict[str, dict]) -> str:
    """The main figures in one line for the console."""
    return "; ".join(f"{name} {', '.join(_parts(figures))}" for name, figures in summary.items())


def _parts(figures: dict) -> Iterator[str]:
    if figures["greedy"] is not None:
        yield f"greedy {percent(figures['greedy'], figures['greedy_se'])}"
    if figures["mean_at_k"] is not None:
        yield f"mean@{figures['k']} {percent(figures['mean_at_k'], figures['mean_at_k_se'])}"
    if figures.get("share_at_k") is not None:
        yield f"share@{figures['k']} {percent(figures['share_at_k'], None)}"
    if figures["reverse_kl"] is not None:
        yield f"reverse KL {figures['reverse_kl']:.4f}"
    if figures.get("acceptance") is not None:
        yield f"accepted as drafts {percent(figures['acceptance'], None)} %"
    if figures["ungraded"]:
        yield f"ungraded {figures['ungraded']}"


def percent(value: float, error: float | None) -> str:
    """A share and its standard error, in percent."""
    return f"{100 * value:.1f}" + (f" +- {100 * error:.1f}" if error is not None else "")
