"""TipWeighter: the importance rules behind opd's patch point."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd.hooks import TokenStats, TokenWeights
from tip import scores, select, taxonomy
from tip.config import TipConfig


@dataclass(frozen=True)
class Rule:
    """A score per token, and how scores become a selection."""

    needs: frozenset[str]  # TokenStats fields the score reads
    mechanic: Literal["all", "top", "sample"]
    score: Callable[[TokenStats, TipConfig], Tensor]  # (N,), higher is kept; for "sample" a weight >= 0


def equal_score(stats: TokenStats, config: TipConfig) -> Tensor:
    return torch.ones(len(stats.position))


def entropy_score(stats: TokenStats, config: TipConfig) -> Tensor:
    """h, not clipped: a cap would make ties of the most uncertain tokens."""
    return scores.entropy_axis(stats, None)


def soft_or_score(stats: TokenStats, config: TipConfig) -> Tensor:
    h = scores.min_max(scores.entropy_axis(stats, config.entropy_clip_quantile))
    d = scores.min_max(scores.divergence_axis(stats, config.divergence_clip_quantile))
    return scores.soft_or(h, d)


ENTROPY, BOTH = frozenset({"student_entropy"}), frozenset({"student_entropy", "reverse_kl"})
RULES = {  # name -> rule; a name must also stand in tip.config.RuleName
    "all": Rule(frozenset(), "all", equal_score),
    "random": Rule(frozenset(), "sample", equal_score),
    "entropy_sampling": Rule(ENTROPY, "sample", entropy_score),
    "entropy_topk": Rule(ENTROPY, "top", entropy_score),
    "soft_or": Rule(BOTH, "top", soft_or_score),
}


class TipWeighter:
    """Keeps the tokens a rule selects, with equal weight; reports what that does to the quadrants when it can see them."""

    def __init__(self, config: TipConfig):
        self.config = config
        self.rule = RULES[config.rule]
        self.needs = self.rule.needs

    def __call__(self, stats: TokenStats, generator: torch.Generator) -> TokenWeights:
        kept = self._select(stats, generator)
        weights = kept.float()
        if self.config.aggregation == "rollout_mean":
            _, inverse = torch.unique(stats.sequence_id, return_inverse=True)
            per_rollout = torch.zeros(int(inverse.max()) + 1 if len(inverse) else 0).index_add_(0, inverse, weights)
            weights = weights / per_rollout[inverse].clamp(min=1)
        metrics = {"tip/retained": weights.gt(0).double().mean().item() if len(weights) else 0.0}
        if stats.student_entropy is not None and stats.reverse_kl is not None and len(weights):
            h = scores.entropy_axis(stats, self.config.entropy_clip_quantile)
            d = scores.divergence_axis(stats, self.config.divergence_clip_quantile)
            metrics.update(taxonomy.describe(taxonomy.quadrants(h, d), stats.reverse_kl, kept))
        return TokenWeights(weights=weights, metrics=metrics)

    def _select(self, stats: TokenStats, generator: torch.Generator) -> Tensor:
        score = self.rule.score(stats, self.config)
        if self.rule.mechanic == "all":
            return torch.ones(len(score), dtype=torch.bool)
        if self.rule.mechanic == "top":
            return select.top(score, stats.sequence_id, self.config.retention, self.config.budget)
        return select.sample(score, stats.sequence_id, self.config.retention, generator, self.config.budget)
