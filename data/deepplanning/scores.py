"""What a plan is worth, by the benchmark and by the paper: `python -m data.deepplanning.scores EVALUATION.jsonl`.

The benchmark asks whether all wishes hold and all 21 checks pass. The paper's Table 7 counts the share of the wishes
that hold, whatever the checks say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from typing_extensions import TypedDict

from data.commands import COMMANDS
from data.deepplanning.checks import CHECKS, DIMENSIONS, Case
from data.deepplanning.constraints import Wish, holds
from opd.cli import main
from opd.errors import InputError
from opd.files import check, read_rows

CHECK, WISH, READ = "check/", "wish/", "every line read"  # parts: how their names begin, and the name of one


@dataclass(frozen=True)
class Verdict:
    """What holds of a plan, by check and by kind of wish."""

    checks: Mapping[str, bool]
    wishes: Mapping[str, bool]
    delivered: bool  # whether there is a plan
    read: bool = True  # whether every line of it could be read

    @property
    def commonsense(self) -> float:
        """The share of the 8 dimensions whose checks all pass."""
        passed = [all(self.checks[one.__name__] for one in checks) for checks in DIMENSIONS.values()]
        return fmean(passed)

    @property
    def personalized(self) -> float:
        return float(bool(self.wishes) and all(self.wishes.values()))

    @property
    def composite(self) -> float:
        return (self.commonsense + self.personalized) / 2

    @property
    def case_accuracy(self) -> float:
        return float(self.commonsense == self.personalized == 1)

    @property
    def share(self) -> float:
        """The share of the wishes that hold, which is the paper's number."""
        return fmean(self.wishes.values()) if self.wishes else 0.0

    @property
    def parts(self) -> dict[str, bool]:
        """All of it in one mapping, from which `of_parts` makes the verdict again."""
        return (
            {f"{WISH}{name}": held for name, held in self.wishes.items()}
            | {f"{CHECK}{name}": passed for name, passed in self.checks.items()}
            | {READ: self.read}
        )


def of_parts(parts: Mapping[str, bool], delivered: bool) -> Verdict:
    """The verdict with these parts. Without any, as where the environment failed, nothing holds."""
    checks = {name.removeprefix(CHECK): value for name, value in parts.items() if name.startswith(CHECK)}
    return Verdict(
        dict.fromkeys(CHECKS, False) | checks,
        {name.removeprefix(WISH): value for name, value in parts.items() if name.startswith(WISH)},
        delivered,
        parts.get(READ, False),
    )


def judge(case: Case | None, wished: Mapping[str, Wish], read: bool = True) -> Verdict:
    """The verdict on a plan. Without a plan, or for one without days, nothing holds."""
    if case is None or not case.plan.days:
        return Verdict(dict.fromkeys(CHECKS, False), dict.fromkeys(wished, False), case is not None, read)
    return Verdict(
        {name: passes(case) for name, passes in CHECKS.items()},
        {kind: holds(kind, wish, case) for kind, wish in wished.items()},
        True,
        read,
    )


def table(name: str, verdicts: Sequence[Sequence[Verdict]]) -> str:
    """Both ways to count, in percent, as a table in Markdown.

    Args:
        name: of the tasks. Numbers on synthetic tasks never carry the benchmark's name.
        verdicts: of every task, those of its k samples.
    """
    samples = [verdict for task in verdicts for verdict in task]
    k = max(map(len, verdicts))
    rows = {
        "benchmark: commonsense": fmean(v.commonsense for v in samples),
        "benchmark: personalized (all wishes of a task)": fmean(v.personalized for v in samples),
        "benchmark: composite": fmean(v.composite for v in samples),
        "benchmark: case accuracy": fmean(v.case_accuracy for v in samples),
        "benchmark: delivery rate": fmean(v.delivered for v in samples),
        "plans with a line that could not be read": fmean(v.delivered and not v.read for v in samples),
        f"paper: Avg@{k} (share of a task's wishes)": fmean(fmean(v.share for v in task) for task in verdicts),
        f"paper: Best@{k}": fmean(max(v.share for v in task) for task in verdicts),
    }
    lines = [f"| {name}, {len(verdicts)} tasks | % |", "|---|---|"]
    return "\n".join([*lines, *(f"| {label} | {100 * value:.1f} |" for label, value in rows.items())])


class Judged(TypedDict):
    """What is read of a line of an evaluation's file."""

    id: str
    sample: int  # below 0 for the greedy response
    extracted: str | None
    parts: dict[str, bool]


def tables(path: Path) -> list[str]:
    """The tables of an evaluation's file, of its samples and of its greedy responses, as far as it has them.

    The tasks' own ids give the name. Raises InputError for a file of another kind.
    """
    verdicts: dict[tuple[str, str], dict[str, list[Verdict]]] = {}
    for line, row in read_rows(path, "the JSONL file of an evaluation on these tasks"):
        judged: Judged = check(row, Judged, f"{path}, line {line}", "a response that data.deepplanning.travel judged")
        name, how = judged["id"].rpartition("-")[0], "greedy" if judged["sample"] < 0 else "sampled"
        of_task = verdicts.setdefault((name, how), {}).setdefault(judged["id"], [])
        of_task.append(of_parts(judged["parts"], judged["extracted"] is not None))
    if not verdicts:
        raise InputError(f"{path}: no responses in it. Expected the JSONL file of an evaluation.")
    return [table(f"{name}, {how}", list(tasks.values())) for (name, how), tasks in verdicts.items()]


def command(arguments: list[str]) -> None:
    options = COMMANDS["deepplanning.scores"].parser().parse_args(arguments)
    print("\n\n".join(tables(options.file)))


if __name__ == "__main__":
    main(command)
