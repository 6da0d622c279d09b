"""TipWeighter: the importance rules behind opd's patch point.

A rule is a score per token and a mechanic that makes a selection of scores; a few also say how much forward KL a
token's loss takes. A rule of your own is one function and one line in RULES (and its name in tip.config.RuleName).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd.cli import InputError
from opd.hooks import TokenStats, TokenWeights
from tip import scores, select, taxonomy
from tip.config import TipConfig

EOPD_ENTROPY = 0.8  # nats of teacher entropy: arXiv 2603.07079


@dataclass(frozen=True)
class Rule:
    """How a rule decides. Functions take (TokenStats, TipConfig) and return (N,)."""

    needs: frozenset[str]  # TokenStats fields that are read
    mechanic: Literal["top", "sample", "weights"]  # keep the highest; draw in proportion; the score is the weight
    score: Callable[[TokenStats, TipConfig], Tensor]
    forward_share: Callable[[TokenStats, TipConfig], Tensor] | None = None  # in [0, 1]
    budget: Literal["per_rollout", "per_update"] = "per_rollout"  # unless the config says otherwise


def equal(stats: TokenStats, config: TipConfig) -> Tensor:
    return torch.ones(len(stats.position))


def entropy(stats: TokenStats, config: TipConfig) -> Tensor:
    """h, not clipped: a cap would make ties of the most uncertain tokens."""
    return scores.entropy_axis(stats, None)


def soft_or(stats: TokenStats, config: TipConfig) -> Tensor:
    h = scores.normalise(scores.entropy_axis(stats, config.entropy_clip_quantile), config.normalization)
    d = scores.normalise(scores.divergence_axis(stats, config.divergence_clip_quantile), config.normalization)
    return scores.soft_or(h, d)


def soft_or_bottom(stats: TokenStats, config: TipConfig) -> Tensor:
    return -soft_or(stats, config)


def divergence(stats: TokenStats, config: TipConfig) -> Tensor:
    return stats.reverse_kl


def divergence_bottom(stats: TokenStats, config: TipConfig) -> Tensor:
    return -stats.reverse_kl


def q3(stats: TokenStats, config: TipConfig) -> Tensor:
    """KL(P_T || P_S) (1 - h): *forward* KL, as a detector of confident mistakes; the loss stays the configured one."""
    h = scores.normalise(scores.entropy_axis(stats, config.entropy_clip_quantile), config.normalization)
    return stats.forward_kl.double() * (1 - h)


def in_quadrants(stats: TokenStats, config: TipConfig) -> Tensor:
    """Weight 1 in the named quadrants, whatever the retention."""
    return torch.isin(taxonomy.of(stats, config).quadrant, torch.tensor(config.quadrants)).float()


def teachability(stats: TokenStats, config: TipConfig) -> Tensor:
    """Disagreement on the union of both models' top 16, times the teacher's mass on the student's top 16."""
    return scores.quantile_range(stats.overlap_kl) * scores.quantile_range(stats.teacher_topk_mass)


def product(stats: TokenStats, config: TipConfig) -> Tensor:
    h = scores.entropy_axis(stats, None).double()
    return h**config.product_alpha * (stats.jsd.double() / math.log(2)) ** config.product_gamma


def uncertain_teacher(stats: TokenStats) -> Tensor:
    return stats.teacher_entropy > EOPD_ENTROPY


def eopd_weight(stats: TokenStats, config: TipConfig) -> Tensor:
    """Reverse KL everywhere, plus forward KL where the teacher is uncertain: weight 2 and share 1/2 there."""
    return 1.0 + uncertain_teacher(stats).float()


def eopd_share(stats: TokenStats, config: TipConfig) -> Tensor:
    return 0.5 * uncertain_teacher(stats).float()


def aopd_share(stats: TokenStats, config: TipConfig) -> Tensor:
    """Forward KL where the teacher finds the sampled token no likelier than the student does."""
    return (stats.teacher_logprob <= stats.student_logprob).float()


def total_variation(stats: TokenStats, config: TipConfig) -> Tensor:
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


class TipWeighter:
    """Weighs the tokens as a rule says; reports what that does to the quadrants when it can see them.

    Raises InputError for a configuration whose keys do not go together.
    """

    def __init__(self, config: TipConfig):
        _check(config)
        self.config = config
        self.rule = RULES[config.rule]
        self.needs = self.rule.needs

    def __call__(self, stats: TokenStats, generator: torch.Generator) -> TokenWeights:
        weights = self._weights(stats, generator)
        kept = weights > 0
        if self.config.aggregation == "rollout_mean" and len(weights):
            _, rollout = torch.unique(stats.sequence_id, return_inverse=True)
            per_rollout = torch.zeros(int(rollout.max()) + 1).index_add_(0, rollout, weights)
            weights = weights / per_rollout[rollout].clamp(min=torch.finfo(weights.dtype).tiny)
        share = None if self.rule.forward_share is None else self.rule.forward_share(stats, self.config)
        metrics = {"tip/retained": kept.double().mean().item() if len(kept) else 0.0}
        if share is not None and kept.any():
            metrics["tip/forward_share"] = share[kept].double().mean().item()
        if stats.student_entropy is not None and stats.reverse_kl is not None and len(kept):
            metrics.update(taxonomy.describe(taxonomy.of(stats, self.config), stats.reverse_kl, kept))
        return TokenWeights(weights=weights, forward_share=share, metrics=metrics)

    def _weights(self, stats: TokenStats, generator: torch.Generator) -> Tensor:
        score = self.rule.score(stats, self.config)
        if self.rule.mechanic == "weights":
            return score
        retention, budget = self.config.retention_at(stats.step), self.config.budget or self.rule.budget
        if self.rule.mechanic == "top":
            return select.top(score, stats.sequence_id, retention, budget).float()
        return select.sample(score, stats.sequence_id, retention, generator, budget).float()


def _check(config: TipConfig) -> None:
    if (config.retention_end is None) != (config.retention_steps is None):
        raise InputError(
            f"tip: retention_end is {config.retention_end} and retention_steps is {config.retention_steps}: a schedule "
            "needs both, a constant retention neither."
        )
    given = (config.quadrant_entropy is not None, config.quadrant_divergence is not None)
    if (config.quadrant_threshold == "mean" and any(given)) or (config.quadrant_threshold != "mean" and not all(given)):
        raise InputError(
            f"tip: quadrant_threshold is {config.quadrant_threshold!r}, quadrant_entropy {config.quadrant_entropy} and "
            f"quadrant_divergence {config.quadrant_divergence}: mean takes neither, quantile and absolute take both."
        )
    if config.quadrant_threshold == "quantile" and config.quadrant_divergence > 1:
        raise InputError(f"tip: quadrant_divergence is {config.quadrant_divergence}, expected a quantile in [0, 1].")
    if not config.quadrants:
        raise InputError("tip: quadrants is empty, expected some of 1, 2, 3, 4.")
