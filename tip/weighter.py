"""TipWeighter: the weight of a token, from its statistics, by the rule of the configuration."""

from dataclasses import replace

import torch
from torch import Tensor

from opd.hooks import TokenStats, TokenWeights
from tip import rollouts, select, taxonomy
from tip.config import TipConfig, check_combinations
from tip.divergences import divergence_of, fields_of
from tip.rules import BOTH_AXES, RULES, total_variation
from tip.scores import Axes, Spread


class TipWeighter:
    """Implements opd.hooks.TokenWeighter with a rule of tip.rules. Shapes: N tokens of the update.

    With scope running it remembers the quantiles of earlier updates and normalises by them, so it implements
    opd.hooks.StatefulWeighter too.

    Raises:
        InputError: keys of the configuration do not go together.
    """

    def __init__(self, config: TipConfig):
        check_combinations(config)
        self.config = config
        rule = RULES[config.rule]
        self.rule = replace(rule, needs=fields_of(rule.needs, config.axis))
        self.frozen_fields = frozenset() if config.frozen == "none" else self.rule.needs  # that the frozen pair gives
        if config.mixture == "none":
            self.rule = replace(self.rule, forward_share=None)
        elif config.mixture == "total_variation":
            needs = self.rule.needs | {"total_variation"}
            self.rule = replace(self.rule, needs=needs, forward_share=total_variation)
        factor = frozenset() if config.rollout_weight == "none" else {"verdict"}
        self.needs = self.rule.needs | factor | frozenset(map(frozen_name, self.frozen_fields))
        self.budget = config.budget or self.rule.budget
        self.memory: dict[str, Spread] | None = None  # column -> average of its quantiles over earlier updates
        self.memory_before: dict[str, Spread] | None = None  # the memory that weighed the latest update

    @property
    def both_axes(self) -> frozenset[str]:
        """The fields of TokenStats that are the two axes."""
        return fields_of(BOTH_AXES, self.config.axis)

    def __str__(self) -> str:
        """Rule and retention, and a share of forward KL that is set: what decides the tokens and their loss."""
        config, words = self.config, [self.config.rule]
        if config.rule != "all" and self.rule.mechanic != "weights":
            words.append(f"retention {config.retention:g}")
            if config.retention_end is not None:
                words[-1] += f" to {config.retention_end:g} at update {config.retention_steps}"
        if config.mixture is not None:
            words.append(f"mixture {config.mixture}")
        if config.rollout_weight != "none":
            words.append(f"rollouts by {config.rollout_weight}")
        if config.frozen == "select":
            words.append("by the frozen pair")
        return ", ".join(words)

    def __call__(self, stats: TokenStats, generator: torch.Generator) -> TokenWeights:
        """Statistics -> axes -> score -> weight."""
        axes = Axes(stats, self.config, self.memory)
        forward_share_N = self.rule.forward_share(stats, axes) if self.rule.forward_share else None
        noise = generator.get_state()  # two selections differ by their scores alone
        weights_N = self._select(self._scored(stats), generator)
        metrics = {}
        if self.frozen_fields:
            others = stats if self.config.frozen == "select" else self._frozen(stats)
            other_N = self._select(others, torch.Generator().set_state(noise))
            metrics["tip/drift"] = 1 - select.jaccard(weights_N > 0, other_N > 0)
        if self.config.aggregation == "rollout_mean":
            weights_N = _equal_rollouts(weights_N, stats.sequence_id)
        if self.config.rollout_weight != "none":
            factor_N = rollouts.factor(stats, self.config.rollout_weight, self.config.reward_beta)
            weights_N = (weights_N.double() * factor_N).float()
        if self.config.scope == "running":
            self._remember(stats)
        return TokenWeights(
            weights=weights_N,
            forward_share=forward_share_N,
            metrics=metrics | self._metrics(stats, weights_N > 0, forward_share_N),
        )

    def _select(self, stats: TokenStats, generator: torch.Generator) -> Tensor:
        """The weights that the rule gives by these statistics, (N,) float32, before factors of rollouts."""
        score_N = self.rule.score(stats, Axes(stats, self.config, self.memory))
        retention = self.config.retention_at(stats.step)
        if self.rule.mechanic == "weights":
            return score_N.float()
        if self.rule.mechanic == "sample":
            return select.sample(score_N, stats.sequence_id, retention, generator, self.budget).float()
        return select.top(score_N, stats.sequence_id, retention, self.budget).float()

    def _scored(self, stats: TokenStats) -> TokenStats:
        """The statistics that the rule selects by."""
        return self._frozen(stats) if self.config.frozen == "select" else stats

    def _frozen(self, stats: TokenStats) -> TokenStats:
        """The statistics with the frozen pair's in place of the student's own."""
        return replace(stats, **{name: stats.extra[frozen_name(name)] for name in self.frozen_fields})

    def look_back(self, stats: TokenStats) -> tuple[Tensor, taxonomy.Quadrants]:
        """Scores and quadrants of the latest update, by the memory that weighed it.

        It needs student_entropy and the divergence of tip.axis. A rule that remembers only one of them cannot place the
        thresholds of quadrants, so these come from the update itself.
        """
        memory = self.memory_before
        scored = self._scored(stats)
        score_N = self.rule.score(scored, Axes(scored, self.config, memory))
        remembers_both = memory is not None and memory.keys() >= self.both_axes
        return score_N, taxonomy.of(Axes(stats, self.config, memory if remembers_both else None))

    def state(self) -> dict[str, Tensor]:
        """The points of every remembered column, (GRID,) float64; empty before the first update."""
        return {name: spread.points for name, spread in (self.memory or {}).items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.memory = {name: Spread(points) for name, points in state.items()} or None

    def _remember(self, stats: TokenStats) -> None:
        """Averages the quantiles of an update into the memory."""
        self.memory_before = self.memory
        columns = {name: vars(stats)[name] for name in sorted(self.rule.needs)}
        new = {name: Spread.of(c).on_grid() for name, c in columns.items() if c.ndim == 1 and len(c)}
        if new:
            old = self.memory or new
            self.memory = {name: old[name].blended(new[name], self.config.running_decay) for name in new}

    def _metrics(self, stats: TokenStats, kept_N: Tensor, forward_share_N: Tensor | None) -> dict[str, float]:
        """What was kept, and of which quadrants where the statistics of both axes are there."""
        metrics = {"tip/retained": kept_N.double().mean().item() if len(kept_N) else 0.0}
        if forward_share_N is not None and kept_N.any():
            metrics["tip/forward_share"] = forward_share_N[kept_N].double().mean().item()
        d_N = divergence_of(stats, self.config.axis)
        if stats.student_entropy is not None and d_N is not None and len(kept_N):
            metrics |= taxonomy.describe(self.look_back(stats)[1], d_N, kept_N)
        return metrics


def frozen_name(name: str) -> str:
    """The name of the column that holds this field as the frozen pair gives it (tip.frozen)."""
    return f"frozen_{name}"


def _equal_rollouts(weights_N: Tensor, sequence_id_N: Tensor) -> Tensor:
    """Divides the weights of a rollout by their sum, so that every rollout with a kept token counts the same."""
    first_R, rollout_N = rollouts.rows_of(sequence_id_N)
    sum_R = torch.zeros(len(first_R)).index_add_(0, rollout_N, weights_N)
    return weights_N / sum_R[rollout_N].clamp(min=torch.finfo(weights_N.dtype).tiny)
