"""Two Triton kernels for CUDA: the sums over the vocabulary that a chunk of tokens needs, and its gradient.

PyTorch reads and writes a (c, V) tensor for every operation of opd.loss, a dozen times in all, which on a GPU takes
longer than the matrix products themselves. Here each token's logits are read once for all its sums and once more for
its gradient. opd.loss describes the formulas; its PyTorch path is what these kernels are tested against.

Triton comes with PyTorch for CUDA. With TRITON_INTERPRET=1 the kernels run on a CPU, for tests.
Shape suffixes as in opd.loss: c tokens of a chunk, V vocabulary.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SUM_BLOCK, BLOCK, WARPS = 2048, 4096, 8  # vocabulary entries that a program reads at once, and its warps


@dataclass(frozen=True)
class RowSums:
    """What one reading of the logits s of the student and t of the teacher gives, each (c,) float32, in nats.

    The fields are rows of one tensor, in this order, in which `write_gradient` finds them.
    """

    log_z_student: Tensor  # log sum_v exp(s)
    log_z_teacher: Tensor
    shift: Tensor  # s - t of the first vocabulary entry
    centre: Tensor  # sum_v P (s - t - shift)
    student_entropy: Tensor
    teacher_entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor


def row_sums(student_cV: Tensor, teacher_cV: Tensor) -> RowSums:
    """The sums over the vocabulary, from contiguous float32 logits."""
    tokens, vocabulary = student_cV.shape
    sums = torch.empty(8, tokens, device=student_cV.device)
    _sum_rows[(tokens,)](student_cV, teacher_cV, sums, vocabulary, BLOCK=SUM_BLOCK, num_warps=WARPS)
    return RowSums(*sums)


def write_gradient(
    student_cV: Tensor, teacher_cV: Tensor, sums: RowSums, share_c: Tensor | None, out: Tensor
) -> Tensor:
    """Writes the gradient of (1 - f) KL(P || Q) + f KL(Q || P) in the student's logits into `out`, (c, V), any dtype.

    `share_c` is f; None stands for 0. The logits are contiguous, and so are the rows of `out`.
    """
    tokens, vocabulary = student_cV.shape
    share_c = torch.zeros_like(sums.centre) if share_c is None else share_c
    grid = (tokens, triton.cdiv(vocabulary, BLOCK))
    first_row = sums.log_z_student
    _write_gradient[grid](
        student_cV, teacher_cV, first_row, share_c, out, out.stride(0), vocabulary, BLOCK=BLOCK, num_warps=WARPS
    )
    return out


@triton.jit
def _sum_rows(student, teacher, sums, vocabulary, BLOCK: tl.constexpr):
    """One program is one token. Each lane keeps sums of its own, relative to its own running maximum."""
    row, tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    student += row * vocabulary
    teacher += row * vocabulary
    lanes = tl.arange(0, BLOCK)
    # Subtracted from all s - t, so that logits that differ by a constant leave nothing to round.
    shift = tl.load(student) - tl.load(teacher)
    p_max = tl.full([BLOCK], -float("inf"), tl.float32)
    q_max = tl.full([BLOCK], -float("inf"), tl.float32)
    p_sum = tl.zeros([BLOCK], tl.float32)  # of exp(s - p_max), and below of this times s - p_max and times s - t
    q_sum = tl.zeros([BLOCK], tl.float32)
    p_logit = tl.zeros([BLOCK], tl.float32)
    q_logit = tl.zeros([BLOCK], tl.float32)
    p_difference = tl.zeros([BLOCK], tl.float32)
    q_difference = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        s = tl.load(student + start + lanes, mask=inside, other=0.0)
        t = tl.load(teacher + start + lanes, mask=inside, other=0.0)
        difference = s - t - shift
        p_max, p_sum, p_logit, p_difference = _added(p_max, p_sum, p_logit, p_difference, s, difference, inside)
        q_max, q_sum, q_logit, q_difference = _added(q_max, q_sum, q_logit, q_difference, t, difference, inside)
    p_top, p_sum, p_logit, p_difference = _joined(p_max, p_sum, p_logit, p_difference)
    q_top, q_sum, q_logit, q_difference = _joined(q_max, q_sum, q_logit, q_difference)
    log_ratio_z = (p_top - q_top - shift) + (tl.log(p_sum) - tl.log(q_sum))  # log Z_P - log Z_Q - shift
    sums += row
    tl.store(sums, p_top + tl.log(p_sum))
    tl.store(sums + tokens, q_top + tl.log(q_sum))
    tl.store(sums + 2 * tokens, shift)
    tl.store(sums + 3 * tokens, p_difference / p_sum)
    tl.store(sums + 4 * tokens, tl.log(p_sum) - p_logit / p_sum)
    tl.store(sums + 5 * tokens, tl.log(q_sum) - q_logit / q_sum)
    tl.store(sums + 6 * tokens, p_difference / p_sum - log_ratio_z)
    tl.store(sums + 7 * tokens, log_ratio_z - q_difference / q_sum)


@triton.jit
def _added(top, mass, logit, difference, x, d, inside):
    """The lanes' running maximum and sums with one more logit x each, whose difference of the models is d."""
    higher = tl.where(inside, tl.maximum(top, x), top)
    # a lane that has seen nothing has no sums to scale, and -inf - -inf is no number
    scale = tl.where(top > -float("inf"), tl.exp(top - higher), 0.0)
    fall = tl.where(top > -float("inf"), top - higher, 0.0)
    weight = tl.where(inside, tl.exp(x - higher), 0.0)
    logit = scale * (logit + mass * fall) + weight * tl.where(inside, x - higher, 0.0)
    return higher, scale * mass + weight, logit, scale * difference + weight * d


@triton.jit
def _joined(top, mass, logit, difference):
    """One maximum and sums of all lanes' own."""
    highest = tl.max(top, 0)
    fall = tl.where(top > -float("inf"), top - highest, 0.0)
    scale = tl.where(top > -float("inf"), tl.exp(fall), 0.0)
    return highest, tl.sum(scale * mass, 0), tl.sum(scale * (logit + mass * fall), 0), tl.sum(scale * difference, 0)


@triton.jit
def _write_gradient(student, teacher, sums, share, out, out_stride, vocabulary, BLOCK: tl.constexpr):
    """One program is one token and one block of the vocabulary. The gradient is (1 - f) P (r - D) + f (P - Q)."""
    row, tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    s = tl.load(student + row * vocabulary + columns, mask=inside, other=0.0)
    t = tl.load(teacher + row * vocabulary + columns, mask=inside, other=0.0)
    f = tl.load(share + row)
    sums += row
    p = tl.exp(s - tl.load(sums))
    q = tl.exp(t - tl.load(sums + tokens))
    from_mean = s - t - tl.load(sums + 2 * tokens) - tl.load(sums + 3 * tokens)  # r - D
    gradient = (1 - f) * p * from_mean + f * (p - q)
    tl.store(out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=inside)
