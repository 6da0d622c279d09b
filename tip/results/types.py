"""What a table, a figure and table.json are made of."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.accuracy import Interval
from opd.measures import MEASURES
from tip.results.turns import Turns

PHASES = ("rollout", "teacher", "score", "update")


@dataclass(frozen=True)
class Panel:
    """Arms that stand together under a title, by their labels."""

    title: str
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What is compared, before anything is read."""

    name: str
    title: str
    command: str
    pair: str
    seeds: tuple[int, ...]
    baselines: tuple[str, ...]  # labels of the arms that others are compared with
    every_evaluation: bool  # a block for each evaluated step, else for the last alone
    panels: tuple[Panel, ...]
    settings: dict[str, dict[str, Any]]  # label -> KEY -> VALUE of --set
    folders: dict[str, dict[int, Path]]  # label -> seed -> run, whether it has finished or not
    paper: dict[str, dict[str, list[float]]]  # benchmark -> label -> [mean, +-] in %; empty: another pair
    paper_metric: str = "mean_at_k"  # what the paper's values are, of opd.measures.MEASURES
    note: str = ""  # what a reader of the table has to know


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers: mean over seeds, and its standard errors."""

    mean: float
    by_seed: tuple[float, ...]
    se_seeds: float | None  # of the mean of seeds: everything that makes two trainings differ; None: one seed
    se_samples: float | None  # root mean square of the runs' own standard errors over problems


@dataclass(frozen=True)
class Evaluation:
    """One arm, or one model, on one benchmark after one update."""

    problems: int
    k: int
    accuracies: dict[str, Accuracy]  # by metric, of opd.measures.MEASURES those that were taken
    reverse_kl: float | None
    differences: dict[str, dict[str, Interval]]  # baseline -> metric -> paired difference, arm minus baseline

    def title(self, metric: str) -> str:
        """What people call a metric of it: greedy, mean@4."""
        return re.sub("@k$", f"@{self.k}", MEASURES[metric].label)


@dataclass(frozen=True)
class Warnings:
    """Of one kind: how many there were, and the first message."""

    times: int
    first: str


@dataclass(frozen=True)
class ArmResult:
    """The finished runs of an arm. Seconds are means over seeds, of the sums over all updates."""

    seeds: tuple[int, ...]
    retained: float
    mass_covered: float | None  # None: no update measured it
    peak_memory_gb: float
    seconds: float  # of whole updates
    seconds_by_phase: dict[str, float]  # of PHASES
    seconds_evaluating: float
    paper: dict[str, list[float]]  # benchmark -> [mean, +-] in %
    evaluations: dict[int, dict[str, Evaluation]]  # step -> benchmark -> evaluation; step 0 is the student's start
    warnings: dict[str, Warnings]  # by kind

    @property
    def last(self) -> dict[str, Evaluation]:
        """Benchmark -> the last evaluation."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}


@dataclass(frozen=True)
class Results:
    comparison: Comparison
    machine: str
    arms: dict[str, ArmResult]  # by label, those with a finished run
    step_0_student: dict[str, Evaluation]  # by benchmark
    teacher: dict[str, Evaluation]
    folders: dict[str, dict[int, Path]]  # label -> seed -> finished run
    missing: dict[str, dict[int, str]]  # label -> seed -> why its run is not among them
    config: dict[str, Any] | None  # of the first run; None: no run has finished
    versions: dict[str, str] | None
    git_commit: str | None
    turns: Turns | None = None  # None: no conversations, or no token dumps of them

    @property
    def differences(self) -> Iterator[Interval]:
        """All that were computed."""
        for arm in self.arms.values():
            for evaluations in arm.evaluations.values():
                for evaluation in evaluations.values():
                    for by_metric in evaluation.differences.values():
                        yield from by_metric.values()

    @property
    def subject(self) -> str:
        """Label of the arm that this is about: the first that selects and is neither baseline nor random control."""
        others = [label for label in self.arms if label not in self.comparison.baselines] or list(self.arms)
        rules = {label: self.comparison.settings[label].get("tip.rule") for label in others}
        return next((a for a in others if self.arms[a].retained < 1 and rules[a] != "random"), others[0])

    @property
    def commit(self) -> str:
        """Of the first run, in 12 characters."""
        return re.sub(r"([0-9a-f]{12})[0-9a-f]{28}", r"\1", self.git_commit or "unknown")

    @property
    def memory_note(self) -> str:
        """What a reader of peak memory has to know; empty on a GPU."""
        note = " On a CPU peak memory is the process's, with the evaluations it ran: it does not compare rules."
        return note if self.machine.endswith("no GPU") else ""


def measured(evaluations: list[Evaluation]) -> list[str]:
    """The metrics that one of these evaluations has."""
    return [metric for metric in MEASURES if any(metric in evaluation.accuracies for evaluation in evaluations)]
