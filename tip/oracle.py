"""Rules against the oracle weight of a token, by brute force: the gradient of every single token is taken."""

from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from opd.batch import MicroBatch
from opd.hooks import TokenStats
from opd.progress import Progress
from opd.seeds import generator
from opd.step import Pair
from tip.config import TipConfig
from tip.diagnostics import correlation, keep_by_every_rule
from tip.rules import RULES
from tip.scores import Axes, Spread

DRAWS = 8  # of a rule that samples


def token_gradients(
    pair: Pair, batches: Sequence[MicroBatch], fresh: Sequence[MicroBatch], tokens: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter gradients of the student, one token at a time (method: the oracle weight of TIP's theory).

    With L the mean divergence of the tokens of `fresh` and g_t the parameter gradient of token t's divergence: the
    weight of steepest descent is <grad L, g_t> / |g_t|^2 up to a constant, and what it gains is <grad L, g_t>^2 /
    |g_t|^2.

    Whole rollouts are taken in a seeded random order until the next would exceed `tokens`.

    Returns:
        sequence_id and position of these tokens (K, 2), their g_t (K, P) and grad L (P,); float32.
    """
    target = _mean_gradient(pair, fresh)
    lengths = {
        i: n
        for b in batches
        for i, n in zip(*(x.tolist() for x in b.sequence_id.unique(return_counts=True)), strict=True)
    }
    ids = list(lengths)
    order = [ids[i] for i in torch.randperm(len(ids), generator=generator(seed, "oracle order")).tolist()]
    taken = [i for i, so_far in zip(order, accumulate(lengths[i] for i in order), strict=True) if so_far <= tokens]
    count = sum(lengths[i] for i in taken)
    names, gradients = [], torch.empty(count, len(target))
    with Progress("single-token gradients", count, "tokens") as progress:
        for batch in batches:
            keep = torch.isin(batch.sequence_id, torch.tensor(taken)).nonzero().squeeze(1)
            if not len(keep):
                continue
            student_hidden, teacher_hidden = _hidden_states(pair, batch, keep)
            for row, token in enumerate(keep.tolist()):
                one = slice(row, row + 1)
                loss = pair.loss_sum(student_hidden[one], teacher_hidden[one], torch.ones(1), None)
                gradients[len(names)] = _gradient(pair, loss, again=True)
                names.append((int(batch.sequence_id[token]), int(batch.position[token])))
                progress.advance(1, 1)
    return torch.tensor(names).view(-1, 2), gradients, target.cpu()


def _mean_gradient(pair: Pair, batches: Sequence[MicroBatch]) -> Tensor:
    total = torch.zeros(sum(p.numel() for p in pair.student.model.parameters()), device=pair.student.device)
    for batch in batches:
        every_token = torch.arange(len(batch.token_ids))
        loss = pair.loss_sum(*_hidden_states(pair, batch, every_token), torch.ones(len(every_token)), None)
        total += _gradient(pair, loss, again=False)
    return total / sum(len(batch.token_ids) for batch in batches)


def _hidden_states(pair: Pair, batch: MicroBatch, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Of the student, with a graph, and of the teacher; both (K, H) on the student's device."""
    (teacher_hidden,) = pair.teacher.hidden_states([batch])
    return pair.student.hidden_states(batch, keep), teacher_hidden[keep].to(pair.student.device)


def _gradient(pair: Pair, loss: Tensor, again: bool) -> Tensor:
    """Of a loss in all of the student's parameters, (P,); with `again` its graph is used once more."""
    parameters = list(pair.student.model.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=again, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def against_oracle(
    stats: TokenStats,
    config: TipConfig,
    seed: int,
    retentions: Sequence[float],
    names: Tensor,
    gradients: Tensor,
    target: Tensor,
) -> dict[str, Any]:
    """Every rule against the oracle, on the tokens `names` (K, 2) with gradients (K, P); selected among all of `stats`.

    `score_weight` and `score_gain` are Spearman correlations of the rule's score with the oracle weight and with what
    that weight gains; `cosine` is that of the selection's mean gradient with the fresh batch's.
    """
    place = {
        pair: row for row, pair in enumerate(zip(stats.sequence_id.tolist(), stats.position.tolist(), strict=True))
    }
    rows = torch.tensor([place[i, t] for i, t in names.tolist()], dtype=torch.int64)
    along, squared = (gradients @ target).double(), torch.linalg.vector_norm(gradients, dim=1).double().square()
    weight, gain = (x / squared.clamp(min=1e-300) for x in (along, along.clamp(min=0).square()))

    def cosine(selected: Tensor) -> float:
        mean = selected[rows].float() @ gradients
        scale = (mean.norm() * target.norm()).item()
        return (mean @ target).item() / scale if scale > 0 else 0.0

    axes, found = Axes(stats, config), {}
    draws = [keep_by_every_rule(stats, config, retentions, generator(seed, "oracle", i)) for i in range(DRAWS)]
    for name, rule in RULES.items():
        score = rule.score(stats, axes)[rows]
        constant = bool((score == score[0]).all())
        found[name] = {
            "score_weight": None if constant else _spearman(score, weight),
            "score_gain": None if constant else _spearman(score, gain),
            "cosine": {
                label: fmean(cosine(draw[label]) for draw in (draws if rule.mechanic == "sample" else draws[:1]))
                for label in draws[0]
                if label.partition("@")[0] == name
            },
        }
    everything = torch.ones(len(stats.position), dtype=torch.bool)
    return {"tokens": len(rows), "cosine_of_all": cosine(everything), "rules": found}


def _spearman(a: Tensor, b: Tensor) -> float:
    return correlation(Spread.of(a).place(a), Spread.of(b).place(b))


def _spearman(a: Tensor, b: Tensor) -> float:
    return correlation(Spread.of(a).place(a), Spread.of(b).place(b))
