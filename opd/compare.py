"""Is one run better than another on the same problems? `python -m opd.compare RUN RUN` (B minus A)

Every problem is one pair: the two models' mean accuracy on it (over its samples, or of the greedy response). The
interval is a bootstrap over problems, which are what a benchmark samples; runs share the random numbers of their
samples, so the pairs are tight.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opd.cli import InputError, main
from opd.evaluate import GREEDY

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """Of mean accuracies in [0, 1], B minus A."""

    problems: int
    a: float
    b: float
    low: float  # of the 95 % interval of the difference
    high: float
    better: int  # problems on which B is better
    worse: int


def paired_bootstrap(a: np.ndarray, b: np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of mean(b - a), resampling problems; a and b are (P,) per-problem accuracies."""
    difference = b - a
    rng = np.random.default_rng(seed)
    means = np.array([
        difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(RESAMPLES)
    ])  # fmt: skip
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def per_problem(path: Path, greedy: bool) -> dict[str, float]:
    """Problem id -> mean accuracy over its graded samples (or its greedy response)."""
    groups: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            if (row["sample"] == GREEDY) == greedy and row["correct"] is not None:
                groups.setdefault(row["id"], []).append(float(row["correct"]))
    return {key: sum(values) / len(values) for key, values in groups.items()}


def compare(a: Path, b: Path, name: str, greedy: bool = False) -> Difference:
    """Compares two evaluation folders on one benchmark. Raises InputError when they hold no common problems."""
    ours, theirs = (per_problem(folder / f"{name}.jsonl", greedy) for folder in (a, b))
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        what = "greedy response" if greedy else "sampled response"
        raise InputError(f"{a} and {b} have no problem of {name} with a graded {what} in both.")
    x, y = (np.array([side[key] for key in common]) for side in (ours, theirs))
    low, high = paired_bootstrap(x, y)
    return Difference(len(common), x.mean(), y.mean(), low, high, int((y > x).sum()), int((y < x).sum()))


def evaluation_folder(path: Path) -> Path:
    """The folder itself if it holds an evaluation, else the last evaluation of the run in it. Raises InputError."""
    if (path / "summary.json").exists() and not (path / "eval").is_dir():
        return path
    finished = [p.parent for p in sorted((path / "eval").glob("step_*/summary.json"))]
    if not finished:
        raise InputError(
            f"{path}: no finished evaluation in it. Expected a run folder, or the folder of an evaluation."
        )
    return finished[-1]


def command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m opd.compare", description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, metavar="RUN")
    parser.add_argument("b", type=Path, metavar="RUN")
    options = parser.parse_args(arguments)
    folders = [evaluation_folder(path) for path in (options.a, options.b)]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    shared = sorted(summaries[0].keys() & summaries[1].keys())
    if not shared:
        raise InputError(
            f"{folders[0]} and {folders[1]} have no benchmark in common: {[sorted(s) for s in summaries]}."
        )
    print(f"A: {folders[0]}\nB: {folders[1]}\nB - A in points, 95 % bootstrap interval over problems\n")
    for name in shared:
        if any(summaries[0][name][key] != summaries[1][name][key] for key in ("benchmark", "grader", "seed")):
            raise InputError(
                f"{name} was not measured the same way in {folders[0]} and {folders[1]} (see summary.json)."
            )
        for label, greedy, measured in (("greedy", True, "greedy"), ("mean@k", False, "mean_at_k")):
            if summaries[0][name][measured] is not None and summaries[1][name][measured] is not None:
                d = compare(*folders, name, greedy)
                gap = f"{100 * (d.b - d.a):+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
                wins = f"better on {d.better}, worse on {d.worse} of {d.problems}"
                print(f"{name} {label}: A {100 * d.a:.1f}, B {100 * d.b:.1f}, difference {gap}; {wins}")


if __name__ == "__main__":
    main(command)
