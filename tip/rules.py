"""The importance rules: a score per token, and a mechanic that makes a selection of scores.

A few rules also say how much forward KL a token's loss takes. A rule of your own is one function and one line in RULES.
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

EOPD_ENTROPY = 0.8  # nats of teacher entropy: arXiv 2603.07079


@dataclass(frozen=True)
class Rule:
    """How a rule decides. Functions take the statistics and their axes (tip.scores.Axes) and return (N,)."""

    needs: frozenset[str]  # TokenStats fields that are read
    mechanic: Literal["top", "sample", "weights"]  # keep the highest; draw in proportion; the score is the weight
    score: Callable[[TokenStats, Axes], Tensor]
    forward_share: Callable[[TokenStats, Axes], Tensor] | None = None  # in [0, 1]
    budget: Literal["per_rollout", "per_update"] = "per_rollout"  # unless the config says otherwise


def equal(stats: TokenStats, axes: Axes) -> Tensor:
    return torch.ones(len(stats.position))


def entropy(stats: TokenStats, axes: Axes) -> Tensor:
    """h, not clipped: a cap would make ties of the most uncertain tokens."""
    return stats.student_entropy / math.log(stats.vocab_size)


def soft_or(stats: TokenStats, axes: Axes) -> Tensor:
    return scores.soft_or(axes.entropy, axes.divergence)


def soft_or_bottom(stats: TokenStats, axes: Axes) -> Tensor:
    return -soft_or(stats, axes)


def divergence(stats: TokenStats, axes: Axes) -> Tensor:
    return stats.reverse_kl


def divergence_bottom(stats: TokenStats, axes: Axes) -> Tensor:
    return -stats.reverse_kl


def q3(stats: TokenStats, axes: Axes) -> Tensor:
    """KL(P_T || P_S) (1 - h): *forward* KL, as a detector of confident mistakes; the loss stays the configured one."""
    return stats.forward_kl.double() * (1 - axes.entropy)


def in_quadrants(stats: TokenStats, axes: Axes) -> Tensor:
    """Weight 1 in the named quadrants, whatever the retention."""
    return torch.isin(taxonomy.of(axes).quadrant, torch.tensor(axes.config.quadrants)).float()


def teachability(stats: TokenStats, axes: Axes) -> Tensor:
    """Disagreement on the union of both models' top 16, times the teacher's mass on the student's top 16."""
    return axes.unit("overlap_kl") * axes.unit("teacher_topk_mass")


def product(stats: TokenStats, axes: Axes) -> Tensor:
    h, jsd = entropy(stats, axes).double(), stats.jsd.double() / math.log(2)
    return h**axes.config.product_alpha * jsd**axes.config.product_gamma


def uncertain_teacher(stats: TokenStats) -> Tensor:
    return stats.teacher_entropy > EOPD_ENTROPY


def eopd_weight(stats: TokenStats, axes: Axes) -> Tensor:
    """Reverse KL everywhere, plus forward KL where the teacher is uncertain: weight 2 and share 1/2 there."""
    return 1.0 + uncertain_teacher(stats).float()


def eopd_share(stats: TokenStats, axes: Axes) -> Tensor:
    return 0.5 * uncertain_teacher(stats).float()


def aopd_share(stats: TokenStats, axes: Axes) -> Tensor:
    """Forward KL where the teacher finds the sampled token no likelier than the student does."""
    return (stats.teacher_logprob <= stats.student_logprob).float()


def total_variation(stats: TokenStats, axes: Axes) -> Tensor:
    return stats.total_variation.clamp(0, 1)


ENTROPY, BOTH = frozenset({"student_entropy"}), frozenset({"student_entropy", "reverse_kl"})
RULES = {
    "all": Rule(frozenset(), "weights", equal),
    "random": Rule(frozenset(), "sample", equal),
    "entropy_sampling": Rule(ENTROPY, "sample", entropy),
    "entropy_topk": Rule(ENTROPY, "top", entropy),
    "soft_or": Rule(BOTH, "top", soft_or),
    "soft_or_sampling": Rule(BOTH, "sample", soft_or),
    "soft_or_bottom": Rule(BOTH, "top", soft_or_bottom),
    "divergence": Rule(frozenset({"reverse_kl"}), "top", divergence),
    "divergence_bottom": Rule(frozenset({"reverse_kl"}), "top", divergence_bottom),
    "q3": Rule(frozenset({"student_entropy", "forward_kl"}), "top", q3),
    "quadrant": Rule(BOTH, "weights", in_quadrants),
    "teachability": Rule(frozenset({"overlap_kl", "teacher_topk_mass"}), "top", teachability, budget="per_update"),
    "product": Rule(frozenset({"student_entropy", "jsd"}), "sample", product),
    "eopd": Rule(frozenset({"teacher_entropy"}), "weights", eopd_weight, eopd_share),
    "aopd": Rule(frozenset({"student_logprob", "teacher_logprob"}), "weights", equal, aopd_share),
    "total_variation": Rule(frozenset({"total_variation"}), "top", total_variation, total_variation, "per_update"),
}


def known(name: str) -> str:
    """Refuses a name that is not in RULES (ValueError)."""
    if name not in RULES:
        raise ValueError(f"expected one of {', '.join(RULES)}")
    return name
