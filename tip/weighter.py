"""TipWeighter: a rule behind opd's patch point."""

from dataclasses import replace

import torch
from torch import Tensor

from opd.errors import InputError
from opd.hooks import TokenStats, TokenWeights
from tip import select, taxonomy
from tip.config import TipConfig
from tip.rules import BOTH, RULES, total_variation
from tip.scores import Axes, Spread


class TipWeighter:
    """Weighs the tokens as a rule says; reports what that does to the quadrants when it can see them.

    With scope running it remembers where the values of each column lay in earlier updates, and normalises by that.

    Raises InputError for a configuration whose keys do not go together.
    """

    def __init__(self, config: TipConfig):
        _check(config)
        self.config = config
        self.rule = RULES[config.rule]
        if config.mixture == "none":
            self.rule = replace(self.rule, forward_share=None)
        elif config.mixture == "total_variation":
            needs = self.rule.needs | {"total_variation"}
            self.rule = replace(self.rule, needs=needs, forward_share=total_variation)
        self.needs = self.rule.needs
        self.budget = config.budget or self.rule.budget
        self.memory: dict[str, Spread] | None = None  # column -> exponential average of its quantiles
        self.memory_before: dict[str, Spread] | None = None  # the memory that the latest update was weighed with

    def __call__(self, stats: TokenStats, generator: torch.Generator) -> TokenWeights:
        score, share = self.scores(stats)
        weights = self._select(score, stats, generator)
        if self.config.aggregation == "rollout_mean" and len(weights):
            _, rollout = torch.unique(stats.sequence_id, return_inverse=True)
            per_rollout = torch.zeros(int(rollout.max()) + 1).index_add_(0, rollout, weights)
            weights = weights / per_rollout[rollout].clamp(min=torch.finfo(weights.dtype).tiny)
        self._remember(stats)
        return TokenWeights(weights=weights, forward_share=share, metrics=self._metrics(stats, weights, share))

    def scores(self, stats: TokenStats) -> tuple[Tensor, Tensor | None]:
        """The rule's score and share of forward KL, each (N,), normalised within the configured scope."""
        axes = Axes(stats, self.config, self.memory)
        share = self.rule.forward_share
        return self.rule.score(stats, axes), None if share is None else share(stats, axes)

    def look_back(self, stats: TokenStats) -> tuple[Tensor, taxonomy.Quadrants]:
        """Scores and quadrants of the update just weighed, as it was weighed: before anything was learnt from it.

        Needs student_entropy and reverse_kl. The quadrants' thresholds come from earlier updates where the rule
        remembers both axes, else from the update itself.
        """
        memory = self.memory_before
        score = self.rule.score(stats, Axes(stats, self.config, memory))
        remembers_both = memory is not None and set(BOTH) <= set(memory)
        return score, taxonomy.of(Axes(stats, self.config, memory if remembers_both else None))

    def _select(self, score: Tensor, stats: TokenStats, generator: torch.Generator) -> Tensor:
        retention = self.config.retention_at(stats.step)
        if self.rule.mechanic == "weights":
            return score.float()
        if self.rule.mechanic == "sample":
            return select.sample(score, stats.sequence_id, retention, generator, self.budget).float()
        return select.top(score, stats.sequence_id, retention, self.budget).float()

    def _remember(self, stats: TokenStats) -> None:
        """Folds the update's quantiles into the running ones (scope running only)."""
        if self.config.scope != "running":
            return
        self.memory_before = self.memory
        columns = {name: vars(stats)[name] for name in sorted(self.needs)}
        new = {
            name: Spread.of(column).on_grid() for name, column in columns.items() if column.ndim == 1 and len(column)
        }
        if new:
            old = self.memory or new
            self.memory = {name: old[name].blended(new[name], self.config.running_decay) for name in new}

    def state(self) -> dict[str, Tensor]:
        return {name: spread.points for name, spread in (self.memory or {}).items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.memory = {name: Spread(points) for name, points in state.items()} or None

    def _metrics(self, stats: TokenStats, weights: Tensor, share: Tensor | None) -> dict[str, float]:
        kept = weights > 0
        metrics = {"tip/retained": kept.double().mean().item() if len(kept) else 0.0}
        if share is not None and kept.any():
            metrics["tip/forward_share"] = share[kept].double().mean().item()
        if stats.student_entropy is not None and stats.reverse_kl is not None and len(kept):
            metrics.update(taxonomy.describe(self.look_back(stats)[1], stats.reverse_kl, kept))
        return metrics


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
