"""Entropies and divergences from logits, token by token: the readable reference of what loss.py computes in chunks.

All functions take float logits of shape (N, V), compute in their dtype and return (N,), in nats where the text says
nothing else. They are differentiable, keep several (N, V) tensors alive, and are meant for reading and for tests.
"""

import math

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """H(P) = -sum_v p log p."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(P_S || P_T), the loss of the TIP paper."""
    log_s, log_t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (log_s.exp() * (log_s - log_t)).sum(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(P_T || P_S)."""
    return reverse_kl(teacher_logits, student_logits)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """JSD_beta = beta KL(P_T || M) + (1 - beta) KL(P_S || M) with M = beta P_T + (1 - beta) P_S.

    Raises:
        ValueError: beta outside (0, 1); at the ends JSD_beta is 0, not one of the KLs.
    """
    check_beta(beta)
    log_s, log_t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    from_teacher = (log_t.exp() * (log_t - log_m)).sum(-1)
    from_student = (log_s.exp() * (log_s - log_m)).sum(-1)
    return beta * from_teacher + (1 - beta) * from_student


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1/2 sum_v |P_S - P_T|, in [0, 1].

    A token that the student drafts and the teacher verifies is accepted with probability 1 minus this: speculative
    sampling, arXiv 2211.17192.
    """
    return 0.5 * (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1)


def topk_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """KL(P_S || P_T) of a teacher that shows its k likeliest ids only; all other ids are one class, the tail.

    It is a lower bound of reverse_kl, because joining classes never raises a KL divergence (the log-sum inequality),
    and it rises to reverse_kl with k. The same holds for the other divergences of this file on `topk_classes`.
    """
    return reverse_kl(*topk_classes(student_logits, teacher_logits, k))


def topk_forward_kl(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """KL(P_T || P_S) of a teacher that shows its k likeliest ids only; a lower bound of forward_kl, as above."""
    return forward_kl(*topk_classes(student_logits, teacher_logits, k))


def topk_classes(student_logits: Tensor, teacher_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities of the teacher's k likeliest ids, and behind them of the tail; (N, k + 1) each.

    With k >= V there is no tail, and the classes are the V ids.
    """
    vocabulary = teacher_logits.shape[-1]
    top_NK = teacher_logits.topk(min(k, vocabulary)).indices
    classes = []
    for logits in (student_logits, teacher_logits):
        log_p = logits.log_softmax(-1)
        parts = [log_p.gather(-1, top_NK)]
        if k < vocabulary:
            parts.append(log_p.scatter(-1, top_NK, -torch.inf).logsumexp(-1, keepdim=True))
        classes.append(torch.cat(parts, -1))
    return classes[0], classes[1]


def sampled_reverse_kl(student_logprob: Tensor, teacher_logprob: Tensor) -> Tensor:
    """An estimate of KL(P_S || P_T) from the sampled token alone: t - 1 - log t with t = P_T / P_S of that token.

    Like its three siblings below it is f(t) >= 0 with f(1) = 0, for the convex f whose mean over P_S is the divergence.
    So it is unbiased for a token that the student sampled at temperature 1. Its error does not shrink with anything but
    more tokens, and where P_T is far above P_S it can be as large as one likes.
    """
    log_t = teacher_logprob - student_logprob
    return log_t.expm1() - log_t


def sampled_forward_kl(student_logprob: Tensor, teacher_logprob: Tensor) -> Tensor:
    """The same estimate of KL(P_T || P_S): t log t - (t - 1)."""
    log_t = teacher_logprob - student_logprob
    return log_t.exp() * log_t - log_t.expm1()


def sampled_jsd(student_logprob: Tensor, teacher_logprob: Tensor, beta: float = 0.5) -> Tensor:
    """The same estimate of JSD_beta: beta t log(t / m) - (1 - beta) log m with m = beta t + 1 - beta."""
    check_beta(beta)
    log_t = teacher_logprob - student_logprob
    log_m = torch.log1p(beta * log_t.expm1())
    return beta * log_t.exp() * (log_t - log_m) - (1 - beta) * log_m


def sampled_total_variation(student_logprob: Tensor, teacher_logprob: Tensor) -> Tensor:
    """The same estimate of the total variation: |t - 1| / 2. It is not bounded by 1."""
    return (teacher_logprob - student_logprob).expm1().abs() / 2


def check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise ValueError(f"JSD beta is {beta}, expected 0 < beta < 1 (at the ends JSD_beta is 0, not one of the KLs)")
