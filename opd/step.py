"""One update, from rollouts to optimizer step, with the patch point. Everything that is new about a run happens here.

The loss of an update is one fraction, over all micro-batches and ranks: sum of weight * divergence / sum of weight. It
is never a mean of means, so how the update is cut into micro-batches, split over processes, padded or ordered does not
change the gradient.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opd import distributed
from opd import teacher as teacher_scoring
from opd.batch import MicroBatch, empty_micro_batch
from opd.config import Loss
from opd.engine import DeepSpeedEngine, TorchEngine
from opd.hooks import RunningWeighter, TokenStats, TokenWeighter, TokenWeights
from opd.loss import Head, divergence_sum, token_stats
from opd.metrics import Stopwatch
from opd.models import LanguageModel
from opd.seeds import generator

GROUP = 32  # micro-batches whose teacher states are held at once outside of an update


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
    engine: TorchEngine | DeepSpeedEngine,
    micro_batches: Sequence[MicroBatch],
    weighter: TokenWeighter,
    loss: Loss,
    vocab_size: int,
    step: int,
    seed: int,
    measure: frozenset[str] = frozenset(),
    progress: Callable[[int, int], None] = lambda batches, tokens: None,
    enter: Callable[[str], None] = lambda phase: None,
    cache: teacher_scoring.Cache | None = None,
) -> StepResult:
    """Scores, weights and applies one update.

    Args:
        micro_batches: the whole update (opd.batch.make_micro_batches), or this rank's part of it; sequence ids are
            unique over all ranks.
        vocab_size: ids compared (opd.models.shared_vocabulary).
        step: number of the update, from 1; with `seed` it seeds the weighter's generator.
        measure: fields of TokenStats wanted for diagnostics besides what the weighter needs.
        progress: called with 1 and a number of tokens after each micro-batch of each of the three passes.
        enter: called with "teacher" and "update" before those parts (opd.phases).
        cache: holds the teacher's hidden states meanwhile; None: host memory without a limit.
    Raises:
        ValueError: the weighter's answer is malformed.
        FloatingPointError: loss or gradient is not finite; weights and optimizer are unchanged.
    """
    watch = Stopwatch(student.device)
    needs = weighter.needs | measure
    # A running weighter judges a rollout at a time. Where the gradient can be divided when it is summed, it does so in
    # the update's own forward (one pass); else after the scoring pass, with the same result.
    by_rollout = isinstance(weighter, RunningWeighter) and weighter.one_pass
    one_pass = by_rollout and engine.divides_late
    # models that are split over the ranks run everywhere or nowhere: who has fewer micro-batches runs empty ones
    missing = int(distributed.largest(len(micro_batches))) - len(micro_batches)
    micro_batches = [*micro_batches, *[empty_micro_batch(student.eos_ids[0])] * missing]

    with watch("move"):
        enter("teacher")
    with watch("teacher"):
        teacher_states = teacher_scoring.score(teacher, micro_batches, progress, cache)
    with watch("move"):
        enter("update")
    teacher_head = teacher.head(vocab_size)

    with watch("score"):
        columns = [_names_of_rows(batch, number) for number, batch in enumerate(micro_batches)]
        for batch, states, column in zip(micro_batches, teacher_states, columns, strict=True):
            if needs and not one_pass:
                column.update(_scored(student, batch, states, teacher_head, vocab_size, loss, needs))
            if by_rollout and not one_pass:
                _weigh_rollouts(weighter, column, vocab_size, step, seed)  # <- the patch point
            progress(1, len(batch.token_ids) if needs and not one_pass else 0)
        total_weight = 1.0  # one pass: known when all rollouts are weighed, so the gradient is divided then
        if not one_pass:
            if by_rollout:
                stats, weights, place = _weighed(columns, needs, vocab_size, step)
            else:
                joined, place = _gathered(columns, needs)
                stats = TokenStats(vocab_size=vocab_size, step=step, **joined)
                weights = weighter(stats, generator(seed, "weighter", step))  # <- the patch point
                weights.check(stats)
            relative, total_weight = _relative(weights.weights)  # the one denominator: all micro-batches, all ranks
            mine = place.split([len(batch.token_ids) for batch in micro_batches])

    with watch("update"):
        rate = engine.start(step)
        total_loss = 0.0

        def divergence(own: Tensor, states: Tensor, keep: Tensor, weight: Tensor, share: Tensor | None) -> Tensor:
            device = own.device
            share = None if share is None else share[keep].to(device)
            states = states.to(device, non_blocking=True)[keep.to(device)]  # whole: picked rows would not be pinned
            return student.head_scope(
                own,
                lambda own: divergence_sum(
                    own,
                    student.head(vocab_size),
                    states,
                    teacher_head,
                    weight[keep].to(device),
                    share,
                    loss.divergence,
                    loss.jsd_beta,
                    loss.chunk_bytes,
                ),
            )

        def forward(batch: MicroBatch, states: Tensor, keep: Tensor, weight: Tensor, share: Tensor | None) -> Tensor:
            return divergence(student.states(batch, keep), states, keep, weight, share)

        for number, (batch, states, column) in enumerate(zip(micro_batches, teacher_states, columns, strict=True)):
            if one_pass:
                own = student.states(batch, torch.arange(len(batch.token_ids)))
                column.update(
                    _stats_of(own.detach(), states, student.head(vocab_size), teacher_head, batch, loss, needs)
                )
                weight, share = _weigh_rollouts(weighter, column, vocab_size, step, seed)  # <- the patch point
                keep = weight.nonzero().squeeze(1)
                value = divergence(own[keep.to(student.device)], states, keep, weight, share) if len(keep) else None
            else:
                weight = relative[mine[number]]
                share = None if weights.forward_share is None else weights.forward_share[mine[number]]
                keep = weight.nonzero().squeeze(1)  # of weight 0 neither the head nor, if all are, the body is run
                wanted = len(keep) > 0 or (engine.lockstep and total_weight > 0)
                value = student.run(partial(forward, batch, states, keep, weight, share)) if wanted else None
            progress(1, len(keep))
            if value is not None:
                engine.backward(value / total_weight)
                total_loss += value.item()
        if one_pass:
            stats, weights, _ = _weighed(columns, needs, vocab_size, step)
            total_weight = weights.weights.double().sum().item()
        total_loss = distributed.sum_number(total_loss) / total_weight if total_weight else 0.0
        if total_weight == 0:
            warnings.warn(
                f"step {step}: no token has weight above 0; weights and optimizer stay unchanged", stacklevel=2
            )
        try:
            if not math.isfinite(total_loss):
                raise FloatingPointError(f"the loss is {total_loss}")
            norm = engine.finish(apply=total_weight > 0, divisor=total_weight if one_pass else 1.0)
        except FloatingPointError as error:
            engine.finish(apply=False)  # what looks into the cause needs the gradients' room
            raise FloatingPointError(f"step {step}: {error}") from None

    learnt = weighter.learn(stats, weights) if isinstance(weighter, RunningWeighter) else {}
    metrics = {
        "loss/divergence": total_loss,
        "tokens/response": float(len(weights.weights)),
        "tokens/kept": float((weights.weights > 0).sum()),
        "optim/lr": rate,
        "optim/grad_norm": norm,
        **weights.metrics,
        **learnt,
        **watch.times,
    }
    return StepResult(total_loss, metrics, weights, stats)


def _names_of_rows(batch: MicroBatch, number: int) -> dict[str, Tensor]:
    """Which rollout, place and micro-batch a row is of; micro-batches are numbered over all ranks."""
    mine = number * distributed.world_size() + distributed.rank()
    where = torch.full_like(batch.position, mine)
    return {"sequence_id": batch.sequence_id, "position": batch.position, "micro_batch": where}


def _stats_of(
    own: Tensor, states: Tensor, head: Head, teacher_head: Head, batch: MicroBatch, loss: Loss, needs: frozenset[str]
) -> dict[str, Tensor]:
    device = own.device
    found = token_stats(
        own, head, states.to(device), teacher_head, batch.token_ids.to(device), needs, loss.jsd_beta, loss.chunk_bytes
    )
    return {name: column.cpu() for name, column in found.items()}


@torch.no_grad()
def _scored(
    student: LanguageModel,
    batch: MicroBatch,
    states: Tensor,
    teacher_head: Head,
    vocab_size: int,
    loss: Loss,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The scoring pass of one micro-batch: TokenStats columns, on the CPU."""

    def forward() -> dict[str, Tensor]:
        own = student.states(batch, torch.arange(len(batch.token_ids)))
        return student.head_scope(
            own, lambda own: _stats_of(own, states, student.head(vocab_size), teacher_head, batch, loss, needs)
        )

    return student.run(forward)


def pair_stats(
    student: LanguageModel,
    teacher: LanguageModel,
    micro_batches: Sequence[MicroBatch],
    vocab_size: int,
    loss: Loss,
    needs: frozenset[str],
    enter: Callable[[str], None] = lambda phase: None,
) -> Iterator[dict[str, Tensor]]:
    """TokenStats columns of each micro-batch outside of an update, in the batch's own order; on the CPU.

    The teacher scores GROUP micro-batches, then the student does; `enter` is called before each (opd.phases).
    """
    for start in range(0, len(micro_batches), GROUP):
        group = micro_batches[start : start + GROUP]
        enter("teacher")
        teacher_states = teacher_scoring.score(teacher, group)
        enter("update")
        head = teacher.head(vocab_size)
        for batch, states in zip(group, teacher_states, strict=True):
            yield _scored(student, batch, states, head, vocab_size, loss, needs)


def score_update(
    student: LanguageModel,
    teacher: LanguageModel,
    micro_batches: Sequence[MicroBatch],
    vocab_size: int,
    loss: Loss,
    needs: frozenset[str],
    step: int,
    progress: Callable[[int, int], None] = lambda batches, tokens: None,
) -> TokenStats:
    """What a weighter would see of these micro-batches; nothing is trained."""
    columns = []
    scored = pair_stats(student, teacher, micro_batches, vocab_size, loss, needs)
    for number, (batch, found) in enumerate(zip(micro_batches, scored, strict=True)):
        columns.append(_names_of_rows(batch, number) | found)
        progress(1, len(batch.token_ids))
    joined, _ = _gathered(columns, needs)
    return TokenStats(vocab_size=vocab_size, step=step, **joined)


def _weigh_rollouts(
    weighter: RunningWeighter, column: dict[str, Tensor], vocab_size: int, step: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Weights and forward shares (n,) of a micro-batch, rollout by rollout, added to its columns; no shares: None.

    A generator for each rollout, so that what is drawn does not depend on micro-batches or ranks.
    """
    rows_of_batch = TokenStats(vocab_size=vocab_size, step=step, **column)
    weight = torch.zeros(len(rows_of_batch.position))
    share = torch.zeros_like(weight)
    for sequence in rows_of_batch.sequence_id.unique().tolist():
        rows = (rows_of_batch.sequence_id == sequence).nonzero().squeeze(1)
        stats = rows_of_batch.rows(rows)
        answer = weighter(stats, generator(seed, "weighter", step, sequence))
        answer.check(stats)
        weight[rows] = answer.weights.float()
        if answer.forward_share is not None:
            share[rows] = answer.forward_share.float()
    column.update(weights=weight, forward_share=share)
    return weight, share if share.any() else None


def _gathered(columns: Sequence[dict[str, Tensor]], names: frozenset[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The rows of all micro-batches and ranks, sorted by (sequence_id, position); and where this rank's went, (n,)."""
    empty = {name: torch.zeros(0).long() for name in ("sequence_id", "position", "micro_batch")}
    for name in names:
        empty[name] = torch.zeros(0, 5) if "top5" in name else torch.zeros(0)
        empty[name] = empty[name].long() if name.endswith("_ids") else empty[name]
    own = {name: torch.cat([c[name] for c in columns]) if columns else empty[name] for name in empty}
    joined, mine = distributed.gather_rows(own)
    by_position = joined["position"].argsort(stable=True)
    order = by_position[joined["sequence_id"][by_position].argsort(stable=True)]
    return {name: column[order] for name, column in joined.items()}, order.argsort()[mine]


def _weighed(
    columns: Sequence[dict[str, Tensor]], needs: frozenset[str], vocab_size: int, step: int
) -> tuple[TokenStats, TokenWeights, Tensor]:
    """What `_weigh_rollouts` found, of all ranks; and where this rank's rows went, (n,)."""
    joined, place = _gathered(columns, needs | {"weights", "forward_share"})
    share = joined.pop("forward_share")
    weights = TokenWeights(weights=joined.pop("weights"), forward_share=share if share.any() else None)
    return TokenStats(vocab_size=vocab_size, step=step, **joined), weights, place


def _relative(weights: Tensor) -> tuple[Tensor, float]:
    """Weights divided by the largest, so that their scale changes nothing, bit for bit; and their sum."""
    largest = weights.max().item() if len(weights) else 0.0
    relative = weights.double() / largest if largest > 0 else weights.double()
    return relative.float(), relative.sum().item()
