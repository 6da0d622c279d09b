"""Is one run better than another on the same problems? `python -m opd.compare RUN RUN` (B minus A)

Every problem is one pair: the two models' mean accuracy on it (over its samples, or of the greedy response). The
interval (opd.accuracy) is over problems only, which are what a benchmark samples: it says nothing about another
training. Runs share the random numbers of their samples, so the pairs are tight.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from opd.accuracy import paired_interval
from opd.benchmarks import GREEDY
from opd.cli import Parser, main, path_argument
from opd.errors import InputError
from opd.evaluate import read_responses, read_summary
from opd.files import step_number

SAME_WAY = ("benchmark", "grader", "seed")  # figures that say how a benchmark was measured
METRICS = {"greedy": "greedy", "mean_at_k": "mean@k"}  # figure of an evaluation -> how it is written


@dataclass(frozen=True)
class Difference:
    """Of mean accuracies in [0, 1], B minus A."""

    problems: int
    a: float
    b: float
    low: float  # of the 95 % interval of the difference, over problems only
    high: float
    better: int  # problems on which B is better
    worse: int


def per_problem(path: Path, greedy: bool) -> dict[str, float]:
    """Problem id -> mean accuracy over its samples (or of its greedy response); an ungraded answer counts as wrong.

    Raises:
        InputError: the file cannot be read, or a line of it is not a graded response.
    """
    groups: dict[str, list[float]] = {}
    for row in read_responses(path):
        if (row["sample"] == GREEDY) == greedy:
            groups.setdefault(row["id"], []).append(float(row["correct"] or 0))
    return {key: sum(values) / len(values) for key, values in groups.items()}


def compare(a: Path, b: Path, name: str, greedy: bool = False) -> Difference:
    """Compares two evaluation folders on one benchmark.

    Raises:
        InputError: they hold no common problems, or their responses cannot be read.
    """
    ours, theirs = (per_problem(folder / f"{name}.jsonl", greedy) for folder in (a, b))
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        what = "greedy response" if greedy else "sampled response"
        raise InputError(f"{a} and {b} have no problem of {name} with a {what} in both.")
    difference = {key: theirs[key] - ours[key] for key in common}
    interval = paired_interval([difference])
    return Difference(
        problems=len(common),
        a=fmean(ours[key] for key in common),
        b=fmean(theirs[key] for key in common),
        low=interval.low,
        high=interval.high,
        better=sum(d > 0 for d in difference.values()),
        worse=sum(d < 0 for d in difference.values()),
    )


def finished_evaluations(run_dir: Path) -> dict[int, Path]:
    """Step -> folder of a run's finished evaluations of its student, in the order of steps."""
    folders = [summary.parent for summary in (run_dir / "eval").glob("step_*/summary.json")]
    return dict(sorted((step, folder) for folder in folders if (step := step_number(folder)) is not None))


def evaluation_folder(path: Path) -> Path:
    """The folder itself if it holds an evaluation, else the last finished evaluation of the run in it.

    Raises:
        InputError: there is neither.
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
    parser = Parser("python -m opd.compare", __doc__.splitlines()[0])
    parser.add_argument("a", type=path_argument, metavar="RUN")
    parser.add_argument("b", type=path_argument, metavar="RUN")
    options = parser.parse_args(arguments)
    folders = [evaluation_folder(path) for path in (options.a, options.b)]
    ours, theirs = (read_summary(folder) for folder in folders)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise InputError(
            f"{folders[0]} and {folders[1]} have no benchmark in common: {[sorted(ours), sorted(theirs)]}."
        )
    for name in shared:
        if any(ours[name][key] != theirs[name][key] for key in SAME_WAY):
            raise InputError(
                f"{name} was not measured the same way in {folders[0]} and {folders[1]} (see summary.json)."
            )
    print(
        f"A: {folders[0]}\nB: {folders[1]}\n"
        "B - A in points with a 95 % interval over problems only: it says nothing about another training\n"
    )
    for name in shared:
        for metric, label in METRICS.items():
            if ours[name][metric] is not None and theirs[name][metric] is not None:
                d = compare(*folders, name, greedy=metric == "greedy")
                gap = f"{100 * (d.b - d.a):+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
                wins = f"better on {d.better}, worse on {d.worse} of {d.problems}"
                print(f"{name} {label}: A {100 * d.a:.1f}, B {100 * d.b:.1f}, difference {gap}; {wins}")


if __name__ == "__main__":
    main(command)
