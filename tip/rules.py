"""The importance rules: which tokens of an update count, and how much.

A rule is a function that scores every token, and an entry of RULES at the end of this file. A rule of your own is one
more function and one more entry.

Shapes: a function takes the statistics of N tokens and their axes, which are entropy and divergence mapped to [0, 1]
(tip.scores.Axes). It returns one number per token, (N,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd.hooks import TokenStats
from tip import scores, taxonomy
from tip.scores import Axes

EOPD_ENTROPY = 0.8  # nats of teacher entropy (EOPD, arXiv 2603.07079)
Score = Callable[[TokenStats, Axes], Tensor]


@dataclass(frozen=True)
class Rule:
    """An entry of RULES: what a rule reads, and how its scores become token weights.

    The mechanic "top" keeps the tokens of highest score. The mechanic "sample" draws tokens one after another
    without replacement, each time with probability proportional to the score among those left. With the mechanic
    "weights" the scores are the token weights themselves, and the retention changes nothing.
    """

    needs: frozenset[str]  # fields of TokenStats that the functions read, directly or through `axes`
    mechanic: Literal["top", "sample", "weights"]
    score: Score
    forward_share: Score | None = None  # share of forward KL in the loss of a token, in [0, 1]; None means 0
    budget: Literal["per_rollout", "per_update"] = (
        "per_rollout"  # of what the retention is a share; tip.budget overrides it
    )


def equal(stats: TokenStats, axes: Axes) -> Tensor:
    return torch.ones(len(stats.position))


def bottom(score: Score) -> Score:
    """The negated score, which turns "keep the highest" into "keep the lowest"."""
    return lambda stats, axes: -score(stats, axes)


def entropy(stats: TokenStats, axes: Axes) -> Tensor:
    """Student entropy divided by ln V. It is not clipped, because a cap would tie the most uncertain tokens."""
    return stats.student_entropy / math.log(stats.vocab_size)


def divergence(stats: TokenStats, axes: Axes) -> Tensor:
    return stats.reverse_kl


def soft_or(stats: TokenStats, axes: Axes) -> Tensor:
    return scores.soft_or(axes.entropy, axes.divergence)


def q3(stats: TokenStats, axes: Axes) -> Tensor:
    """KL(P_T || P_S) (1 - h). Forward KL only detects confident mistakes here; the loss stays the configured one."""
    return stats.forward_kl.double() * (1 - axes.entropy)


def in_quadrants(stats: TokenStats, axes: Axes) -> Tensor:
    """1 in the quadrants that tip.quadrants names, else 0."""
    return torch.isin(taxonomy.of(axes).quadrant, torch.tensor(axes.config.quadrants)).float()


def teachability(stats: TokenStats, axes: Axes) -> Tensor:
    """Disagreement on the union of both models' top 16, times the teacher's mass on the student's top 16 (TA-OPD)."""
    return axes.unit("overlap_kl") * axes.unit("teacher_topk_mass")


def product(stats: TokenStats, axes: Axes) -> Tensor:
    h, jsd = entropy(stats, axes).double(), stats.jsd.double() / math.log(2)
    return h**axes.config.product_alpha * jsd**axes.config.product_gamma


def uncertain_teacher(stats: TokenStats) -> Tensor:
    return (stats.teacher_entropy > EOPD_ENTROPY).float()


def eopd_weight(stats: TokenStats, axes: Axes) -> Tensor:
    """EOPD adds forward KL to the divergence where the teacher is uncertain: weight 2 there, half of it forward KL.

    The denominator of the update counts 2 there as well.
    """
    return 1 + uncertain_teacher(stats)


def eopd_share(stats: TokenStats, axes: Axes) -> Tensor:
    return uncertain_teacher(stats) / 2


def aopd_share(stats: TokenStats, axes: Axes) -> Tensor:
    """AOPD takes forward KL where the teacher finds the sampled token no likelier than the student does.

    Where the loss is forward KL already, it changes nothing.
    """
    return (stats.teacher_logprob <= stats.student_logprob).float()


def total_variation(stats: TokenStats, axes: Axes) -> Tensor:
    return stats.total_variation.clamp(0, 1)


ENTROPY, BOTH_AXES = frozenset({"student_entropy"}), frozenset({"student_entropy", "reverse_kl"})

RULES = {  # name: Rule(fields that it reads, mechanic, score, share of forward KL, budget)
    "all": Rule(frozenset(), "weights", equal),
    "random": Rule(frozenset(), "sample", equal),
    "entropy_sampling": Rule(ENTROPY, "sample", entropy),
    "entropy_topk": Rule(ENTROPY, "top", entropy),
    "soft_or": Rule(BOTH_AXES, "top", soft_or),
    "soft_or_sampling": Rule(BOTH_AXES, "sample", soft_or),
    "soft_or_bottom": Rule(BOTH_AXES, "top", bottom(soft_or)),
    "divergence": Rule(frozenset({"reverse_kl"}), "top", divergence),
    "divergence_bottom": Rule(frozenset({"reverse_kl"}), "top", bottom(divergence)),
    "q3": Rule(frozenset({"student_entropy", "forward_kl"}), "top", q3),
    "quadrant": Rule(BOTH_AXES, "weights", in_quadrants),
    "teachability": Rule(frozenset({"overlap_kl", "teacher_topk_mass"}), "top", teachability, budget="per_update"),
    "product": Rule(frozenset({"student_entropy", "jsd"}), "sample", product),
    "eopd": Rule(frozenset({"teacher_entropy"}), "weights", eopd_weight, eopd_share),
    "aopd": Rule(frozenset({"student_logprob", "teacher_logprob"}), "weights", equal, aopd_share),
    "total_variation": Rule(frozenset({"total_variation"}), "top", total_variation, total_variation, "per_update"),
}
