"""Is one run better than another on the same problems? `python -m opd.compare RUN RUN` (B minus A)

Every problem gives one pair for each measure (opd.measures), such as the two models' accuracies over its samples. A
benchmark is a sample of problems, and the interval (opd.accuracy) is over problems only. So it says nothing about
another training. Runs share the random numbers of their samples, which makes the differences of the pairs smaller.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from opd.accuracy import paired_interval
from opd.cli import main
from opd.commands import COMMANDS
from opd.errors import InputError
from opd.files import step_number
from opd.measures import MEASURES, by_problem
from opd.record.evaluation import read_responses, read_summary

SAME_WAY = (
    "benchmark",
    "grader",
    "environment",
    "seed",
)  # the entries of a summary that say how a benchmark was measured


@dataclass(frozen=True)
class Difference:
    """Mean accuracies of A and B in [0, 1], and the 95 % interval of B - A over problems."""

    problems: int
    a: float
    b: float
    low: float
    high: float
    better: int  # how many problems B is better on
    worse: int


def per_problem(path: Path) -> dict[str, dict[str, float]]:
    """Measure -> problem id -> its number, of an evaluation's responses; a measure that was not taken is empty.

    Raises InputError when the file cannot be read, or a line of it is not a graded response.
    """
    problems = by_problem(read_responses(path))
    return {
        name: {problem: number for problem, rows in problems.items() if (number := measure.of(rows)) is not None}
        for name, measure in MEASURES.items()
    }


def compare(a: Path, b: Path, name: str, measure: str = "mean_at_k") -> Difference:
    """Compares two evaluation folders on one benchmark, by one of MEASURES.

    Raises InputError when they have no problem in common, or when their responses cannot be read.
    """
    of_a, of_b = (per_problem(folder / f"{name}.jsonl")[measure] for folder in (a, b))
    common = sorted(of_a.keys() & of_b.keys())
    if not common:
        raise InputError(f"{a} and {b} have no problem of {name} with {MEASURES[measure].label} in both.")
    differences = {problem: of_b[problem] - of_a[problem] for problem in common}
    interval = paired_interval([differences])
    return Difference(
        problems=len(common),
        a=fmean(of_a[problem] for problem in common),
        b=fmean(of_b[problem] for problem in common),
        low=interval.low,
        high=interval.high,
        better=sum(d > 0 for d in differences.values()),
        worse=sum(d < 0 for d in differences.values()),
    )


def finished_evaluations(run_dir: Path) -> dict[int, Path]:
    """Step -> folder of a run's finished evaluations of its student, in the order of steps."""
    folders = [summary.parent for summary in (run_dir / "eval").glob("step_*/summary.json")]
    return dict(sorted((step, folder) for folder in folders if (step := step_number(folder)) is not None))


def evaluation_folder(path: Path) -> Path:
    """The folder itself if it holds an evaluation, else the last finished evaluation of the run in it.

    Raises InputError when there is neither.
    """
    if (path / "summary.json").exists() and not (path / "eval").is_dir():
        return path
    finished = finished_evaluations(path)
    if not finished:
        raise InputError(
            f"{path}: no finished evaluation in it. Expected a run folder, or the folder of an evaluation."
        )
    return finished[max(finished)]


def command(arguments: list[str]) -> None:
    options = COMMANDS["compare"].parser().parse_args(arguments)
    folders = [evaluation_folder(path) for path in (options.a, options.b)]
    a, b = (read_summary(folder) for folder in folders)
    common = sorted(a.keys() & b.keys())
    if not common:
        raise InputError(f"{folders[0]} and {folders[1]} have no benchmark in common: {[sorted(a), sorted(b)]}.")
    for name in common:
        if any(a[name].get(key) != b[name].get(key) for key in SAME_WAY):
            raise InputError(
                f"{name} was not measured the same way in {folders[0]} and {folders[1]} (see summary.json)."
            )
    print(
        f"A: {folders[0]}\nB: {folders[1]}\n"
        "B - A in points with a 95 % interval over problems only: it says nothing about another training\n"
    )
    for name in common:
        for figure, measure in MEASURES.items():
            if a[name].get(figure) is not None and b[name].get(figure) is not None:
                d = compare(*folders, name, figure)
                gap = f"{100 * (d.b - d.a):+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
                wins = f"better on {d.better}, worse on {d.worse} of {d.problems}"
                print(f"{name} {measure.label}: A {100 * d.a:.1f}, B {100 * d.b:.1f}, difference {gap}; {wins}")


if __name__ == "__main__":
    main(command)
