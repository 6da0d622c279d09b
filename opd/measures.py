"""What the responses to one problem are worth: the numbers in [0, 1] whose means over problems are accuracies.

A table, a comparison and a summary take the same function, so a difference is one of the numbers that stand in the
table. An answer without a verdict is not right, and its conversation has the share 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from opd.accuracy import best_at

GREEDY = -1  # sample number of the greedy response in the files of an evaluation
Rows = Sequence[Mapping[str, Any]]  # responses, as opd.evaluation.Response; of one problem where nothing else is said


@dataclass(frozen=True)
class Measure:
    """A number that the responses to a problem give."""

    label: str  # what people call it; k stands for the number of samples
    of: Callable[[Rows], float | None]  # None where it was not measured


def by_problem(rows: Rows) -> dict[str, Rows]:
    """Problem id -> its responses."""
    problems: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        problems.setdefault(row["id"], []).append(row)
    return problems


def _greedy(rows: Rows) -> Rows:
    return [row for row in rows if row["sample"] == GREEDY]


def _samples(rows: Rows) -> Rows:
    return [row for row in rows if row["sample"] != GREEDY]


def _right(rows: Rows) -> float | None:
    return fmean(float(row["correct"] is True) for row in rows) if rows else None


def _shares(rows: Rows) -> list[float] | None:
    """The share of what was asked, sample by sample; None where there are no samples or no environment scored them."""
    samples = _samples(rows)
    return [row["share"] or 0.0 for row in samples] if samples and "share" in samples[0] else None


def _mean_share(rows: Rows) -> float | None:
    shares = _shares(rows)
    return fmean(shares) if shares else None


def _best_of_two(rows: Rows) -> float | None:
    shares = _shares(rows)
    return best_at(shares, 2) if shares and len(shares) > 2 else None


def _best_share(rows: Rows) -> float | None:
    shares = _shares(rows)
    return max(shares) if shares else None


def _delivered(rows: Rows) -> float | None:
    return fmean(row["extracted"] is not None for row in rows) if "share" in rows[0] else None


MEASURES = {  # figure of a summary -> how it is made; the last four only where an environment scores
    "greedy": Measure("greedy", lambda rows: _right(_greedy(rows))),
    "mean_at_k": Measure("mean@k", lambda rows: _right(_samples(rows))),
    "share_at_k": Measure("share@k", _mean_share),
    "share_best_at_2": Measure("best@2", _best_of_two),
    "share_best_at_k": Measure("best@k", _best_share),
    "delivered": Measure("delivered", _delivered),
}
CONVERSATIONS = ("share_at_k", "share_best_at_2", "share_best_at_k", "delivered")
