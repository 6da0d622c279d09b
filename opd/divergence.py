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
    and it rises to reverse_kl with k.
    """
    log_s, log_t = topk_classes(student_logits, teacher_logits, k)
    return _kl(log_s, log_t)


def topk_forward_kl(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """KL(P_T || P_S) of a teacher that shows its k likeliest ids only; a lower bound of forward_kl, as above."""
    log_s, log_t = topk_classes(student_logits, teacher_logits, k)
    return _kl(log_t, log_s)


def topk_classes(student_logits: Tensor, teacher_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities of the teacher's k likeliest ids and of the tail, (N, k + 1) each.

    With k >= V the tail is empty, and its log-probability is -inf.
    """
    top_NK = teacher_logits.topk(min(k, teacher_logits.shape[-1])).indices
    classes = []
    for logits in (student_logits, teacher_logits):
        log_p = logits.log_softmax(-1)
        tail_N1 = log_p.scatter(-1, top_NK, -torch.inf).logsumexp(-1, keepdim=True)
        classes.append(torch.cat([log_p.gather(-1, top_NK), tail_N1], -1))
    return classes[0], classes[1]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) from log-probabilities; a class of probability 0 adds nothing."""
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise ValueError(f"JSD beta is {beta}, expected 0 < beta < 1 (at the ends JSD_beta is 0, not one of the KLs)")
