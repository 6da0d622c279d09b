"""The patch point of the training step: statistics of all response tokens in, one weight per token out.

The other hook, what answers the student between its turns, is opd.rollout.environment.Environment.

The step calls a `TokenWeighter` once per update, between the scoring pass and the weighted backward pass. A weighter
never sees logits: a tensor of tokens times vocabulary would not fit in memory. It returns weights and no loss, so that
the step alone decides what the loss is divided by.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """One row per response token of the update, on the CPU, sorted by sequence id and then by position.

    The rows of all processes are here, so a weighter computes the same on every process and for every packing into
    micro-batches. Tensors are detached, (N,), float32 and in nats where the field says nothing else. A field with a
    default is there only when the weighter or a diagnostic asked for it.
    """

    sequence_id: Tensor  # int64: which rollout of the update
    position: Tensor  # int64: place in the response, from 0; an environment's tokens count here and have no row
    turn: Tensor  # int64: the model's turn that the token belongs to, from 0
    token_id: Tensor  # int64: the sampled token
    prompt_id: Tensor  # int64: the same for all rollouts of one prompt, in this and in other updates
    length: Tensor  # int64: how many tokens the model sampled in the whole response
    truncated: Tensor  # int64: 1 where a limit ended the response, else 0
    verdict: Tensor  # 1 right, 0 wrong, an environment's share, NaN unknown. NaN everywhere unless `needs` names it
    vocab_size: int  # number of token ids that both models have and that are compared
    step: int  # number of the update, from 1
    student_entropy: Tensor | None = None  # H(P_S)
    teacher_entropy: Tensor | None = None  # H(P_T)
    reverse_kl: Tensor | None = None  # KL(P_S || P_T)
    forward_kl: Tensor | None = None  # KL(P_T || P_S)
    jsd: Tensor | None = None  # JSD at loss.jsd_beta
    total_variation: Tensor | None = None  # 1/2 sum |P_S - P_T|, in [0, 1]
    student_logprob: Tensor | None = None  # log P_S of the sampled token
    teacher_logprob: Tensor | None = None  # log P_T of the sampled token
    top1_agree: Tensor | None = None  # 1 where both models' likeliest tokens are the same, else 0
    overlap_kl: Tensor | None = None  # KL(P_T || P_S), both renormalised on the union of their top 16; from TA-OPD
    teacher_topk_mass: Tensor | None = None  # P_T of the student's top 16
    student_top5_ids: Tensor | None = None  # (N, 5) int64, likeliest first; fewer columns when V < 5
    student_top5_logprobs: Tensor | None = None  # (N, 5)
    teacher_top5_ids: Tensor | None = None  # (N, 5) int64
    teacher_top5_logprobs: Tensor | None = None  # (N, 5)
    reverse_kl_energy: Tensor | None = None  # squared L2 norm of d KL(P_S || P_T) / d student logits
    forward_kl_energy: Tensor | None = None  # the same of KL(P_T || P_S): |P_S - P_T|^2
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # the columns of a scorer, by name; NaN is unknown

    def rows(self, index: Tensor) -> "TokenStats":
        """The rows that `index` picks; it is (K,) int64 or (N,) bool."""
        columns = {name: column[index] for name, column in vars(self).items() if isinstance(column, Tensor)}
        return replace(self, **columns, extra={name: column[index] for name, column in self.extra.items()})


FIELDS = frozenset(f.name for f in fields(TokenStats))
STAT_FIELDS = frozenset(f.name for f in fields(TokenStats) if f.default is None)  # what the scoring pass computes


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """The answer of a weighter. Only relative weights matter; weight 0 removes a token from numerator and denominator.

    The loss of token t is (1 - forward_share_t) D_t + forward_share_t KL(P_T || P_S), with D the configured divergence.
    """

    weights: Tensor  # (N,) float, finite, >= 0
    forward_share: Tensor | None = None  # (N,) float in [0, 1]; None stands for 0 everywhere
    metrics: dict[str, float] = field(default_factory=dict)  # logged beside the update's own, under these names

    def check(self, stats: TokenStats) -> None:
        """Raises ValueError, with expected and got, when the answer is not usable."""
        _check_column("weights", self.weights, stats, torch.inf)
        if self.forward_share is not None:
            _check_column("forward_share", self.forward_share, stats, 1.0)

    def relative(self) -> tuple[Tensor, float]:
        """The weights divided by the largest one, (N,) float32, and the float64 sum of these quotients.

        So the scale of the weights cancels: a factor that is a power of two changes no bit of the update, and neither
        does any factor of equal weights. The sum is 0 if no weight is above 0.
        """
        largest = self.weights.max().item() if len(self.weights) else 0.0
        relative_N = self.weights.double() / (largest or 1.0)
        return relative_N.float(), relative_N.sum().item()


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
        """What it reads of STAT_FIELDS, `verdict`, and the columns of a scorer, by name.

        Where this names none of STAT_FIELDS and no diagnostic does either, the update makes no scoring pass.
        """
        ...

    def __call__(self, stats: TokenStats, generator: torch.Generator) -> TokenWeights:
        """Weighs the tokens of one update. Every process calls it with the same arguments, and it must answer the same.

        Nothing compares the answers, so randomness comes from `generator` alone, and a memory depends on `stats` alone.
        """
        ...


@runtime_checkable
class StatefulWeighter(Protocol):
    """The additional methods of a weighter that remembers earlier updates. Its memory is part of every checkpoint."""

    def state(self) -> dict[str, Tensor]:
        """The memory, as CPU tensors by name."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores a memory that `state` returned; an empty dictionary stands for no memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The findings of an observer about one update."""

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)  # kind -> message; a run shows each kind once


class Observer(Protocol):
    """Adds metrics on diagnostics steps and columns to token dumps. It changes nothing in the training."""

    needs: frozenset[str]  # TokenStats fields that `diagnose` reads
    column_needs: frozenset[str]  # TokenStats fields that `columns` reads

    def diagnose(self, stats: TokenStats, weights: TokenWeights) -> Diagnosis: ...

    def columns(self, stats: TokenStats, weights: TokenWeights, generator: torch.Generator) -> dict[str, Tensor]:
        """Further (N,) columns by name, which a token dump holds beside the statistics of its tokens."""
        ...


class UniformWeighter:
    """Plain on-policy distillation: every response token counts the same."""

    needs: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return "all"

    def __call__(self, stats: TokenStats, generator: torch.Generator) -> TokenWeights:
        return TokenWeights(weights=torch.ones(len(stats.sequence_id)))
