"""What a selection does to the tokens of an update: diagnostics while training, and columns of token dumps.

Shapes: N tokens of the update.
"""

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from opd import speculative
from opd.hooks import Diagnosis, TokenStats, TokenWeights
from tip import energy, select, taxonomy
from tip.config import TipConfig
from tip.divergences import divergence_of, fields_of
from tip.rules import RULES
from tip.scores import Axes, Spread
from tip.select import jaccard
from tip.weighter import TipWeighter

RETENTIONS = (0.5, 0.2, 0.1)  # those of the paper
LITTLE_MASS = 0.1  # share of the divergence below which a selection is warned about
SQUEEZED = 10.0  # from this ratio on, 99 % of the tokens share the lowest tenth of a min-max axis


class TipObserver:
    """Implements opd.hooks.Observer for a TipWeighter.

    Args:
        divergence: loss.divergence of the run. The energy of its gradient is told where tip.energy knows it.
    """

    def __init__(self, weighter: TipWeighter, divergence: str = "reverse_kl"):
        self.weighter, self.divergence = weighter, divergence
        self.needs = weighter.both_axes | speculative.NEEDS | energy.needs(divergence)
        self.column_needs = weighter.both_axes | needs_of_every_rule(weighter.config.axis)

    def diagnose(self, stats: TokenStats, weights: TokenWeights) -> Diagnosis:
        """Compares the kept tokens with what Soft-OR and entropy would keep, and with the axes. N is at least 1."""
        config, mechanic = self.weighter.config, self.weighter.rule.mechanic
        kept_N, h_N = weights.weights > 0, normalised_entropy(stats)
        d_N = divergence_of(stats, config.axis).double()
        retention = kept_N.double().mean().item() if mechanic == "weights" else config.retention_at(stats.step)
        axes = Axes(stats, config)
        scalars = {
            f"tip/jaccard_{name}": jaccard(
                kept_N, select.top(score_N, stats.sequence_id, retention, self.weighter.budget)
            )
            for name, score_N in (("soft_or", RULES["soft_or"].score(stats, axes)), ("entropy", h_N))
        }
        scalars["speculative/acceptance"] = speculative.acceptance(stats)
        scalars[f"speculative/accepted_of_{speculative.GAMMA}"] = speculative.accepted_length(stats)
        scalars["tip/corr_entropy_divergence"] = correlation(h_N, d_N)
        scalars["tip/divergence_max_over_p99"] = max_over_p99(d_N)
        for decile, share in enumerate(kept_by_decile(h_N, kept_N)):
            scalars[f"tip/kept_by_entropy_decile_{decile}"] = share
        score_N, quadrants = self.weighter.look_back(stats)
        histograms = {"tip/entropy": h_N, "tip/divergence": d_N, "tip/score": score_N}
        if kept_N.any():
            histograms["tip/divergence_kept"] = d_N[kept_N]
        ratio, threshold = scalars["tip/divergence_max_over_p99"], quadrants.threshold_entropy
        warnings = self._warnings(kept_N, axes, ratio, threshold)
        if self.divergence in energy.FIELDS:
            energy_N = energy.of_loss(stats, weights.forward_share, self.divergence)
            scalars |= energy.describe(energy_N, quadrants)
            warnings |= energy.warnings(energy_N, d_N, quadrants)
        return Diagnosis(scalars=scalars, histograms=histograms, warnings=warnings)

    def columns(self, stats: TokenStats, weights: TokenWeights, generator: torch.Generator) -> dict[str, Tensor]:
        """The divergence of tip.axis by its name, quadrant and score as the update was weighed, and
        `keep/<rule>@<retention>` for every rule; each (N,).

        The column of the run's rule and retention shows what the run kept. The other columns normalise by the update
        itself, and show one draw where a rule samples.
        """
        config = self.weighter.config
        score_N, quadrants = self.weighter.look_back(stats)
        kept = keep_by_every_rule(stats, config, RETENTIONS, generator)
        for label in {config.rule, f"{config.rule}@{config.retention_at(stats.step):g}"} & kept.keys():
            kept[label] = weights.weights > 0
        keep_columns = {f"keep/{label}": kept_N for label, kept_N in kept.items()}
        d_N = divergence_of(stats, config.axis)
        return {config.axis: d_N, "quadrant": quadrants.quadrant, "score": score_N.double(), **keep_columns}

    def _warnings(self, kept_N: Tensor, axes: Axes, ratio: float, threshold: float) -> dict[str, str]:
        """Kind -> message, for a largest divergence of `ratio` times its 99th percentile and a threshold of h."""
        config, warnings = self.weighter.config, {}
        d_N = divergence_of(axes.stats, config.axis).double()
        covered = taxonomy.covered(d_N, kept_N)
        if covered < LITTLE_MASS:
            warnings["little_mass"] = (
                f"the kept tokens carry {100 * covered:.1f} % of the divergence. Adam makes full-size steps of what "
                "little signal is left, which un-teaches the student: keep more tokens, or select by a rule that sees "
                "divergence."
            )
        squeezable = config.normalization == "minmax" and config.divergence_clip_quantile is None
        if ratio > SQUEEZED and squeezable and self.weighter.needs >= self.weighter.both_axes:
            warnings["squeezed"] = (
                f"the largest divergence is {ratio:.0f} times its 99th percentile, so min-max normalisation squeezes "
                "nearly all tokens to 0 on that axis and entropy decides. Set tip.normalization=quantile."
            )
        median = axes.h.median().item()
        if threshold < median * (1 - 1e-9):  # rounding must not put the mean of equal numbers below their median
            warnings["low_entropy_cut"] = (
                f"tokens count as low-entropy up to h = {threshold:.4g}, below the median {median:.4g}. Confident "
                "mistakes usually lie above the median, so Q3 misses them: set tip.quadrant_threshold=quantile with "
                "tip.quadrant_entropy at 0.75 or so."
            )
        return warnings


def needs_of_every_rule(axis: str) -> frozenset[str]:
    """The fields of TokenStats that the rules read with this divergence as their axis."""
    return fields_of(frozenset().union(*(rule.needs for rule in RULES.values())), axis)


def keep_by_every_rule(
    stats: TokenStats,
    config: TipConfig,
    retentions: tuple[float, ...],
    generator: torch.Generator,
    names: Iterable[str] = RULES,
) -> dict[str, Tensor]:
    """What each named rule keeps with the other settings of `config`, as `<rule>@<retention>` -> (N,) bool.

    The label is `<rule>` alone where the retention changes nothing. tip.rollout_weight and tip.frozen are left out.
    """
    kept = {}
    plain = dataclasses.replace(
        config, retention_end=None, retention_steps=None, scope="update", rollout_weight="none", frozen="none"
    )
    for name in names:
        ignores_retention = RULES[name].mechanic == "weights"
        for retention in (1.0,) if ignores_retention else retentions:
            weighter = TipWeighter(dataclasses.replace(plain, rule=name, retention=retention))
            label = name if ignores_retention else f"{name}@{retention:g}"
            kept[label] = weighter(stats, generator).weights > 0
    return kept


def correlation(a_N: Tensor, b_N: Tensor) -> float:
    """Pearson's correlation; 0 when a column is constant."""
    a_N, b_N = (column.double() - column.double().mean() for column in (a_N, b_N))
    scale = (a_N.norm() * b_N.norm()).item()
    return (a_N @ b_N).item() / scale if scale > 0 else 0.0


def rank_correlation(a_N: Tensor, b_N: Tensor) -> float:
    """Spearman's correlation; 0 when a column is constant."""
    return correlation(Spread.of(a_N).place(a_N), Spread.of(b_N).place(b_N))


def max_over_p99(d_N: Tensor) -> float:
    """The largest divergence divided by the 99th percentile, at most 1e9; 1 when there is no divergence at all."""
    largest, p99 = d_N.max().item(), Spread.of(d_N).quantile(0.99)
    return min(largest / p99, 1e9) if p99 > 0 else 1e9 if largest > 0 else 1.0


def kept_by_decile(h_N: Tensor, kept_N: Tensor) -> list[float]:
    """The share kept in each tenth of the tokens by entropy, lowest first; 0 for a tenth without tokens."""
    parts = kept_N[h_N.argsort(stable=True)].tensor_split(10)
    return [part.double().mean().item() if len(part) else 0.0 for part in parts]


def normalised_entropy(stats: TokenStats) -> Tensor:
    """The student's entropy divided by ln V, (N,) float64, without the clip of the axes."""
    return stats.student_entropy.double() / math.log(stats.vocab_size)
