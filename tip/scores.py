"""Statistics of tokens -> the two axes of TIP, each mapped to [0, 1] (arXiv 2604.14084, section on Soft-OR).

The axes are h, the student's entropy divided by ln V, and d, the divergence that tip.axis names: KL(P_S || P_T) in
nats, unless it says another one. An axis is first clipped, then mapped to [0, 1] by the quantiles of its column. With
scope update these are the quantiles of the update itself; with scope running they are an average over earlier updates.
The normalisation "absolute" divides by the largest possible value instead and clips nothing. So it needs the token
alone.

Shapes: N tokens of the update; K points of a spread.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from opd.hooks import TokenStats
from tip.divergences import DIVERGENCES

GRID = 1001  # points of a spread that is remembered beyond its update


@dataclass(frozen=True)
class Spread:
    """The quantiles of a column at the equally spaced levels from 0 to 1, as K ascending float64 points.

    The points of an update are its sorted column, so its quantiles are exact, with linear interpolation.
    """

    points: Tensor  # (K,) float64

    @classmethod
    def of(cls, column_N: Tensor) -> "Spread":
        return cls(column_N.double().sort().values)

    @property
    def mean(self) -> float:
        """The mean; NaN without points. It is cut to their range: rounding must not lift it above equal numbers."""
        return self.points.mean().clamp(self.points[0], self.points[-1]).item() if len(self.points) else math.nan

    def quantile(self, level: float) -> float:
        """The quantile at a level from 0 to 1; NaN without points."""
        return float(self._between(level * (len(self.points) - 1))) if len(self.points) else math.nan

    def place(self, column_N: Tensor) -> Tensor:
        """The rank of each number among the points, (N,) float64 in [0, 1]; 0 where all points are equal.

        A number that several points equal takes the mean of their ranks.
        """
        if len(self.points) < 2 or self.points[0] == self.points[-1]:
            return torch.zeros(len(column_N), dtype=torch.float64)
        below_N, upto_N = (torch.searchsorted(self.points, column_N.double(), right=right) for right in (False, True))
        return ((below_N + upto_N - 1).double() / 2 / (len(self.points) - 1)).clamp(0, 1)

    def on_grid(self) -> "Spread":
        """The same quantiles at GRID levels, so that updates of different size can be averaged."""
        return Spread(torch.from_numpy(self._between(np.linspace(0, len(self.points) - 1, GRID))))

    def blended(self, newer: "Spread", decay: float) -> "Spread":
        """decay * this + (1 - decay) * newer, quantile by quantile. Both are on the grid."""
        return Spread(decay * self.points + (1 - decay) * newer.points)

    def _between(self, index: float | np.ndarray) -> np.ndarray:
        """The points at fractional indices, linearly interpolated."""
        return np.interp(index, np.arange(len(self.points)), self.points.numpy())


def normalise(column_N: Tensor, spread: Spread, how: str) -> Tensor:
    """Maps a column to [0, 1]; 0 everywhere when the range is empty. Returns (N,) float64, which keeps near ties apart.

    Args:
        how: "minmax" is (x - min) / (max - min), as in the paper. "quantile" takes the 5th and the 95th percentile
            instead, and cuts. "rank" takes the place of x among the points.
    """
    if how == "rank":
        return spread.place(column_N)
    low, high = (spread.quantile(level) for level in ((0.0, 1.0) if how == "minmax" else (0.05, 0.95)))
    if high <= low:
        return torch.zeros(len(column_N), dtype=torch.float64)
    return ((column_N.double() - low) / (high - low)).clamp(0, 1)


def soft_or(h_N: Tensor, d_N: Tensor) -> Tensor:
    """h + d - h d of two axes in [0, 1]: high where either is high, without counting both twice.

    It is computed as a + b (1 - a) with a the larger, which is exactly 1 where either axis is 1. Clipped axes have many
    such tokens. A cut among them has to fall by position, and not by rounding, which differs between processes.
    """
    larger_N, smaller_N = torch.maximum(h_N, d_N), torch.minimum(h_N, d_N)
    return larger_N + smaller_N * (1 - larger_N)


class AxisSettings(Protocol):
    """The keys of tip.config.TipConfig that axes and rules read. TipConfig itself imports the rules."""

    axis: str
    entropy_clip_quantile: float | None
    divergence_clip_quantile: float | None
    normalization: str
    quadrant_threshold: str
    quadrant_entropy: float | None
    quadrant_divergence: float | None
    quadrants: tuple[int, ...]
    product_alpha: float
    product_gamma: float
    aopd_threshold: float
    iw_gain: float


class Axes:
    """What rules read besides the statistics: columns that are clipped and mapped to [0, 1]; each (N,) float64.

    Args:
        memory: the spread of each column over earlier updates; None takes the spreads of these very tokens.
    """

    def __init__(self, stats: TokenStats, config: AxisSettings, memory: Mapping[str, Spread] | None = None):
        self.stats, self.config, self.memory = stats, config, memory

    @cached_property
    def h(self) -> Tensor:
        """H(P_S) / ln V, clipped."""
        return self._entropy[0] / math.log(self.stats.vocab_size)

    @property
    def d(self) -> Tensor:
        """The divergence that tip.axis names, clipped."""
        return self._divergence[0]

    @cached_property
    def entropy(self) -> Tensor:
        """h mapped to [0, 1]."""
        if self._is_absolute:
            return self.h.clamp(0, 1)
        return normalise(*self._entropy, self.config.normalization)

    @cached_property
    def divergence(self) -> Tensor:
        """d mapped to [0, 1]."""
        if self._is_absolute:
            return (self.d / DIVERGENCES[self.config.axis].largest).clamp(0, 1)
        return normalise(*self._divergence, self.config.normalization)

    def unit(self, name: str) -> Tensor:
        """Any field of TokenStats mapped to [0, 1] by its 5th and 95th percentile, as TA-OPD does."""
        return normalise(*self._clipped(name, None), "quantile")

    def thresholds(self) -> tuple[float, float]:
        """The h and the d above which a token is high, in that order."""
        how, h, d = self.config.quadrant_threshold, self.config.quadrant_entropy, self.config.quadrant_divergence
        if how == "absolute":
            return h, d
        entropy, divergence = self._entropy[1], self._divergence[1]
        if how == "mean":
            h, d = entropy.mean, divergence.mean
        else:
            h, d = entropy.quantile(h), divergence.quantile(d)
        return h / math.log(self.stats.vocab_size), d

    @cached_property
    def _entropy(self) -> tuple[Tensor, Spread]:
        return self._clipped("student_entropy", None if self._is_absolute else self.config.entropy_clip_quantile)

    @cached_property
    def _divergence(self) -> tuple[Tensor, Spread]:
        return self._clipped(self.config.axis, self.config.divergence_clip_quantile)

    @property
    def _is_absolute(self) -> bool:
        """Whether an axis is divided by its largest possible value. A clip would be a statistic of other tokens."""
        return self.config.normalization == "absolute"

    def _clipped(self, name: str, level: float | None) -> tuple[Tensor, Spread]:
        """A column and its spread, both capped at the spread's quantile of that level."""
        column_N = vars(self.stats)[name].double()
        spread = self.memory[name] if self.memory else Spread.of(column_N)
        if level is None:
            return column_N, spread
        maximum = spread.quantile(level)
        return column_N.clamp(max=maximum), Spread(spread.points.clamp(max=maximum))
