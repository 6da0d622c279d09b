"""TipWeighter: a rule behind opd's patch point."""

import torch
from torch import Tensor

from opd.cli import InputError
from opd.hooks import TokenStats, TokenWeights
from tip import select, taxonomy
from tip.config import TipConfig
from tip.rules import RULES
from tip.scores import Axes, Spread


class TipWeighter:
    """Weighs the tokens as a rule says; reports what that does to the quadrants when it can see them.

    With scope running it is an opd.hooks.RunningWeighter: after the first update it knows where the values of a column
    lie, and scores each rollout by that.

    Raises InputError for a configuration whose keys do not go together.
    """

    def __init__(self, config: TipConfig):
        _check(config)
        self.config = config
        self.rule = RULES[config.rule]
        self.needs = self.rule.needs
        self.budget = config.budget or self.rule.budget
        self.memory: dict[str, Spread] = {}  # scope running: column -> exponential average of its quantiles

    def __call__(self, stats: TokenStats, generator: torch.Generator) -> TokenWeights:
        score, share = self.scores(stats)
        weights = self._select(score, stats, generator)
        if self.config.aggregation == "rollout_mean" and len(weights):
            _, rollout = torch.unique(stats.sequence_id, return_inverse=True)
            per_rollout = torch.zeros(int(rollout.max()) + 1).index_add_(0, rollout, weights)
            weights = weights / per_rollout[rollout].clamp(min=torch.finfo(weights.dtype).tiny)
        answer = TokenWeights(weights=weights, forward_share=share)
        return answer if self.one_pass else TokenWeights(**vars(answer) | {"metrics": self._metrics(stats, answer)})

    def scores(self, stats: TokenStats) -> tuple[Tensor, Tensor | None]:
        """The rule's score and share of forward KL, each (N,), normalised within the configured scope."""
        if self.config.scope != "micro_batch":
            axes = Axes(stats, self.config, self.memory)
            share = self.rule.forward_share
            return self.rule.score(stats, axes), None if share is None else share(stats, axes)
        score = torch.zeros(len(stats.position), dtype=torch.float64)
        share = None if self.rule.forward_share is None else torch.zeros(len(stats.position))
        for number in stats.micro_batch.unique():
            rows = stats.micro_batch == number
            axes = Axes(stats.rows(rows), self.config)
            score[rows] = self.rule.score(axes.stats, axes).double()
            if share is not None:
                share[rows] = self.rule.forward_share(axes.stats, axes).float()
        return score, share

    def _select(self, score: Tensor, stats: TokenStats, generator: torch.Generator) -> Tensor:
        retention = self.config.retention_at(stats.step)
        if self.rule.mechanic == "weights":
            return score.float()
        if self.rule.mechanic == "sample":
            return select.sample(score, stats.sequence_id, retention, generator, self.budget).float()
        return select.top(score, stats.sequence_id, retention, self.budget).float()

    @property
    def one_pass(self) -> bool:
        return len(self.memory) > 0

    def learn(self, stats: TokenStats, weights: TokenWeights) -> dict[str, float]:
        """Folds the update's quantiles into the running ones (scope running only); returns the update's metrics."""
        if self.config.scope != "running":
            return {}
        metrics = self._metrics(stats, weights)
        columns = {name: column for name, column in vars(stats).items() if name in self.needs and column.ndim == 1}
        for name, column in columns.items():
            if len(column):
                new = Spread.of(column).on_grid()
                old = self.memory.get(name, new)
                self.memory[name] = old.blended(new, self.config.running_decay)
        return metrics

    def state(self) -> dict[str, Tensor]:
        return {name: spread.points for name, spread in self.memory.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.memory = {name: Spread(points) for name, points in state.items()}

    def _metrics(self, stats: TokenStats, answer: TokenWeights) -> dict[str, float]:
        kept = answer.weights > 0
        metrics = {"tip/retained": kept.double().mean().item() if len(kept) else 0.0}
        if answer.forward_share is not None and kept.any():
            metrics["tip/forward_share"] = answer.forward_share[kept].double().mean().item()
        if stats.student_entropy is not None and stats.reverse_kl is not None and len(kept):
            metrics.update(taxonomy.describe(taxonomy.of(Axes(stats, self.config)), stats.reverse_kl, kept))
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
    rule = RULES[config.rule]
    if config.scope == "running" and rule.mechanic != "weights" and (config.budget or rule.budget) == "per_update":
        raise InputError(
            f"tip: scope 'running' weighs one rollout at a time, and rule {config.rule!r} keeps a share of the whole update "
            "(a threshold from earlier updates was tried: it misses the share by up to half). Set tip.budget=per_rollout, "
            "or tip.scope=update."
        )
