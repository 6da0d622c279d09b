"""The patch point of the training step: statistics of all response tokens in, one weight per token out.

The step calls a `TokenWeighter` once per update, between scoring and the weighted backward pass. A weighter never sees
logits: they would cost [tokens, vocabulary] memory, and hide which tokens a mean divides by.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """One row per response token of the update, of all ranks, on the CPU, sorted by (sequence_id, position).

    So a weighter computes the same on every rank, whatever the micro-batches. Detached; float32 and nats unless said.
    A field that nobody needed is None.
    """

    sequence_id: Tensor  # (N,) int64; which rollout of the update
    position: Tensor  # (N,) int64; 0-based, in the response
    vocab_size: int  # ids compared: those both models have
    step: int  # update number, from 1
    student_entropy: Tensor | None = None  # H(P_S)
    teacher_entropy: Tensor | None = None  # H(P_T)
    reverse_kl: Tensor | None = None  # KL(P_S || P_T)
    forward_kl: Tensor | None = None  # KL(P_T || P_S)
    jsd: Tensor | None = None  # JSD at loss.jsd_beta
    total_variation: Tensor | None = None  # 1/2 sum |P_S - P_T|, in [0, 1]
    student_logprob: Tensor | None = None  # log P_S of the sampled token
    teacher_logprob: Tensor | None = None  # log P_T of the sampled token
    top1_agree: Tensor | None = None  # 1 where both models' likeliest tokens are the same, else 0
    overlap_kl: Tensor | None = None  # KL(P_T || P_S), both renormalised on the union of their top 16 (TA-OPD)
    teacher_topk_mass: Tensor | None = None  # P_T of the student's top 16
    student_top5_ids: Tensor | None = None  # (N, 5) int64, likeliest first; fewer columns when V < 5
    student_top5_logprobs: Tensor | None = None  # (N, 5)
    teacher_top5_ids: Tensor | None = None  # (N, 5) int64
    teacher_top5_logprobs: Tensor | None = None  # (N, 5)
    reverse_kl_energy: Tensor | None = None  # squared L2 norm of d KL(P_S || P_T) / d student logits
    forward_kl_energy: Tensor | None = None  # the same of KL(P_T || P_S): |P_S - P_T|^2

    def rows(self, index: Tensor) -> "TokenStats":
        """Some of the rows: `index` is (K,) int64 or (N,) bool."""
        tensors = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


STAT_FIELDS = frozenset(f.name for f in fields(TokenStats) if f.default is None)


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """What a weighter answers. Only relative weights matter; weight 0 removes a token from numerator and denominator.

    The loss of token t is (1 - forward_share_t) D_t + forward_share_t KL(P_T || P_S), with D the configured divergence.
    """

    weights: Tensor  # (N,) float, finite, >= 0
    forward_share: Tensor | None = None  # (N,) float in [0, 1]; None: 0 everywhere
    metrics: dict[str, float] = field(default_factory=dict)  # logged under these names

    def check(self, stats: TokenStats) -> None:
        """Raises ValueError, with expected and got, when the answer is not usable."""
        _check_column("weights", self.weights, stats, torch.inf)
        if self.forward_share is not None:
            _check_column("forward_share", self.forward_share, stats, 1.0)

    def relative(self) -> tuple[Tensor, float]:
        """Weights divided by the largest, (N,) float32, and their sum.

        So the scale of the weights changes nothing, bit for bit. Where no weight is above 0, the sum is 0.
        """
        largest = self.weights.max().item() if len(self.weights) else 0.0
        relative = self.weights.double() / largest if largest > 0 else self.weights.double()
        return relative.float(), relative.sum().item()


def _check_column(name: str, column: Tensor, stats: TokenStats, maximum: float) -> None:
    expected = tuple(stats.sequence_id.shape)
    if tuple(column.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(column.shape)}, expected {expected}: one per response token")
    if not column.is_floating_point():
        raise ValueError(f"{name} has dtype {column.dtype}, expected a float dtype")
    if column.requires_grad:
        raise ValueError(f"{name} requires a gradient, expected a detached tensor")
    if column.numel() and not (column.isfinite().all() and column.min() >= 0 and column.max() <= maximum):
        raise ValueError(
            f"{name} has values in [{column.min().item()}, {column.max().item()}] "
            f"({int((~column.isfinite()).sum())} not finite), expected finite values in [0, {maximum}]"
        )


class TokenWeighter(Protocol):
    """Decides which tokens count."""

    @property
    def needs(self) -> frozenset[str]:
        """Optional `TokenStats` fields it reads; when empty, no scoring pass is made for it."""
        ...

    def __call__(self, stats: TokenStats, generator: torch.Generator) -> TokenWeights:
        """Called once per update on every rank with the same arguments; draws randomness from `generator` alone."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """What a weighter has besides, if it remembers earlier updates: its memory is part of every checkpoint."""

    def state(self) -> dict[str, Tensor]:
        """What it remembers; CPU tensors."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` returned; an empty one means that it remembers nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What an observer says about an update."""

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)  # kind -> message; each kind is shown once a run


class Observer(Protocol):
    """Looks at updates and changes nothing: extra metrics on diagnostics steps, extra columns in token dumps."""

    needs: frozenset[str]  # TokenStats fields that `diagnose` reads
    column_needs: frozenset[str]  # TokenStats fields that `columns` reads

    def diagnose(self, stats: TokenStats, weights: TokenWeights) -> Diagnosis: ...

    def columns(self, stats: TokenStats, weights: TokenWeights, generator: torch.Generator) -> dict[str, Tensor]:
        """Name -> (N,) tensor, written beside the statistics of each dumped token."""
        ...


class UniformWeighter:
    """Plain on-policy distillation: every response token counts the same."""

    needs: frozenset[str] = frozenset()

    def __call__(self, stats: TokenStats, generator: torch.Generator) -> TokenWeights:
        return TokenWeights(weights=torch.ones(len(stats.sequence_id)))
