"""One update, from rollouts to optimizer step, with the patch point. Everything that is new about a run happens here.

The loss of an update is one fraction, over all micro-batches: sum of weight * divergence / sum of weight. It is never
a mean of means, so how the update is cut into micro-batches, padded or ordered does not change the gradient.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import distributed
from opd import teacher as teacher_scoring
from opd.batch import MicroBatch
from opd.config import Loss
from opd.engine import TorchEngine
from opd.hooks import TokenStats, TokenWeighter, TokenWeights
from opd.loss import Head, divergence_sum, token_stats
from opd.metrics import Stopwatch
from opd.models import LanguageModel, head_of
from opd.seeds import generator


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per unit of weight
    metrics: dict[str, float]
    weights: TokenWeights
    stats: TokenStats


def train_step(
    *,
    student: LanguageModel,
    teacher: LanguageModel,
    engine: TorchEngine,
    micro_batches: Sequence[MicroBatch],
    weighter: TokenWeighter,
    loss: Loss,
    vocab_size: int,
    step: int,
    seed: int,
    measure: frozenset[str] = frozenset(),
    progress: Callable[[int, int], None] = lambda batches, tokens: None,
) -> StepResult:
    """Scores, weights and applies one update.

    Args:
        micro_batches: the whole update (opd.batch.make_micro_batches), or this rank's part of it; sequence ids are
            unique over all ranks.
        vocab_size: ids compared (opd.models.shared_vocabulary).
        step: number of the update, from 1; with `seed` it seeds the weighter's generator.
        measure: fields of TokenStats wanted for diagnostics besides what the weighter needs.
        progress: called with 1 and a number of tokens after each micro-batch of each of the three phases.
    Raises:
        ValueError: the weighter's answer is malformed.
        FloatingPointError: loss or gradient is not finite; weights and optimizer are unchanged.
    """
    watch = Stopwatch(student.device)
    student_head, teacher_head = head_of(student.model, vocab_size), head_of(teacher.model, vocab_size)

    with watch("teacher"):
        teacher_states = teacher_scoring.score(teacher, micro_batches, progress)

    with watch("score"):
        needs = weighter.needs | measure
        columns: list[dict[str, Tensor]] = []
        for batch, states in zip(micro_batches, teacher_states, strict=True):
            columns.append({"sequence_id": batch.sequence_id, "position": batch.position})
            if needs:
                found = _stats_of_batch(student, student_head, states, teacher_head, batch, loss, needs)
                columns[-1].update({name: column.cpu() for name, column in found.items()})
            progress(1, len(batch.token_ids) if needs else 0)
        stats, place = _gathered_stats(columns, needs, vocab_size, step)

        weights = weighter(stats, generator(seed, "weighter", step))  # <- the patch point
        weights.check(stats)

    with watch("update"):
        rate = engine.start(step)
        relative, total_weight = _relative(weights.weights)  # the one denominator: all micro-batches, all ranks
        mine = place.split([len(batch.token_ids) for batch in micro_batches])
        total_loss = 0.0
        for batch, states, rows in zip(micro_batches, teacher_states, mine, strict=True):
            keep = relative[rows].nonzero().squeeze(1)  # of weight 0 neither the head nor, if all are, the body is run
            progress(1, len(keep))
            if len(keep) == 0:
                continue
            share = None if weights.forward_share is None else weights.forward_share[rows][keep].to(student.device)
            divergence = divergence_sum(
                student.states(batch, keep), student_head, states[keep].to(student.device), teacher_head,
                relative[rows][keep].to(student.device), share, loss.divergence, loss.jsd_beta, loss.chunk_bytes,
            )  # fmt: skip
            engine.backward(divergence / total_weight)
            total_loss += divergence.item() / total_weight
        total_loss = distributed.sum_number(total_loss)
        if total_weight == 0:
            warnings.warn(
                f"step {step}: no token has weight above 0; weights and optimizer stay unchanged", stacklevel=2
            )
        if not math.isfinite(total_loss):
            raise FloatingPointError(f"step {step}: the loss is {total_loss}")
        try:
            norm = engine.finish(apply=total_weight > 0)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step}: {error}") from None

    kept = int((weights.weights > 0).sum())
    metrics = {
        "loss/divergence": total_loss,
        "tokens/response": float(len(weights.weights)),
        "tokens/kept": float(kept),
        "optim/lr": rate,
        "optim/grad_norm": norm,
        **weights.metrics,
        **watch.times,
    }
    return StepResult(total_loss, metrics, weights, stats)


@torch.no_grad()
def _stats_of_batch(
    student: LanguageModel, student_head: Head, teacher_states: Tensor, teacher_head: Head, batch: MicroBatch,
    loss: Loss, needs: frozenset[str],
) -> dict[str, Tensor]:  # fmt: skip
    own = student.states(batch, torch.arange(len(batch.token_ids)))
    return token_stats(
        own, student_head, teacher_states.to(student.device), teacher_head, batch.token_ids.to(student.device), needs,
        loss.jsd_beta, loss.chunk_bytes,
    )  # fmt: skip


def pair_stats(
    student: LanguageModel, teacher: LanguageModel, batch: MicroBatch, vocab_size: int, loss: Loss, needs: frozenset[str]
) -> dict[str, Tensor]:  # fmt: skip
    """TokenStats columns of one micro-batch outside of an update, in the batch's own order; (N,) float32."""
    (states,) = teacher_scoring.score(teacher, [batch])
    heads = head_of(student.model, vocab_size), head_of(teacher.model, vocab_size)
    return _stats_of_batch(student, heads[0], states, heads[1], batch, loss, needs)


def _gathered_stats(
    columns: Sequence[dict[str, Tensor]], needs: frozenset[str], vocab_size: int, step: int
) -> tuple[TokenStats, Tensor]:
    """The rows of all micro-batches and ranks, sorted by (sequence_id, position); and where this rank's rows went, (n,)."""
    widths = {name: torch.zeros(0, 5) if "top5" in name else torch.zeros(0) for name in needs}
    empty = {"sequence_id": torch.zeros(0).long(), "position": torch.zeros(0).long(), **widths}
    empty = {name: column.long() if name.endswith("_ids") else column for name, column in empty.items()}
    own = {name: torch.cat([c[name] for c in columns]) if columns else empty[name] for name in empty}
    joined, mine = distributed.gather_rows(own)
    by_position = joined["position"].argsort(stable=True)
    order = by_position[joined["sequence_id"][by_position].argsort(stable=True)]
    stats = TokenStats(vocab_size=vocab_size, step=step, **{name: column[order] for name, column in joined.items()})
    return stats, order.argsort()[mine]


def _relative(weights: Tensor) -> tuple[Tensor, float]:
    """Weights divided by the largest, so that their scale changes nothing, bit for bit; and their sum."""
    largest = weights.max().item() if len(weights) else 0.0
    relative = weights.double() / largest if largest > 0 else weights.double()
    return relative.float(), relative.sum().item()
