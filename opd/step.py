"""One update, from rollouts to optimizer step, with the patch point. Everything that is new about a run happens here.

The loss of an update is one fraction, over all micro-batches: sum of weight * divergence / sum of weight. It is never
a mean of means, so how the update is cut into micro-batches, padded or ordered does not change the gradient.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
) -> StepResult:
    """Scores, weights and applies one update.

    Args:
        micro_batches: the whole update (opd.batch.make_micro_batches).
        vocab_size: ids compared (opd.models.shared_vocabulary).
        step: number of the update, from 1; with `seed` it seeds the weighter's generator.
        measure: fields of TokenStats wanted for diagnostics besides what the weighter needs.
    Raises:
        ValueError: the weighter's answer is malformed.
        FloatingPointError: loss or gradient is not finite; weights and optimizer are unchanged.
    """
    watch = Stopwatch(student.device)
    student_head, teacher_head = head_of(student.model, vocab_size), head_of(teacher.model, vocab_size)

    with watch("teacher"):
        teacher_states = teacher_scoring.score(teacher, micro_batches)

    with watch("score"):
        needs = weighter.needs | measure
        columns: list[dict[str, Tensor]] = []
        for batch, states in zip(micro_batches, teacher_states, strict=True):
            columns.append({"sequence_id": batch.sequence_id, "position": batch.position})
            if needs:
                found = _stats_of_batch(student, student_head, states, teacher_head, batch, loss, needs)
                columns[-1].update({name: column.cpu() for name, column in found.items()})
        stats, order = _sorted_stats(columns, needs, vocab_size, step)

        weights = weighter(stats, generator(seed, "weighter", step))  # <- the patch point
        weights.check(stats)

    with watch("update"):
        rate = engine.start(step)
        largest = weights.weights.max().item() if len(weights.weights) else 0.0
        # divided by the largest, so that their scale changes nothing, bit for bit
        relative = weights.weights.double() / largest if largest > 0 else weights.weights.double()
        total_weight = relative.sum().item()
        relative = relative.float()
        total_loss = 0.0
        # back from the sorted order to micro-batches
        place = order.argsort().split([len(batch.token_ids) for batch in micro_batches])
        for batch, states, rows in zip(micro_batches, teacher_states, place, strict=True):
            row_weights = relative[rows]
            keep = row_weights.nonzero().squeeze(1)
            if total_weight == 0 or len(keep) == 0:
                continue
            share = None if weights.forward_share is None else weights.forward_share[rows][keep].to(student.device)
            value = (
                divergence_sum(
                    student.states(batch, keep),
                    student_head,
                    states[keep].to(student.device),
                    teacher_head,
                    row_weights[keep].to(student.device),
                    share,
                    loss.divergence,
                    loss.jsd_beta,
                    loss.chunk_bytes,
                )
                / total_weight
            )
            engine.backward(value)
            total_loss += value.item()
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


def _sorted_stats(
    columns: Sequence[dict[str, Tensor]], needs: frozenset[str], vocab_size: int, step: int
) -> tuple[TokenStats, Tensor]:
    """Joins the micro-batches' rows, sorted by (sequence_id, position), and the order that sorted them."""
    none = torch.zeros(0)
    empty = {"sequence_id": none.long(), "position": none.long(), **dict.fromkeys(needs, none)}
    joined = {name: torch.cat([nothing, *(c[name] for c in columns)]) for name, nothing in empty.items()}
    by_position = joined["position"].argsort(stable=True)
    order = by_position[joined["sequence_id"][by_position].argsort(stable=True)]
    return TokenStats(vocab_size=vocab_size, step=step, **{n: column[order] for n, column in joined.items()}), order
