"""One update, from micro-batches to the optimizer's step, with the patch point. Read this file first.

    micro-batches -> the teacher's hidden states -> statistics of every token -> weights of the tokens (the patch point)
    -> the sum of all weights, once -> the student's gradient of sum of weight * divergence / that sum -> one step

The loss of an update is one fraction over all micro-batches and processes: sum of weight * divergence / sum of weight.
It is never a mean of means. So the gradient does not depend on how the update is cut into micro-batches, split over
processes, padded or ordered.

Shapes: N counted tokens of a micro-batch, or of the whole update where the text says so; K kept tokens, which are those
of weight above 0; H hidden size.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import distributed
from opd.batch import MicroBatch, equally_many
from opd.config import LossSection
from opd.engine import Engine
from opd.hooks import FIELDS, TokenStats, TokenWeighter, TokenWeights
from opd.loss import Objective, divergence_sum, reads_teacher, token_stats
from opd.models import LanguageModel
from opd.progress import Watch
from opd.scorer import Scorer, token_columns
from opd.seeds import generator
from opd.teacher import Teacher

GROUP = 32  # outside of an update, the teacher's hidden states of this many micro-batches are held at once


@dataclass(frozen=True)
class Pair:
    """A student, its teacher, and how the two are compared."""

    student: LanguageModel
    teacher: Teacher
    vocab_size: int  # token ids below it are compared, because both tokenizers have them
    loss: LossSection
    scorers: tuple[Scorer, ...] = ()  # what else has a say about tokens

    @property
    def outside(self) -> frozenset[str]:
        """The names of columns that neither model gives."""
        return frozenset({"verdict"}).union(*(scorer.names for scorer in self.scorers))

    @property
    def packed_row(self) -> int:
        """Tokens of the longest row in which both models take several sequences, for opd.batch.make_micro_batches."""
        return min(self.student.packed_row, self.teacher.packed_row)

    @torch.no_grad()
    def stats(self, batch: MicroBatch, teacher_hidden_NH: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
        """The scoring pass of one micro-batch: the (N,) columns of TokenStats that `needs` names, on the CPU."""

        def scored(student_hidden_NH: Tensor) -> dict[str, Tensor]:
            device = student_hidden_NH.device
            columns = token_stats(
                student_hidden_NH,
                self.student.head(self.vocab_size),
                teacher_hidden_NH.to(device) if reads_teacher(needs) else teacher_hidden_NH,
                self.teacher.head(self.vocab_size),
                batch.token_ids.to(device),
                needs,
                self.loss.jsd_beta,
                self.loss.chunk_bytes,
            )
            return {name: column.cpu() for name, column in columns.items()}

        return self._forward(batch, torch.arange(len(batch.token_ids)), scored)

    def weighted_loss(self, batch: MicroBatch, teacher_hidden_NH: Tensor, part: "Part") -> Tensor:
        """Sum over the kept tokens of weight * loss in nats, a float32 scalar with a gradient in the student.

        The LM heads project only the kept tokens.
        """

        def of_states(student_hidden_KH: Tensor) -> Tensor:
            device = student_hidden_KH.device
            # All rows move before some are picked: rows picked on the CPU would not lie in pinned memory.
            teacher_hidden_KH = teacher_hidden_NH.to(device, non_blocking=True)[part.keep.to(device)]
            return self.weighted_loss_of(student_hidden_KH, teacher_hidden_KH, part.weights, part.forward_share)

        return self._forward(batch, part.keep, of_states)

    def weighted_loss_of(
        self, student_hidden_KH: Tensor, teacher_hidden_KH: Tensor, weights_K: Tensor, share_K: Tensor | None
    ) -> Tensor:
        """Sum of weight * loss in nats over K tokens, from their hidden states; a float32 scalar. See opd.loss."""
        device = student_hidden_KH.device
        return divergence_sum(
            student_hidden_KH,
            self.student.head(self.vocab_size),
            teacher_hidden_KH,
            self.teacher.head(self.vocab_size),
            weights_K.to(device),
            None if share_K is None else share_K.to(device),
            Objective(self.loss.divergence, self.loss.jsd_beta),
            self.loss.chunk_bytes,
        )

    def _forward(self, batch: MicroBatch, keep_K: Tensor, work: Callable[[Tensor], object]) -> object:
        """Calls `work` with the student's (K, H) hidden states and returns its answer.

        The call happens inside the engine's forward pass: ZeRO-3 gathers split parameters, the LM head among them, only
        there.
        """
        return self.student.run(lambda: self.student.head_scope(self.student.hidden_states(batch, keep_K), work))


@dataclass(frozen=True)
class Part:
    """The kept tokens of one micro-batch with their weights."""

    keep: Tensor  # (K,) int64: which of the micro-batch's N tokens have a weight above 0
    weights: Tensor  # (K,) float32, at most 1
    forward_share: Tensor | None  # (K,) float in [0, 1]; None stands for 0 everywhere


class TokenTable:
    """Per-token columns of this process's micro-batches, and the way back to them from the gathered rows."""

    def __init__(self, batches: Sequence[MicroBatch], teacher_hidden: Sequence[Tensor]):
        self.batches, self.teacher_hidden = batches, teacher_hidden
        self.columns = [batch.facts | {"verdict": torch.full(batch.position.shape, torch.nan)} for batch in batches]
        self.rows_here = torch.zeros(0, dtype=torch.long)  # `gather` sets it: where this process's rows stand

    def __iter__(self) -> Iterator[tuple[MicroBatch, Tensor, dict[str, Tensor]]]:
        """Per micro-batch: itself, the teacher's (N, H) hidden states, and its columns, which the caller may extend."""
        return zip(self.batches, self.teacher_hidden, self.columns, strict=True)

    def ask(self, scorers: Sequence[Scorer], wanted: frozenset[str]) -> None:
        """Adds the columns of those scorers that have a wanted one."""
        for scorer in scorers:
            if scorer.names & wanted:
                for columns, added in zip(self.columns, token_columns(scorer, self.batches), strict=True):
                    columns |= added

    def gather(self, vocab_size: int, step: int) -> TokenStats:
        """The rows of all processes, sorted by sequence id and then by position."""
        columns = {name: torch.cat([c[name] for c in self.columns]) for name in self.columns[0]}
        joined, rows_here = distributed.gather_rows(columns)
        by_position = joined["position"].argsort(stable=True)
        order = by_position[joined["sequence_id"][by_position].argsort(stable=True)]
        self.rows_here = order.argsort()[rows_here]
        sorted_columns = {name: column[order] for name, column in joined.items()}
        extra = {name: sorted_columns.pop(name) for name in sorted_columns.keys() - FIELDS}
        return TokenStats(vocab_size=vocab_size, step=step, extra=extra, **sorted_columns)

    def deal(self, weights_N: Tensor, share_N: Tensor | None) -> Iterator[tuple[MicroBatch, Tensor, Part]]:
        """Deals the weights of this process's rows back to its micro-batches: (micro-batch, teacher's states, part).

        Both arguments have a row for every gathered token, so `gather` comes first.
        """
        rows_by_batch = self.rows_here.split([len(batch.token_ids) for batch in self.batches])
        for batch, hidden_NH, rows in zip(self.batches, self.teacher_hidden, rows_by_batch, strict=True):
            keep_K = weights_N[rows].nonzero().squeeze(1)
            rows_K = rows[keep_K]
            yield batch, hidden_NH, Part(keep_K, weights_N[rows_K], None if share_N is None else share_N[rows_K])


@dataclass(frozen=True)
class Update:
    """The result of an update."""

    loss: float  # the weighted mean of the token losses, in nats
    metrics: dict[str, float]
    weights: TokenWeights
    stats: TokenStats


def train_step(
    pair: Pair,
    engine: Engine,
    batches: Sequence[MicroBatch],
    weighter: TokenWeighter,
    *,
    step: int,
    seed: int,
    measure: frozenset[str] = frozenset(),
    watch: Watch | None = None,
) -> Update:
    """One update: teacher -> statistics -> weights -> gradient -> optimizer.

    `batches` are of this process; sequence ids are unique over all processes, and `seed` is the same on all. `measure`
    names what diagnostics read of TokenStats. Raises ValueError when the weighter's answer is malformed, and
    FloatingPointError when loss or gradient is not finite; then parameters and optimizer are unchanged.
    """
    watch, wanted = watch or Watch(pair.student.device), weighter.needs | measure
    needs = wanted - pair.outside  # what takes a scoring pass
    batches = equally_many(batches, pair.student.eos_ids[0])
    with watch("teacher"):
        table = TokenTable(batches, pair.teacher.hidden_states(batches, watch.advance))

    with watch("score"):
        for batch, teacher_hidden_NH, columns in table if needs else ():
            columns |= pair.stats(batch, teacher_hidden_NH, needs)
            watch.advance(1, len(batch.token_ids))
        table.ask(pair.scorers, wanted)
        stats = table.gather(pair.vocab_size, step)
        weights = weighter(stats, generator(seed, "weighter", step))  # <- the patch point
        weights.check(stats)
        relative_N, total = weights.relative()  # the one denominator: all micro-batches, all processes

    with watch("update"):
        rate, loss_sum = engine.start(step), 0.0
        for batch, teacher_hidden_NH, part in table.deal(relative_N, weights.forward_share):
            # A micro-batch without kept tokens needs no forward pass, unless other processes wait for one.
            if len(part.keep) or (engine.lockstep and total > 0):
                weighted_loss = pair.weighted_loss(batch, teacher_hidden_NH, part)
                engine.backward(weighted_loss / total)
                loss_sum += weighted_loss.item()
            watch.advance(1, len(part.keep))
        loss = distributed.sum_number(loss_sum) / total if total > 0 else 0.0
        metrics = _metrics(loss, weights, rate, _finish(engine, loss, total, step))
    return Update(loss, metrics | watch.times, weights, stats)


def _finish(engine: Engine, loss: float, total: float, step: int) -> float:
    """Applies the gradient and returns its L2 norm; an update whose weights are all 0 changes nothing."""
    if total == 0:
        warnings.warn(
            f"step {step}: no token has weight above 0; parameters and optimizer stay unchanged", stacklevel=3
        )
    try:
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return engine.finish(apply=total > 0)
    except FloatingPointError as error:
        engine.finish(apply=False)  # drops the gradients, so that there is memory to look for the cause
        raise FloatingPointError(f"step {step}: {error}") from None


def _metrics(loss: float, weights: TokenWeights, rate: float, norm: float) -> dict[str, float]:
    return {
        "loss/divergence": loss,
        "tokens/response": float(len(weights.weights)),
        "tokens/kept": float((weights.weights > 0).sum()),
        "optim/lr": rate,
        "optim/grad_norm": norm,
        **weights.metrics,
    }


def stats_by_batch(
    pair: Pair, batches: Sequence[MicroBatch], needs: frozenset[str], enter: Callable[[str], None] = lambda phase: None
) -> Iterator[dict[str, Tensor]]:
    """Per micro-batch its (N,) columns of TokenStats, outside of an update; on the CPU, in the batch's own order.

    The teacher reads GROUP micro-batches, and then the student does. `enter` is called with the name of a phase of
    opd.phases before each of the two, so that the models can take turns on the device.
    """
    for first in range(0, len(batches), GROUP):
        group = batches[first : first + GROUP]
        enter("teacher")
        teacher_hidden = pair.teacher.hidden_states(group)
        enter("update")
        for batch, hidden_NH in zip(group, teacher_hidden, strict=True):
            yield pair.stats(batch, hidden_NH, needs)


def score_update(
    pair: Pair,
    batches: Sequence[MicroBatch],
    needs: frozenset[str],
    step: int,
    advance: Callable[[int, int], None] = lambda batches, tokens: None,
    enter: Callable[[str], None] = lambda phase: None,
) -> TokenStats:
    """The statistics that a weighter would see of these micro-batches; nothing is trained.

    `advance` is called after each micro-batch with 1 and its number of tokens, and `enter` as stats_by_batch does.
    """
    table = TokenTable(batches, [torch.zeros(0)] * len(batches))  # stats_by_batch makes the hidden states itself
    for (batch, _, columns), scored in zip(table, stats_by_batch(pair, batches, needs, enter), strict=True):
        columns |= scored
        advance(1, len(batch.token_ids))
    return table.gather(pair.vocab_size, step)
