"""Rules against the oracle weight of a token (TIP, arXiv 2604.14084, theory), by the gradient of every single token.

L is the mean divergence of the tokens of a fresh batch, and g_t the gradient of token t's divergence. The weight of
steepest descent is <grad L, g_t> / |g_t|^2 up to a constant, and it gains <grad L, g_t>^2 / |g_t|^2.

Shapes: N tokens of the update; K tokens whose gradient is taken; P parameters of the student that learn; H
hidden.
"""

from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from opd import adapters
from opd.batch import MicroBatch
from opd.hooks import TokenStats
from opd.progress import Progress
from opd.seeds import generator
from opd.step import Pair
from tip.config import TipConfig
from tip.diagnostics import keep_by_every_rule, rank_correlation
from tip.rules import RULES
from tip.scores import Axes

DRAWS = 8  # of a rule that samples; figures are means over them


def token_gradients(
    pair: Pair, batches: Sequence[MicroBatch], fresh: Sequence[MicroBatch], most: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's gradient of one token at a time, and of the fresh batch.

    Whole rollouts are taken in a seeded random order until the next one would exceed `most` tokens.

    Returns:
        sequence_id and position of the tokens (K, 2) int64, their g_t (K, P) and grad L (P,), both float32 on the CPU.
    """
    target_P = _mean_gradient(pair, fresh)
    lengths: dict[int, int] = {}
    for batch in batches:
        ids, counts = batch.sequence_id.unique(return_counts=True)
        lengths |= zip(ids.tolist(), counts.tolist(), strict=True)
    order = [list(lengths)[i] for i in torch.randperm(len(lengths), generator=generator(seed, "oracle order")).tolist()]
    ends = accumulate(lengths[i] for i in order)
    taken = [i for i, end in zip(order, ends, strict=True) if end <= most]
    count = sum(lengths[i] for i in taken)
    tokens, gradients_KP = [], torch.empty(count, len(target_P))
    with Progress("single-token gradients", count, "tokens") as progress:
        for batch in batches:
            keep = torch.isin(batch.sequence_id, torch.tensor(taken)).nonzero().squeeze(1)
            if not len(keep):
                continue
            hidden_KH = _hidden_states(pair, batch, keep)
            for row, token in enumerate(keep.tolist()):
                loss = pair.weighted_loss_of(*(hidden[row : row + 1] for hidden in hidden_KH), torch.ones(1), None)
                gradients_KP[len(tokens)] = _gradient(pair, loss, keep_graph=True)
                tokens.append((int(batch.sequence_id[token]), int(batch.position[token])))
                progress.advance(1, 1)
    return torch.tensor(tokens).view(-1, 2), gradients_KP, target_P.cpu()


def _mean_gradient(pair: Pair, batches: Sequence[MicroBatch]) -> Tensor:
    count = sum(p.numel() for p in adapters.trained(pair.student.model).values())
    total_P = torch.zeros(count, device=pair.student.device)
    for batch in batches:
        every_token = torch.arange(len(batch.token_ids))
        loss = pair.weighted_loss_of(*_hidden_states(pair, batch, every_token), torch.ones(len(every_token)), None)
        total_P += _gradient(pair, loss, keep_graph=False)
    return total_P / sum(len(batch.token_ids) for batch in batches)


def _hidden_states(pair: Pair, batch: MicroBatch, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The student's hidden states with their graph, and the teacher's; both (K, H) on the student's device."""
    (teacher_hidden_NH,) = pair.teacher.hidden_states([batch])
    return pair.student.hidden_states(batch, keep), teacher_hidden_NH[keep].to(pair.student.device)


def _gradient(pair: Pair, loss: Tensor, keep_graph: bool) -> Tensor:
    """The gradient of a loss in all parameters of the student that learn, (P,)."""
    parameters = list(adapters.trained(pair.student.model).values())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=keep_graph, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def against_oracle(
    stats: TokenStats,
    config: TipConfig,
    seed: int,
    retentions: Sequence[float],
    tokens_K2: Tensor,
    gradients_KP: Tensor,
    target_P: Tensor,
) -> dict[str, Any]:
    """Every rule against the oracle, on tokens with known gradients; a rule selects among all tokens of `stats`.

    `score_weight` and `score_gain` are Spearman correlations of a rule's score, with the oracle weight and with its
    gain. `cosine` compares the mean gradient of a selection with that of the fresh batch.
    """
    row_of = {key: row for row, key in enumerate(zip(stats.sequence_id.tolist(), stats.position.tolist(), strict=True))}
    rows_K = torch.tensor([row_of[i, t] for i, t in tokens_K2.tolist()], dtype=torch.int64)
    along_K, norm_K = (gradients_KP @ target_P).double(), torch.linalg.vector_norm(gradients_KP, dim=1).double()
    weight_K, gain_K = (x / norm_K.square().clamp(min=1e-300) for x in (along_K, along_K.clamp(min=0).square()))

    def cosine(kept_N: Tensor) -> float:
        mean_P = kept_N[rows_K].float() @ gradients_KP
        scale = (mean_P.norm() * target_P.norm()).item()
        return (mean_P @ target_P).item() / scale if scale > 0 else 0.0

    axes, rules = Axes(stats, config), {}
    draws = [keep_by_every_rule(stats, config, retentions, generator(seed, "oracle", i)) for i in range(DRAWS)]
    for name, rule in RULES.items():
        score_K = rule.score(stats, axes)[rows_K]
        constant = bool((score_K == score_K[0]).all())
        drawn = draws if rule.mechanic == "sample" else draws[:1]
        rules[name] = {
            "score_weight": None if constant else rank_correlation(score_K, weight_K),
            "score_gain": None if constant else rank_correlation(score_K, gain_K),
            "cosine": {
                label: fmean(cosine(kept[label]) for kept in drawn)
                for label in draws[0]
                if label.partition("@")[0] == name
            },
        }
    every_token = torch.ones(len(stats.position), dtype=torch.bool)
    return {"tokens": len(rows_K), "cosine_of_all": cosine(every_token), "rules": rules}
