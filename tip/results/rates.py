"""Learning rate as an axis of a table: accuracy of arms x rates, the best rate of each arm, and verdicts that flip.

A table at one learning rate does not rank its arms, because the best rate of one is not that of another (arXiv
2609.22109). An arm at its best rate is reported on problems that had no say in the choice: the problems are split into
halves, and each half is reported at the rate that is best on the other one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from opd.accuracy import Interval, paired_interval
from opd.compare import finished_evaluations, per_problem
from opd.files import write_whole
from tip.results import figures
from tip.results.grid import difference_cell, grid
from tip.results.markdown import what_is_covered
from tip.results.sentences import VERDICTS, verdict
from tip.results.types import Results, measured

Shares = list[dict[str, float]]  # per seed: problem id -> share of right responses
Labels = Mapping[float, str]  # rate -> label of an arm in the results at that rate


@dataclass(frozen=True)
class Row:
    """An arm at all rates."""

    arm: str
    accuracies: dict[float, float]  # by rate; where a run has finished
    differences: dict[float, Interval]  # to the baseline at the same rate
    chosen: tuple[float, ...]  # the best rates by one half of the problems and by the other; empty: not known
    accuracy: float | None  # at the chosen rates
    difference: Interval | None  # to the baseline at the rates that are best for it

    @property
    def swing(self) -> float:
        """How far its accuracies at different rates lie apart."""
        return max(self.accuracies.values(), default=0.0) - min(self.accuracies.values(), default=0.0)

    @property
    def neighbours(self) -> list[tuple[str, str]]:
        """Its verdicts at each two rates that stand beside each other and both have one."""
        return list(pairwise(verdict(self.differences[rate]) for rate in sorted(self.differences)))

    @property
    def flips(self) -> int:
        return sum(a != b for a, b in self.neighbours)


@dataclass(frozen=True)
class Matrix:
    """Arms x rates by one metric of one benchmark after the last update."""

    benchmark: str
    metric: str  # what people call it
    base: str
    rates: tuple[float, ...]
    rows: tuple[Row, ...]


def chosen_on_the_other_half(by_rate: Mapping[float, Shares]) -> tuple[tuple[float, ...], Shares]:
    """The rates that are best on one and on the other half of the problems, and per seed every problem's share.

    The first, third, fifth ... problem by id are one half. A problem's share is that at the rate which is best, as a
    mean over seeds and problems, on the half without it; of equally good rates the lowest is taken. Without two
    problems that all seeds have at all rates both answers are empty.
    """
    problems = sorted(set.intersection(*(set(seed) for seeds in by_rate.values() for seed in seeds)))
    if len(problems) < 2:
        return (), []
    halves = problems[::2], problems[1::2]

    def best_on(half: Sequence[str]) -> float:
        return max(sorted(by_rate), key=lambda rate: fmean(seed[p] for seed in by_rate[rate] for p in half))

    chosen = best_on(halves[1]), best_on(halves[0])
    picked = [by_rate[rate] for rate in chosen]
    seeds = range(len(picked[0]))
    return chosen, [{p: of[s][p] for of, half in zip(picked, halves, strict=True) for p in half} for s in seeds]


def matrices(results: Mapping[float, Results]) -> list[Matrix]:
    """One for each benchmark and metric, from the results of the same arms at each rate, against the first baseline."""
    arms, base = labels_of(results)
    evaluations = [arm.last for of_rate in results.values() for arm in of_rate.arms.values()]
    found = []
    for name in dict.fromkeys(name for by_name in evaluations for name in by_name):
        of_name = [by_name[name] for by_name in evaluations if name in by_name]
        for metric in measured(of_name):
            rows = tuple(_row(arm, (name, metric), results, arms[arm], arms[base]) for arm in arms)
            found.append(Matrix(name, of_name[0].title(metric), base, tuple(sorted(results)), rows))
    return found


def labels_of(results: Mapping[float, Results]) -> tuple[dict[str, Labels], str]:
    """Name of an arm -> its labels, and the name of the baseline. A name is the label without the learning rate."""
    labels: dict[str, dict[float, str]] = {}
    for rate, of_rate in results.items():
        for label in of_rate.comparison.settings:
            labels.setdefault(_name(label), {})[rate] = label
    return labels, _name(next(iter(results.values())).comparison.baselines[0])


def _name(label: str) -> str:
    return " ".join(word for word in label.split(" ") if not word.startswith("lr="))


def _row(arm: str, what: tuple[str, str], results: Mapping[float, Results], labels: Labels, base_labels: Labels) -> Row:
    """`what` is a benchmark and a metric."""
    name, metric = what
    accuracies, differences = {}, {}
    for rate, of_rate in results.items():
        evaluation = of_rate.arms[labels[rate]].last.get(name) if labels[rate] in of_rate.arms else None
        if evaluation is not None and metric in evaluation.accuracies:
            accuracies[rate] = evaluation.accuracies[metric].mean
            interval = evaluation.differences.get(base_labels[rate], {}).get(metric)
            differences |= {} if interval is None else {rate: interval}
    seeds = set.intersection(*(set(r.folders[of[rate]]) for rate, r in results.items() for of in (labels, base_labels)))
    if not seeds or len(accuracies) < len(results):
        return Row(arm, accuracies, differences, (), None, None)
    chosen, shares = _at_best(what, results, labels, sorted(seeds))
    accuracy, difference = fmean(share for seed in shares for share in seed.values()) if shares else None, None
    if chosen and labels != base_labels:
        of_base = _at_best(what, results, base_labels, sorted(seeds))[1]
        both = list(zip(shares, of_base, strict=True))
        difference = paired_interval([{p: a[p] - b[p] for p in a.keys() & b.keys()} for a, b in both])
    return Row(arm, accuracies, differences, chosen, accuracy, difference)


def _at_best(
    what: tuple[str, str], results: Mapping[float, Results], labels: Labels, seeds: Sequence[int]
) -> tuple[tuple[float, ...], Shares]:
    name, metric = what

    def shares(run: Path) -> dict[str, float]:
        evaluations = finished_evaluations(run)
        return per_problem(evaluations[max(evaluations)] / f"{name}.jsonl")[metric]

    return chosen_on_the_other_half(
        {rate: [shares(r.folders[labels[rate]][seed]) for seed in seeds] for rate, r in results.items()}
    )


def markdown(found: Sequence[Matrix], title: str, command: str) -> str:
    """The matrices as Markdown, each with the differences at every rate and the verdicts that flip."""
    parts = [f"# {title}", command]
    for matrix in found:
        header = ("arm", *(f"{rate:g}" for rate in matrix.rates), "swing", "best rate", "there", f"- {matrix.base}")
        rows = [
            (
                row.arm,
                *(f"{100 * row.accuracies[rate]:.1f}" if rate in row.accuracies else "-" for rate in matrix.rates),
                f"{100 * row.swing:.1f}" if row.accuracies else "-",
                " or ".join(f"{rate:g}" for rate in sorted(set(row.chosen))) or "-",
                "-" if row.accuracy is None else f"{100 * row.accuracy:.1f}",
                difference_cell(row.difference),
            )
            for row in matrix.rows
        ]
        parts += [f"## {matrix.benchmark}, {matrix.metric}, after the last update", grid(header, rows)]
        header = (f"difference to {matrix.base} at the same rate", *(f"{rate:g}" for rate in matrix.rates), "flips")
        rows = [
            (
                row.arm,
                *(difference_cell(row.differences.get(rate)) or "-" for rate in matrix.rates),
                f"{row.flips} of {len(row.neighbours)}",
            )
            for row in matrix.rows
            if row.arm != matrix.base
        ]
        parts += [grid(header, rows), _flips(matrix)]
    return "\n\n".join([*parts, _legend(found)]) + "\n"


def _flips(matrix: Matrix) -> str:
    neighbours = sum(len(row.neighbours) for row in matrix.rows)
    flips = sum(row.flips for row in matrix.rows)
    return f"{flips} of {neighbours} verdicts change between two rates that stand beside each other."


def _legend(found: Sequence[Matrix]) -> str:
    rows = [row for matrix in found for row in matrix.rows]
    intervals = [i for row in rows for i in (*row.differences.values(), row.difference) if i is not None]
    text = (
        "Accuracy in %, mean over seeds. The swing is the largest minus the smallest of a row. An arm at its best rate "
        "is reported on problems that had no say in the choice: each half of the problems at the rate that is best on "
        f"the other half. A verdict is {VERDICTS[0]}, {VERDICTS[1]} or {VERDICTS[2]} the baseline."
    )
    return f"{text} Differences in points, with {what_is_covered(intervals)}." if intervals else text


def write(results: Mapping[float, Results], title: str, command: str, out: Path) -> str:
    """Writes rates.md, rates.json and the figure rates into `out`, each whole or not at all; returns what rates.md
    holds.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = matrices(results)
    text = markdown(found, title, command)
    rows = [
        asdict(matrix) | {"rows": [asdict(row) | {"swing": row.swing, "flips": row.flips} for row in matrix.rows]}
        for matrix in found
    ]
    write_whole(out / "rates.json", json.dumps(rows, indent=1) + "\n")
    write_whole(out / "rates.md", text)
    panels = {
        f"{matrix.benchmark}, {matrix.metric}, %": {
            row.arm: {rate: 100 * row.accuracies[rate] for rate in matrix.rates if rate in row.accuracies}
            for row in matrix.rows
        }
        for matrix in found
    }
    if panels:
        drawn = figures.lines(panels, "learning rate")
        for axis in drawn.axes:
            axis.set_xscale("log")
        figures.Album(out).add(drawn, "rates", "Accuracy of every arm against the learning rate.")
    return text
