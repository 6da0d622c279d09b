"""Speculative decoding: how many tokens that the student drafts the teacher would accept.

The student drafts a block of gamma tokens. The teacher checks them in one pass: it accepts a token x with probability
min(1, P_T(x) / P_S(x)), and the first rejection ends the block (arXiv 2211.17192, 2302.01318). So the probability that
a token is accepted, before it is drawn, is the sum of min(P_S, P_T), which is 1 - total variation.

Shapes: N tokens, sorted by sequence id and then by position.
"""

import torch
from torch import Tensor

from opd.hooks import TokenStats

NEEDS = frozenset({"student_logprob", "teacher_logprob", "total_variation"})
GAMMA = 4  # tokens of a block, where nobody says another number


def acceptance(stats: TokenStats) -> float:
    """The mean probability that a drafted token is accepted. `stats` has the field total_variation, and N > 0."""
    return 1 - stats.total_variation.double().mean().item()


def accepted_length(stats: TokenStats, gamma: int = GAMMA) -> float:
    """The mean of `accepted_lengths` over the blocks that begin at every token of the responses."""
    return accepted_lengths(stats, gamma).mean().item()


def accepted_lengths(stats: TokenStats, gamma: int = GAMMA) -> Tensor:
    """How many tokens of a block are accepted, for the block that begins at each token, (N,) float64.

    `stats` has the fields in NEEDS, of responses that the student sampled at temperature 1, and N > 0. A block that
    reaches the end of its response ends there. The tokens before the last one of a block count with the probability
    that they are accepted as they were drawn, because a context of likely acceptances is not a typical one; the last
    one counts with its probability before it is drawn. So the mean over blocks is not biased by what was drawn.
    """
    accepted_N = 1 - stats.total_variation.double()
    as_drawn_N = (stats.teacher_logprob.double() - stats.student_logprob.double()).clamp(max=0).exp()
    reached_N = torch.ones_like(accepted_N)  # the probability that the block that begins here reaches its i-th token
    length_N = torch.zeros_like(accepted_N)
    for i in range(gamma):
        reached_N *= _in_same_response(stats, i)
        length_N += reached_N * _shifted(accepted_N, i)
        reached_N *= _shifted(as_drawn_N, i)
    return length_N


def _shifted(column_N: Tensor, by: int) -> Tensor:
    """At each place the value `by` places later; 0 where there is none."""
    return torch.cat([column_N[by:], column_N.new_zeros(min(by, len(column_N)))])


def _in_same_response(stats: TokenStats, by: int) -> Tensor:
    """Whether the token `by` places later follows this one in its response, with nothing between them."""
    sequence_id, position = stats.sequence_id, stats.position
    same_N = (_shifted(sequence_id + 1, by) == sequence_id + 1) & (_shifted(position, by) == position + by)
    return same_N.double()
