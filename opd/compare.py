"""Is one run better than another on the same problems? `python -m opd.compare RUN RUN` (B minus A)

Every problem gives one pair: the two models' accuracies on it, over its samples or of its greedy response. A benchmark
is a sample of problems, and the interval (opd.accuracy) is over problems only. So it says nothing about another
training. Runs share the random numbers of their samples, which makes the differences of the pairs smaller.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from opd.accuracy import paired_interval
from opd.benchmarks import GREEDY
from opd.cli import main
from opd.commands import COMMANDS
from opd.errors import InputError
from opd.evaluate import read_responses, read_summary
from opd.files import step_number

SAME_WAY = (
    "benchmark",
    "grader",
    "environment",
    "seed",
)  # the entries of a summary that say how a benchmark was measured
METRICS = {"greedy": "greedy", "mean_at_k": "mean@k"}  # figure of a summary -> its name for people


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


def per_problem(path: Path, greedy: bool) -> dict[str, float]:
    """Problem id -> accuracy of its greedy response, or mean accuracy of its samples. An ungraded answer is not right.

    Raises InputError when the file cannot be read, or a line of it is not a graded response.
    """
    accuracies = defaultdict(list)
    for row in read_responses(path):
        if (row["sample"] == GREEDY) == greedy:
            accuracies[row["id"]].append(float(row["correct"] or 0))
    return {problem: sum(numbers) / len(numbers) for problem, numbers in accuracies.items()}


def compare(a: Path, b: Path, name: str, greedy: bool = False) -> Difference:
    """Compares two evaluation folders on one benchmark.

    Raises InputError when they have no problem in common, or when their responses cannot be read.
    """
    of_a, of_b = (per_problem(folder / f"{name}.jsonl", greedy) for folder in (a, b))
    common = sorted(of_a.keys() & of_b.keys())
    if not common:
        kind = "greedy response" if greedy else "sampled response"
        raise InputError(f"{a} and {b} have no problem of {name} with a {kind} in both.")
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
        for figure, label in METRICS.items():
            if a[name][figure] is not None and b[name][figure] is not None:
                d = compare(*folders, name, greedy=figure == "greedy")
                gap = f"{100 * (d.b - d.a):+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
                wins = f"better on {d.better}, worse on {d.worse} of {d.problems}"
                print(f"{name} {label}: A {100 * d.a:.1f}, B {100 * d.b:.1f}, difference {gap}; {wins}")


if __name__ == "__main__":
    main(command)
