"""One update, from rollouts to the optimizer's step, with the patch point. Read this file first.

    micro-batches -> the teacher's hidden states -> statistics of every token -> weights of the tokens (the patch point)
    -> the sum of all weights, once -> the student's gradient of sum of weight * divergence / that sum -> one step

The loss of an update is one fraction over all micro-batches and processes: sum of weight * divergence / sum of weight.
It is never a mean of means. So the gradient does not depend on how the update is cut into micro-batches, split over
processes, padded or ordered.

Shapes: N counted tokens of a micro-batch, or of the whole update where that is said; H hidden size.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import distributed
from opd.batch import MicroBatch, empty_micro_batch
from opd.config import LossSection
from opd.engine import Engine
from opd.hooks import TokenStats, TokenWeighter, TokenWeights
from opd.loss import Objective, divergence_sum, token_stats
from opd.models import LanguageModel
from opd.progress import Watch
from opd.seeds import generator
from opd.teacher import Teacher

GROUP = 32  # micro-batches whose teacher states are held at once outside of an update


@dataclass(frozen=True)
class Pair:
    """A student, its teacher, and what is compared between them."""

    student: LanguageModel
    teacher: Teacher
    vocab_size: int  # the ids below it are compared: those that both tokenizers have
    loss: LossSection

    @torch.no_grad()
    def stats(self, batch: MicroBatch, teacher_hidden_NH: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
        """The scoring pass of one micro-batch: the columns of TokenStats that `needs` names, on the CPU."""

        def score(student_hidden_NH: Tensor) -> dict[str, Tensor]:
            device = student_hidden_NH.device
            columns = token_stats(
                student_hidden_NH,
                self.student.head(self.vocab_size),
                teacher_hidden_NH.to(device),
                self.teacher.head(self.vocab_size),
                batch.token_ids.to(device),
                needs,
                self.loss.jsd_beta,
                self.loss.chunk_bytes,
            )
            return {name: column.cpu() for name, column in columns.items()}

        return self._forward(batch, torch.arange(len(batch.token_ids)), score)

    def divergence(self, batch: MicroBatch, teacher_hidden_NH: Tensor, part: "Part") -> Tensor:
        """Sum over the kept tokens of weight * loss, with its gradient in the student; float32 scalar.

        The head is projected only for the kept tokens.
        """

        def loss(student_hidden_KH: Tensor) -> Tensor:
            device = student_hidden_KH.device
            # moved as a whole and then indexed: rows picked on the CPU would not lie in pinned memory
            teacher_hidden_KH = teacher_hidden_NH.to(device, non_blocking=True)[part.keep.to(device)]
            return self.loss_sum(student_hidden_KH, teacher_hidden_KH, part.weights, part.forward_share)

        return self._forward(batch, part.keep, loss)

    def loss_sum(
        self, student_hidden_KH: Tensor, teacher_hidden_KH: Tensor, weights_K: Tensor, share_K: Tensor | None
    ) -> Tensor:
        """Sum of weight * loss over tokens whose hidden states are known; float32 scalar. See opd.loss."""
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

    def _forward(self, batch: MicroBatch, keep: Tensor, work: Callable[[Tensor], object]) -> object:
        """`work` on the student's hidden states of the kept tokens, inside of the model's own forward pass."""

        def forward() -> object:
            return self.student.head_scope(self.student.hidden_states(batch, keep), work)

        return self.student.run(forward)


@dataclass(frozen=True)
class Part:
    """What the weights of an update leave of one micro-batch: K kept tokens."""

    keep: Tensor  # (K,) int64, the tokens of weight above 0
    weights: Tensor  # (K,) float32, at most 1
    forward_share: Tensor | None  # (K,) in [0, 1]; None: 0 everywhere


class TokenTable:
    """The tokens of an update: a row each, as columns beside their micro-batches and the teacher's hidden states."""

    def __init__(self, batches: Sequence[MicroBatch], teacher_hidden: Sequence[Tensor]):
        self.batches, self.teacher_hidden = batches, teacher_hidden
        self.columns = [{"sequence_id": batch.sequence_id, "position": batch.position} for batch in batches]
        self.rows_here = torch.zeros(0, dtype=torch.long)  # where this process's rows stand in what `gather` returns

    def __iter__(self) -> Iterator[tuple[MicroBatch, Tensor, dict[str, Tensor]]]:
        """(micro-batch, teacher's hidden states, columns), which can be added to."""
        return zip(self.batches, self.teacher_hidden, self.columns, strict=True)

    def gather(self, needs: frozenset[str], vocab_size: int, step: int) -> TokenStats:
        """The rows of all processes, sorted by (sequence_id, position)."""
        columns = {
            name: torch.cat([c[name] for c in self.columns]) if self.columns else _empty_column(name)
            for name in ("sequence_id", "position", *sorted(needs))
        }
        joined, rows_here = distributed.gather_rows(columns)
        by_position = joined["position"].argsort(stable=True)
        order = by_position[joined["sequence_id"][by_position].argsort(stable=True)]
        self.rows_here = order.argsort()[rows_here]
        sorted_columns = {name: column[order] for name, column in joined.items()}
        return TokenStats(vocab_size=vocab_size, step=step, **sorted_columns)

    def deal(self, weights_N: Tensor, share_N: Tensor | None) -> Iterator[tuple[MicroBatch, Tensor, Part]]:
        """The weights of the gathered rows, dealt back to this process's micro-batches."""
        rows = self.rows_here.split([len(batch.token_ids) for batch in self.batches])
        for batch, hidden, mine in zip(self.batches, self.teacher_hidden, rows, strict=True):
            keep = weights_N[mine].nonzero().squeeze(1)
            kept = mine[keep]
            yield batch, hidden, Part(keep, weights_N[kept], None if share_N is None else share_N[kept])


@dataclass(frozen=True)
class Update:
    """What an update was."""

    loss: float  # nats per unit of weight
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

    `batches` are this process's micro-batches; their sequence ids are unique over all processes. `step` counts from 1.
    `measure` names fields of TokenStats that diagnostics want besides what the weighter needs. Raises ValueError when
    the weighter's answer is malformed, and FloatingPointError, with weights and optimizer unchanged, when loss or
    gradient is not finite.
    """
    watch = watch or Watch(pair.student.device)
    needs = weighter.needs | measure
    batches = _as_many_everywhere(batches, pair.student)
    with watch("teacher"):
        table = TokenTable(batches, pair.teacher.hidden_states(batches, watch.advance))

    with watch("score"):
        for batch, teacher_hidden, columns in table if needs else ():
            columns |= pair.stats(batch, teacher_hidden, needs)
            watch.advance(1, len(batch.token_ids))
        stats = table.gather(needs, pair.vocab_size, step)
        weights = weighter(stats, generator(seed, "weighter", step))  # <- the patch point
        weights.check(stats)
        relative, total = weights.relative()  # the one denominator: all micro-batches, all processes

    with watch("update"):
        rate = engine.start(step)
        weighted_sum = 0.0
        for batch, teacher_hidden, part in table.deal(relative, weights.forward_share):
            # of a micro-batch without kept tokens neither the head nor the body is run
            if len(part.keep) or (engine.lockstep and total > 0):
                divergence = pair.divergence(batch, teacher_hidden, part)
                engine.backward(divergence / total)
                weighted_sum += divergence.item()
            watch.advance(1, len(part.keep))
        loss = distributed.sum_number(weighted_sum) / total if total > 0 else 0.0
        norm = _finish(engine, loss, total, step)
    metrics = _metrics(loss, weights, rate, norm) | watch.times
    return Update(loss, metrics, weights, stats)


def _finish(engine: Engine, loss: float, total: float, step: int) -> float:
    """Applies the gradient and returns its norm; an update without any weight changes nothing."""
    if total == 0:
        warnings.warn(f"step {step}: no token has weight above 0; weights and optimizer stay unchanged", stacklevel=3)
    try:
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return engine.finish(apply=total > 0)
    except FloatingPointError as error:
        engine.finish(apply=False)  # whoever looks into the cause needs the memory of the gradients
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
    pair: Pair,
    batches: Sequence[MicroBatch],
    needs: frozenset[str],
    enter: Callable[[str], None] = lambda phase: None,
) -> Iterator[dict[str, Tensor]]:
    """TokenStats columns of each micro-batch outside of an update, in the batch's own order; on the CPU.

    The teacher scores GROUP micro-batches, then the student does; `enter` is called before each (opd.phases).
    """
    for start in range(0, len(batches), GROUP):
        group = batches[start : start + GROUP]
        enter("teacher")
        teacher_hidden = pair.teacher.hidden_states(group)
        enter("update")
        for batch, hidden in zip(group, teacher_hidden, strict=True):
            yield pair.stats(batch, hidden, needs)


def score_update(
    pair: Pair,
    batches: Sequence[MicroBatch],
    needs: frozenset[str],
    step: int,
    advance: Callable[[int, int], None] = lambda batches, tokens: None,
) -> TokenStats:
    """What a weighter would see of these micro-batches; nothing is trained."""
    table = TokenTable(batches, [torch.zeros(0)] * len(batches))
    for (batch, _, columns), scored in zip(table, stats_by_batch(pair, batches, needs), strict=True):
        columns |= scored
        advance(1, len(batch.token_ids))
    return table.gather(needs, pair.vocab_size, step)


def _as_many_everywhere(batches: Sequence[MicroBatch], student: LanguageModel) -> list[MicroBatch]:
    """The micro-batches, and empty ones until every process has equally many.

    A model that is split over the processes runs on all of them or on none.
    """
    missing = int(distributed.largest(len(batches))) - len(batches)
    return [*batches, *[empty_micro_batch(student.eos_ids[0])] * missing]


def _empty_column(name: str) -> Tensor:
    """The column of a process without any micro-batch, with the dtype and width that the others have."""
    if name in ("sequence_id", "position"):
        return torch.zeros(0, dtype=torch.long)
    column = torch.zeros(0, 5) if "top5" in name else torch.zeros(0)
    return column.long() if name.endswith("_ids") else column
