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
from tip.divergences import AXIS, divergence_of
from tip.rollouts import rows_of
from tip.scores import Axes

EOPD_ENTROPY = 0.8  # nats of teacher entropy (EOPD, arXiv 2603.07079)
PerToken = Callable[[TokenStats, Axes], Tensor]  # a function that returns one number per token


@dataclass(frozen=True)
class Rule:
    """An entry of RULES: what a rule reads, and how its scores become token weights.

    The mechanic "top" keeps the tokens of highest score. The mechanic "sample" draws tokens one after another
    without replacement, each time with probability proportional to the score among those left. With the mechanic
    "weights" the scores are the token weights themselves, and the retention changes nothing.
    """

    needs: frozenset[str]  # fields of TokenStats that the functions read, directly or through `axes`; AXIS is d
    mechanic: Literal["top", "sample", "weights"]
    score: PerToken
    forward_share: PerToken | None = None  # share of forward KL in the loss of a token, in [0, 1]; None means 0
    budget: Literal["per_rollout", "per_update"] = (
        "per_rollout"  # of what the retention is a share; tip.budget overrides it
    )


def equal(stats: TokenStats, axes: Axes) -> Tensor:
    return torch.ones(len(stats.position))


def bottom(score: PerToken) -> PerToken:
    """The negated score, which turns "keep the highest" into "keep the lowest"."""
    return lambda stats, axes: -score(stats, axes)


def entropy(stats: TokenStats, axes: Axes) -> Tensor:
    """Student entropy divided by ln V. It is not clipped, because a cap would tie the most uncertain tokens."""
    return stats.student_entropy / math.log(stats.vocab_size)


def divergence(stats: TokenStats, axes: Axes) -> Tensor:
    return divergence_of(stats, axes.config.axis)


def soft_or(stats: TokenStats, axes: Axes) -> Tensor:
    return scores.soft_or(axes.entropy, axes.divergence)


def q3(stats: TokenStats, axes: Axes) -> Tensor:
    """KL(P_T || P_S) (1 - h), whatever tip.axis is.

    Forward KL only detects confident mistakes here; the loss stays the configured one.
    """
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


def log_ratio(stats: TokenStats) -> Tensor:
    """log q/p of the sampled token, with q of the teacher and p of the student."""
    return stats.teacher_logprob - stats.student_logprob


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
    """AOPD takes forward KL where log q/p of the sampled token is no larger than a threshold.

    With the threshold 0 the teacher finds it no likelier than the student does. Where the loss is forward KL already,
    the rule changes nothing.
    """
    return (log_ratio(stats) <= axes.config.aopd_threshold).float()


def earliest(stats: TokenStats, axes: Axes) -> Tensor:
    return -stats.position.float()


def last_turn(stats: TokenStats, axes: Axes) -> Tensor:
    """1 in the last turn of each rollout, else 0. A response without an environment is one turn."""
    first_R, rollout_N = rows_of(stats.sequence_id)
    last_R = torch.zeros(len(first_R), dtype=torch.int64).scatter_reduce(0, rollout_N, stats.turn, "amax")
    return (stats.turn == last_R[rollout_N]).float()


def first_turns(stats: TokenStats, axes: Axes) -> Tensor:
    """1 in every turn but the last of each rollout, else 0. In an agent's rollouts these are the turns with calls."""
    return 1 - last_turn(stats, axes)


def early_disagreement(stats: TokenStats, axes: Axes) -> Tensor:
    """IW-OPD: 1 + g (1 - the share of the response's sum of |log q/p| that lies up to this token)."""
    first_R, rollout_N = rows_of(stats.sequence_id)
    size_N = log_ratio(stats).double().abs()
    sum_R = torch.zeros(len(first_R), dtype=torch.float64).index_add(0, rollout_N, size_N)
    upto_N = size_N.cumsum(0)
    share_N = (upto_N - (upto_N - size_N)[first_R][rollout_N]) / sum_R[rollout_N]
    return 1 + axes.config.iw_gain * (1 - share_N.nan_to_num(0.0))  # 0 / 0 where the models agree on every token


def trust(stats: TokenStats, axes: Axes) -> Tensor:
    """TrOPD: min(q/p, 1) of the sampled token."""
    return log_ratio(stats).clamp(max=0).exp()


def total_variation(stats: TokenStats, axes: Axes) -> Tensor:
    return stats.total_variation.clamp(0, 1)


ENTROPY, BOTH_AXES = frozenset({"student_entropy"}), frozenset({"student_entropy", AXIS})
SAMPLED = frozenset({"student_logprob", "teacher_logprob"})

RULES = {  # name: Rule(fields that it reads, mechanic, score, share of forward KL, budget)
    "all": Rule(frozenset(), "weights", equal),
    "random": Rule(frozenset(), "sample", equal),
    "entropy_sampling": Rule(ENTROPY, "sample", entropy),
    "entropy_topk": Rule(ENTROPY, "top", entropy),
    "soft_or": Rule(BOTH_AXES, "top", soft_or),
    "soft_or_sampling": Rule(BOTH_AXES, "sample", soft_or),
    "soft_or_bottom": Rule(BOTH_AXES, "top", bottom(soft_or)),
    "divergence": Rule(frozenset({AXIS}), "top", divergence),
    "divergence_bottom": Rule(frozenset({AXIS}), "top", bottom(divergence)),
    "q3": Rule(frozenset({"student_entropy", "forward_kl"}), "top", q3),
    "quadrant": Rule(BOTH_AXES, "weights", in_quadrants),
    "teachability": Rule(frozenset({"overlap_kl", "teacher_topk_mass"}), "top", teachability, budget="per_update"),
    "product": Rule(frozenset({"student_entropy", "jsd"}), "sample", product),
    "eopd": Rule(frozenset({"teacher_entropy"}), "weights", eopd_weight, eopd_share),
    "aopd": Rule(SAMPLED, "weights", equal, aopd_share),
    "first_k": Rule(frozenset(), "top", earliest),
    "first_turns": Rule(frozenset(), "weights", first_turns),
    "last_turn": Rule(frozenset(), "weights", last_turn),
    "iw_opd": Rule(SAMPLED, "weights", early_disagreement),
    "tropd": Rule(SAMPLED, "weights", trust),
    "total_variation": Rule(frozenset({"total_variation"}), "top", total_variation, total_variation, "per_update"),
}
