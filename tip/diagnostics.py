"""What a selection does to the tokens of an update: diagnostics while training, and columns of token dumps."""

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from opd.hooks import Diagnosis, TokenStats, TokenWeights
from tip import select
from tip.config import TipConfig
from tip.rules import BOTH_AXES, RULES
from tip.scores import Axes, Spread
from tip.weighter import TipWeighter

RETENTIONS = (0.5, 0.2, 0.1)  # the paper's
LITTLE_MASS = 0.1
SQUEEZED = 10.0  # then 99 % of the tokens share the lowest tenth of a min-max axis


class TipObserver:
    """Implements opd.hooks.Observer for a TipWeighter."""

    needs = BOTH_AXES

    def __init__(self, weighter: TipWeighter):
        self.weighter = weighter

    @property
    def column_needs(self) -> frozenset[str]:
        return BOTH_AXES.union(*(rule.needs for rule in RULES.values()))

    def diagnose(self, stats: TokenStats, weights: TokenWeights) -> Diagnosis:
        """Needs at least one token."""
        kept, h, d = weights.weights > 0, _normalised_entropy(stats), stats.reverse_kl.double()
        config, mechanic = self.weighter.config, self.weighter.rule.mechanic
        retention = kept.double().mean().item() if mechanic == "weights" else config.retention_at(stats.step)
        axes = Axes(stats, config)
        others = {"soft_or": RULES["soft_or"].score(stats, axes), "entropy": h}
        scalars = {
            f"tip/jaccard_{name}": jaccard(kept, select.top(score, stats.sequence_id, retention, self.weighter.budget))
            for name, score in others.items()
        }
        scalars["tip/corr_entropy_divergence"] = correlation(h, d)
        scalars["tip/divergence_max_over_p99"] = max_over_p99(d)
        for decile, share in enumerate(kept_by_decile(h, kept)):
            scalars[f"tip/kept_by_entropy_decile_{decile}"] = share
        histograms = {"tip/entropy": h, "tip/divergence": d, "tip/score": self.weighter.look_back(stats)[0]}
        if kept.any():
            histograms["tip/divergence_kept"] = d[kept]
        return Diagnosis(scalars=scalars, histograms=histograms, warnings=self._warnings(kept, axes, scalars))

    def columns(self, stats: TokenStats, weights: TokenWeights, generator: torch.Generator) -> dict[str, Tensor]:
        """Quadrant and score as the update was weighed, and whether each rule would keep the token:
        `keep/<rule>@<retention>`.

        The run's own rule at its own retention: what it did keep. The others: one draw where they sample, scope update.
        """
        config = self.weighter.config
        score, found = self.weighter.look_back(stats)
        kept = keep_by_every_rule(stats, config, RETENTIONS, generator)
        own = next((n for n in (f"{config.rule}@{config.retention_at(stats.step):g}", config.rule) if n in kept), None)
        if own:
            kept[own] = weights.weights > 0
        return {"quadrant": found.quadrant, "score": score.double()} | {
            f"keep/{n}": column for n, column in kept.items()
        }

    def _warnings(self, kept: Tensor, axes: Axes, scalars: dict[str, float]) -> dict[str, str]:
        d, config = axes.stats.reverse_kl.double(), self.weighter.config
        found = {}
        covered = (d[kept].sum() / d.sum()).item() if d.sum() > 0 else 1.0
        if covered < LITTLE_MASS:
            found["little_mass"] = (
                f"the kept tokens carry {100 * covered:.1f} % of the divergence. Adam makes full-size steps of what "
                "little signal is left, which un-teaches the student: keep more tokens, or select by a rule that sees "
                "divergence."
            )
        ratio = scalars["tip/divergence_max_over_p99"]
        squeezable = config.normalization == "minmax" and config.divergence_clip_quantile is None
        if ratio > SQUEEZED and squeezable and self.weighter.needs >= BOTH_AXES:
            found["squeezed"] = (
                f"the largest divergence is {ratio:.0f} times its 99th percentile, so min-max normalisation squeezes "
                "nearly all tokens to 0 on that axis and entropy decides. Set tip.normalization=quantile."
            )
        at_h, median = self.weighter.look_back(axes.stats)[1].threshold_entropy, axes.h.median().item()
        if at_h < median * (1 - 1e-9):  # equal values: equal, whatever a mean rounds to
            found["low_entropy_cut"] = (
                f"tokens count as low-entropy up to h = {at_h:.4g}, below the median {median:.4g}. Confident mistakes "
                "usually lie above the median, so Q3 misses them: set tip.quadrant_threshold=quantile with "
                "tip.quadrant_entropy at 0.75 or so."
            )
        return found


def keep_by_every_rule(
    stats: TokenStats,
    config: TipConfig,
    retentions: tuple[float, ...],
    generator: torch.Generator,
    names: Iterable[str] = RULES,
) -> dict[str, Tensor]:
    """`<rule>@<retention>` -> (N,) bool, for every named rule with the other settings of `config`; `<rule>` where the
    retention changes nothing."""
    found = {}
    for name in names:
        rule = RULES[name]
        for retention in retentions if rule.mechanic != "weights" else (1.0,):
            one = dataclasses.replace(
                config, rule=name, retention=retention, retention_end=None, retention_steps=None, scope="update"
            )
            label = name if rule.mechanic == "weights" else f"{name}@{retention:g}"
            found[label] = TipWeighter(one)(stats, generator).weights > 0
    return found


def jaccard(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two sets, (N,) bool; 1 when both are empty."""
    union = (a | b).sum().item()
    return (a & b).sum().item() / union if union else 1.0


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 when a column is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale > 0 else 0.0


def max_over_p99(d: Tensor) -> float:
    """How far the largest value lies beyond the 99th percentile, at most 1e9; 1 when there is no divergence at all."""
    largest, p99 = d.max().item(), Spread.of(d).quantile(0.99)
    return min(largest / p99, 1e9) if p99 > 0 else 1e9 if largest > 0 else 1.0


def kept_by_decile(h: Tensor, kept: Tensor) -> list[float]:
    """Share kept in each tenth of the tokens by entropy, lowest first; 0 for a tenth without tokens."""
    order = h.argsort(stable=True)
    return [float(part.double().mean()) if len(part) else 0.0 for part in kept[order].tensor_split(10)]


def _normalised_entropy(stats: TokenStats) -> Tensor:
    return stats.student_entropy.double() / math.log(stats.vocab_size)
