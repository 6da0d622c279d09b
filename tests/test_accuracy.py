"""The interval of a paired difference: by hand, what it must not claim, and how often it is right."""

import math
import statistics

import numpy as np
import pytest

from opd.accuracy import Interval, paired_interval


def named(table):
    """Rows of numbers, one a seed, as problem id -> difference."""
    return [{f"p{number}": float(value) for number, value in enumerate(row)} for row in table]


def width(found):
    return found.high - found.low


def t_of(degrees):
    """The 97.5 % quantile of Student's t: its density by Simpson's rule, and bisection."""

    def below(t, pieces=2000):
        scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
        total = 0.0
        for i in range(pieces + 1):
            weight = 1 if i in (0, pieces) else 4 if i % 2 else 2
            total += weight * scale * (1 + (i * t / pieces) ** 2 / degrees) ** (-(degrees + 1) / 2)
        return 0.5 + total * t / pieces / 3

    low, high = 1.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < 0.975 else (low, middle)
    return low


def by_hand(table):
    """(mean, half width) of S x P differences, by loops."""
    seeds, problems = len(table), len(table[0])
    mean = sum(sum(row) for row in table) / (seeds * problems)
    row_means = [sum(row) / problems for row in table]
    column_means = [sum(row[p] for row in table) / seeds for p in range(problems)]
    of_seeds = problems * sum((m - mean) ** 2 for m in row_means) / (seeds - 1)
    of_problems = seeds * sum((m - mean) ** 2 for m in column_means) / (problems - 1)
    rest = 0.0
    for s in range(seeds):
        for p in range(problems):
            rest += (table[s][p] - row_means[s] - column_means[p] + mean) ** 2
    rest /= (seeds - 1) * (problems - 1)
    a, c = max(of_seeds, rest / 50), max(of_problems - rest, 0.0)
    degrees = 1 / (a / (a + c) / (seeds - 1) + c / (a + c) / (problems - 1))
    return mean, t_of(degrees) * math.sqrt((a + c) / (seeds * problems))


SHARED = [[0.5, -0.25, 0.0, 0.25, 0.0], [0.5, -0.25, 0.25, 0.0, 0.25], [0.75, 0.0, 0.25, 0.25, 0.25]]
NOISE = [[0.5, -0.25, 0.0, 0.25, 0.0], [-0.25, 0.25, 0.25, -0.5, 0.0], [0.0, 0.5, -0.25, 0.25, 0.25]]
EVEN = [[0.25, -0.25, 0.0, 0.25], [0.0, 0.25, -0.25, 0.25], [0.25, 0.25, -0.25, 0.0]]  # every seed's mean is 1/16


@pytest.mark.parametrize("table", [SHARED, NOISE, EVEN, SHARED[:2], [*SHARED, *NOISE]])
def test_several_seeds_by_hand(table):
    found = paired_interval(named(table))
    mean, half = by_hand(table)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-6)
    assert found.covers == "new seeds and new problems" and found.problems == len(table[0])
    assert found.by_seed == pytest.approx([statistics.fmean(row) for row in table])


def test_three_seeds_of_noise_have_students_interval_with_two_degrees_of_freedom():
    means = [statistics.fmean(row) for row in NOISE]
    half = 4.302653 * statistics.stdev(means) / math.sqrt(3)  # from a table of t
    found = paired_interval(named(NOISE))
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=1e-6)


def test_one_seed_is_over_problems_only():
    found = paired_interval(named([[1, 0, 0, -1, 1, 0, 0, 1, 0, 0]]))
    half = 2.262157 * statistics.stdev([1, 0, 0, -1, 1, 0, 0, 1, 0, 0]) / math.sqrt(10)  # t of 9 degrees of freedom
    assert found.covers == "problems only" and found.by_seed == (0.2,)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-6)


def test_shared_problems_are_drawn_once_however_many_seeds_there_are():
    """Seeds that agree on every problem say no more about new problems than one of them does."""
    effects = np.random.default_rng(0).uniform(-0.5, 0.5, 100)
    once, often = paired_interval(named([effects])), paired_interval(named([effects] * 8))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    each_its_own = 2 * 1.96 * effects.std(ddof=1) / math.sqrt(8 * 100)  # as if every seed had drawn its problems anew
    assert width(often) > 2.5 * each_its_own


def test_a_spread_of_seeds_counts_in_full_and_equal_seeds_do_not_make_an_interval_vanish():
    apart = paired_interval(named([[value] * 50 for value in (0.0, 0.2, 0.4, 0.6)]))
    half = 3.182446 * statistics.stdev([0.0, 0.2, 0.4, 0.6]) / 2
    assert (apart.low, apart.high) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-6)
    assert width(paired_interval(named(EVEN))) > 0.1


def test_the_order_of_seeds_and_problems_changes_nothing():
    rng = np.random.default_rng(0)
    table = rng.integers(-1, 2, (4, 60))
    first = paired_interval(named(table))
    for _ in range(5):
        seeds = rng.permutation(4)
        shuffled = [list(named(table)[s].items()) for s in seeds]
        for items in shuffled:
            rng.shuffle(items)
        found = paired_interval([{key: float(value) for key, value in items} for items in shuffled])
        assert (found.mean, found.low, found.high) == pytest.approx((first.mean, first.low, first.high), abs=1e-12)
        assert found.by_seed == pytest.approx([first.by_seed[s] for s in seeds])


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1.0])
@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_constant_differences_have_no_width(value, seeds):
    found = paired_interval(named([[value] * 30] * seeds))
    assert (found.mean, found.low, found.high) == pytest.approx((value, value, value), abs=1e-12)


def test_the_problems_that_all_seeds_have_count():
    first, second, third = named(SHARED)
    more = [first | {"x": 1.0}, second | {"y": -1.0}, third | {"x": 1.0, "y": 1.0}]
    assert paired_interval(more) == paired_interval([first, second, third])
    assert isinstance(paired_interval(more), Interval)


def test_what_leaves_everything_open_says_so_and_nothing_goes_beyond_shares():
    for seeds in (1, 3):
        found = paired_interval([{"p": 0.5}] * seeds)
        assert (found.mean, found.low, found.high) == (0.5, -1, 1)
    found = paired_interval(named([[1, 1], [1, -1]]))
    assert found.low == -1 and found.high == 1


@pytest.mark.parametrize(
    "differences,message",
    [
        ([], "got no seed, expected"),
        ([{}], r"got seeds of \[0\] problems"),
        ([{"p": 0.0}, {"q": 0.0, "r": 0.0}], r"got seeds of \[1, 2\] problems and none in all of them, expected"),
        ([{"p": 0.0, "q": 12.5}], r"got a difference of 12.5, expected differences of shares, in \[-1, 1\]"),
        ([{"p": math.nan}], "got a difference of nan"),
    ],
)
def test_what_is_no_table_of_differences_is_refused(differences, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(differences)


# --- how often the interval holds the truth ---------------------------------------------------------------------------
PROBLEMS = 200
TRUTH = 0.03
VISIBLE = 0.02 * math.sqrt(PROBLEMS)  # problem effects of this deviation move the mean over the problems by 2 points


def simulated(rng, seeds, samples, seed=0.0, problem=0.0, difficulty=None, problems=PROBLEMS):
    """(seeds, problems) differences of two arms' mean accuracies over binary samples, whose mean over everything is
    TRUTH.

    Args:
        samples: per problem and arm; 1 is greedy.
        seed: standard deviation of the seeds' effects.
        problem: standard deviation of the effects of problems on the difference, shared by the seeds.
        difficulty: parameter of a symmetric Beta from which the problems' probabilities come; None: all are 1/2.
    """
    gain = TRUTH + rng.normal(0, seed, (seeds, 1)) * np.ones(problems)
    if problem:
        shape = (1 / problem**2 - 1) / 2  # 2 Beta(shape, shape) - 1 has this deviation and stays within (-1, 1)
        gain = gain + 2 * rng.beta(shape, shape, problems) - 1
    middle = 0.5
    if difficulty is not None:  # a U, drawn in as far as both arms' probabilities need to lie in [0, 1]
        middle = abs(gain) / 2 + (1 - abs(gain)) * rng.beta(difficulty, difficulty, problems)
    arm, base = (np.clip(middle + sign * gain / 2, 0, 1) for sign in (1, -1))
    return (rng.binomial(samples, arm) - rng.binomial(samples, base)) / samples


SITUATIONS = {
    "noise only": {},
    "seeds 2": {"seed": 0.02},
    "seeds 5": {"seed": 0.05},
    "problems 2 each": {"problem": 0.02},
    "problems 28 each, the mean 2": {"problem": VISIBLE},
    "seeds 2 and problems": {"seed": 0.02, "problem": VISIBLE},
    "seeds 5 and problems": {"seed": 0.05, "problem": VISIBLE},
    "unequal difficulty": {"difficulty": 0.3},
    "unequal difficulty, seeds 2 and problems": {"difficulty": 0.5, "seed": 0.02, "problem": VISIBLE},
}


def coverage(rng, trials, seeds, samples, **situation):
    inside = 0
    for _ in range(trials):
        found = paired_interval(named(simulated(rng, seeds, samples, **situation)))
        inside += found.low <= TRUTH <= found.high
    return inside / trials


def test_one_seed_is_right_in_95_percent_of_new_problems():
    rng = np.random.default_rng(0)
    assert 0.935 <= coverage(rng, 2000, 1, 4, difficulty=1.0, problem=0.2) <= 0.965


@pytest.mark.slow
def test_several_seeds_are_right_in_95_percent_of_new_seeds_and_new_problems(capsys):
    """2000 experiments each: the standard error of a coverage is 0.0049 at 0.95."""
    rng = np.random.default_rng(0)
    found = {
        (name, seeds, samples): coverage(rng, 2000, seeds, samples, **situation)
        for name, situation in SITUATIONS.items()
        for seeds, samples in ((3, 1), (8, 1), (3, 4))
    }
    with capsys.disabled():
        for (name, seeds, samples), share in found.items():
            print(f"\n{name}, {seeds} seeds, {samples} samples: {share:.3f}", end="")
    assert all(0.93 <= share <= 0.97 for share in found.values())
