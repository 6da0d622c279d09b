"""A finished run as a report reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from opd.errors import InputError
from opd.files import check
from opd.record.folder import Recorded, Summary, read_final, read_record
from opd.record.identity import without_machine


class Selection(TypedDict):
    """What is read of a recorded tip section."""

    rule: str
    retention: float
    axis: NotRequired[Literal["reverse_kl", "forward_kl", "jsd", "total_variation"]]


@dataclass(frozen=True)
class Run:
    folder: Path
    label: str
    config: Recorded
    summary: Summary

    @property
    def evaluates_teacher(self) -> bool:
        """Whether there is an evaluation of the teacher. One that is elsewhere samples nothing."""
        return evaluates_teacher(self.config)


def evaluates_teacher(config: Recorded) -> bool:
    """As Run.evaluates_teacher, by a recorded configuration."""
    return config["teacher"].get("mode") != "server"


def read_run(folder: Path) -> Run:
    """Reads a finished run. Raises InputError when it is not one."""
    config, summary, tip = read_record(folder)["config"], read_final(folder), _selection(folder)
    benchmarks = (summary["eval"]["step_0"] or {}).keys()
    for who in (*(["teacher"] if evaluates_teacher(config) else []), "final"):
        if missing := sorted(benchmarks - (summary["eval"][who] or {}).keys()):
            raise InputError(
                f"{folder / 'summary.json'}: eval.{who} has no figures of benchmark {missing[0]!r}. Remove the file "
                "and give the command of the run again, which makes it anew from the run's evaluations."
            )
    label = f"{tip['rule']} {tip['retention']:g}" if tip and tip["rule"] != "all" else "all tokens"
    return Run(folder, label, config, summary)


def axis_of(folder: Path) -> str:
    """The divergence that is d in a run (tip.axis). Raises InputError where its record is none."""
    return (_selection(folder) or {}).get("axis", "reverse_kl")


def _selection(folder: Path) -> Selection | None:
    """The recorded tip section; None: the run has none."""
    tip = read_record(folder)["config"].get("tip")
    return tip and check(tip, Selection, f"{folder / 'config.json'}: config.tip", "a rule and its retention")


def check_alike(runs: Sequence[Run]) -> None:
    """Raises InputError for runs that did not start from the same student, teacher, data, seed and benchmarks."""
    first = runs[0]
    for run in runs[1:]:
        one, other = _beginning(first), _beginning(run)
        for key in one | other:
            if other.get(key) != one.get(key):
                raise InputError(
                    f"{run.folder} and {first.folder} differ in {key} ({other.get(key)} and {one.get(key)}): they "
                    "did not start alike, so their results do not compare. Report them one by one."
                )


def _beginning(run: Run) -> dict[str, object]:
    """What two runs must share for their accuracies to compare."""
    config = without_machine(run.config)
    shared = {key: config[key] for key in ("student", "teacher", "data", "seed")}
    for name, figures in (run.summary["eval"]["step_0"] or {}).items():
        shared[f"benchmark {name}"] = {key: figures[key] for key in ("benchmark", "grader", "problems", "k")}
    return shared
