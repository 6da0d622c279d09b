"""Accuracies: pass@j, best@j and maj@k of a problem, the standard error of a mean, the interval of a difference."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
PROBLEMS_ONLY = "problems only"
SEEDS_AND_PROBLEMS = "new seeds and new problems"
SMALLEST_SEED_PART = 0.02  # of the residual mean square; by noise alone 2 % of all triples of seeds fall below it


def pass_at(n: int, right: int, j: int) -> float:
    """Probability that j of n samples, drawn without replacement, hold a right one: 1 - C(n - right, j) / C(n, j)."""
    return 1.0 - math.comb(n - right, j) / math.comb(n, j)


def best_at(shares: Sequence[float], j: int) -> float:
    """Expected largest of j of n numbers, drawn without replacement; it is unbiased for the best of j samples.

    The i-th smallest one is the largest of C(i - 1, j - 1) of the C(n, j) draws. For numbers of 0 and 1 it is pass@j.
    """
    draws = math.comb(len(shares), j)
    return sum(math.comb(i, j - 1) / draws * share for i, share in enumerate(sorted(shares)))


def majority(votes: Iterable[tuple[str | None, bool | None]]) -> float:
    """1 if the most frequent answer to a problem is right and 0 if not; of several equally frequent, the right share.

    Args:
        votes: per sample, the answer that it votes for and whether it is right. An answer of None casts no vote. An
            answer is right if one of its voters is, because another voter with the same text may be ungraded.
    """
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for answer, correct in votes:
        if answer is not None:
            verdicts[answer].append(correct is True)
    most = max(map(len, verdicts.values()), default=0)
    return statistics.fmean(any(right) for right in verdicts.values() if len(right) == most) if most else 0.0


def standard_error(numbers: Sequence[float]) -> float | None:
    """Standard error of the mean of independent numbers; None for fewer than two."""
    return statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else None


@dataclass(frozen=True)
class Interval:
    """The interval of a mean paired difference; all numbers are shares in [-1, 1]."""

    mean: float
    low: float
    high: float
    covers: str  # PROBLEMS_ONLY or SEEDS_AND_PROBLEMS: what is drawn anew, and 95 times in 100 the mean lies within
    by_seed: tuple[float, ...]  # every seed's mean over the same problems
    problems: int

    @property
    def points(self) -> tuple[float, float, float]:
        """Mean, low and high in points, which are hundredths."""
        return 100 * self.mean, 100 * self.low, 100 * self.high

    @property
    def wins(self) -> int:
        """On how many seeds the arm is better."""
        return sum(mean > 0 for mean in self.by_seed)


def paired_interval(differences: Sequence[Mapping[str, float]]) -> Interval:
    """The 95 % interval of a mean paired difference, an arm minus its baseline, over the problems that all seeds have.

    With S >= 2 seeds and P problems the model of the difference of seed s on problem p is y_sp = mu + a_s + b_p + e_sp.
    The seeds share the problems, so b_p does not average out over seeds. From the mean squares of the two-way table

        M_s = P sum_s (y_s. - y..)^2 / (S - 1)        M_p = S sum_p (y_.p - y..)^2 / (P - 1)
        M_e = sum_sp (y_sp - y_s. - y_.p + y..)^2 / ((S - 1) (P - 1))

    the variance of y.. is that of Clark's quasi-F (1973, J. of Verbal Learning and Verbal Behavior 12, 335-359),

        V = (A + C) / (S P)    with A = max(M_s, 0.02 M_e) and C = max(M_p - M_e, 0),

    and the interval is y.. +- t_f sqrt(V). No negative estimate of the problems' variance narrows it, and seeds whose
    means are equal by chance do not make it vanish. The degrees of freedom weigh those of the parts by their shares,

        1 / f = (A / (A + C)) / (S - 1) + (C / (A + C)) / (P - 1),

    where Satterthwaite (1946, Biometrics Bulletin 2, 110-114) weighs by the squares of the shares. With his f the
    interval held the mean in only 0.92 of simulated experiments of three seeds. There A rests on two degrees of
    freedom, and his f claims many where A happens to be small. With the f above the share is at least 0.94, and it is
    at most 0.965 (tests/test_accuracy.py).

    With one seed the interval is Student's over problems, y.. +- t_(P-1) sd / sqrt(P). It says nothing about another
    training. A single problem shows no spread, so its interval is all of [-1, 1].

    Args:
        differences: per seed, problem id -> difference of two shares in [0, 1]; a share is not a number of points.
    Raises:
        ValueError: there is no seed or no problem that all seeds have, or a difference is not in [-1, 1].
    """
    if not differences:
        raise ValueError("got no seed, expected the differences of at least one.")
    common = sorted(set.intersection(*(set(seed) for seed in differences)))
    if not common:
        sizes = [len(seed) for seed in differences]
        raise ValueError(
            f"got seeds of {sizes} problems and none in all of them, expected at least one common problem."
        )
    table = np.array([[seed[problem] for problem in common] for seed in differences], dtype=np.float64)
    wrong = table[~(np.abs(table) <= 1)]
    if wrong.size:
        raise ValueError(f"got a difference of {wrong[0]:g}, expected differences of shares, in [-1, 1].")
    mean, half = table.mean(), _half_width(table)
    return Interval(
        mean=float(mean),
        low=float(max(mean - half, -1)),
        high=float(min(mean + half, 1)),
        covers=PROBLEMS_ONLY if len(table) == 1 else SEEDS_AND_PROBLEMS,
        by_seed=tuple(map(float, table.mean(1))),
        problems=len(common),
    )


def _half_width(table: np.ndarray) -> float:
    """Half the width of the interval around the mean of an (S, P) table, as `paired_interval` says."""
    seeds, problems = table.shape
    if problems == 1:
        return math.inf
    if seeds == 1:
        return _t_quantile(problems - 1) * float(table.std(ddof=1)) / math.sqrt(problems)
    of_seeds, of_problems, mean = table.mean(1, keepdims=True), table.mean(0), table.mean()
    residual = np.square(table - of_seeds - of_problems + mean).sum() / ((seeds - 1) * (problems - 1))
    seed_part = max(problems * of_seeds.var(ddof=1), SMALLEST_SEED_PART * residual)
    problem_part = max(seeds * of_problems.var(ddof=1) - residual, 0.0)
    variance = seed_part + problem_part
    if variance == 0:
        return 0.0
    degrees = variance / (seed_part / (seeds - 1) + problem_part / (problems - 1))
    return _t_quantile(degrees) * math.sqrt(variance / (seeds * problems))


def _t_quantile(degrees: float) -> float:
    """The t for which a number of Student's distribution lies within +- t with probability LEVEL.

    `degrees` is at least 1 and need not be a whole number. With t = sqrt(degrees) tan(angle) the density of the angle
    is proportional to cos(angle)^(degrees - 1), which the trapezoidal rule sums up.
    """
    angles = np.linspace(0, math.pi / 2, 10_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(degrees) * math.tan(np.interp(LEVEL * below[-1], below, angles))
