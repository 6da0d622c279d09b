"""Divergences and token statistics from hidden states, fused with the LM heads, a chunk of tokens at a time.

The textbook computes logits (N, V), calls autograd, and keeps 12 to 28 bytes per token and vocabulary entry alive:
at V = 151,936 a response of 8,192 tokens costs 15 to 35 GB. Looping over chunks does not help, because autograd saves
every chunk. Here each chunk of tokens is projected once, its loss *and its gradient* are formed in place, and only
the gradients with respect to hidden states and head leave the chunk. The arithmetic is the least possible,
3 H_s + H_t multiply-adds per token and vocabulary entry: one projection of each model and the two gradient products.
Tokens of weight 0 are never projected.

Left out on purpose: custom kernels (plain PyTorch runs on every device), targets and labels (there are none), and any
division: a loss is a *sum*, and the training step divides once by one global number.

Shapes: N tokens, V compared vocabulary, H_s and H_t hidden sizes, c tokens of a chunk. All numbers in nats.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.divergence import check_beta
from opd.hooks import STAT_FIELDS

DEFAULT_CHUNK_BYTES = 256 * 2**20
TOP_K = 16  # of overlap_kl and teacher_topk_mass: TA-OPD, arXiv 2605.26844


@dataclass(frozen=True)
class Head:
    """The last layer of a model: logits = soft_cap * tanh((h W^T + b) * scale / soft_cap); no tanh without a soft cap.

    Only the first `vocab_size` rows take part, so that padded vocabulary rows get no probability and no gradient.
    """

    weight: Tensor  # (rows, H), the parameter itself
    bias: Tensor | None = None  # (rows,)
    scale: float = 1.0
    soft_cap: float | None = None
    vocab_size: int | None = None  # None: all rows

    @property
    def size(self) -> int:
        return self.vocab_size or self.weight.shape[0]


def divergence_sum(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor,
    forward_share: Tensor | None = None,
    divergence: str = "reverse_kl",
    jsd_beta: float = 0.5,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """Sum over tokens of w_t * loss_t, loss_t = (1 - f_t) D_t + f_t KL(P_T || P_S); not divided by anything.

    The gradient reaches `student_hidden`, and weight and bias of `student_head`; whatever does not require it costs
    nothing. It is formed in the forward pass and is handed out once (a second backward raises RuntimeError).
    Logits are float32. float32 inputs are multiplied in float32; lower dtypes on CUDA in their own dtype with float32
    output, on a CPU upcast in vocabulary tiles.

    Args:
        student_hidden: (N, H_s), states after the final norm that *predict* the response tokens.
        teacher_hidden: (N, H_t), the same of the teacher.
        weights: (N,), >= 0. Rows of weight 0 are ignored even if they are not finite.
        forward_share: f, (N,) in [0, 1]; None is 0.
        divergence: "reverse_kl" = KL(P_S || P_T), "forward_kl" = KL(P_T || P_S), or "jsd" (see opd.divergence.jsd).
        chunk_bytes: transient memory; the result does not depend on it beyond rounding.
    Returns:
        float32 scalar.
    Raises:
        ValueError: shapes, vocabulary sizes, divergence or beta that do not fit.
    """
    if divergence not in ("reverse_kl", "forward_kl", "jsd"):
        raise ValueError(f"divergence is {divergence!r}, expected 'reverse_kl', 'forward_kl' or 'jsd'")
    check_beta(jsd_beta)
    _check_shapes(
        student_hidden, student_head, teacher_hidden, teacher_head, {"weights": weights, "forward_share": forward_share}
    )
    if divergence == "forward_kl":
        forward_share = torch.ones_like(weights)
    beta = jsd_beta if divergence == "jsd" else None
    grads = [
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (student_hidden, student_head.weight, student_head.bias)
    ]
    with torch.autocast(student_hidden.device.type, enabled=False):  # it would round the row sums to bf16
        return _DivergenceSum.apply(
            student_hidden,
            student_head.weight,
            student_head.bias,
            student_head,
            teacher_hidden.detach(),
            teacher_head,
            weights.detach(),
            forward_share,
            beta,
            chunk_bytes,
            grads,
        )


class _DivergenceSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, head, teacher_hidden, teacher_head, weights, forward_share, beta, chunk_bytes, grads
    ):
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if grads[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if grads[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if grads[2] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        # log P_S, log P_T and one more while a softmax runs; a mixture keeps P_T, JSD log M/Q and its steps besides
        buffers = 3 + (forward_share is not None) + 3 * (beta is not None) + (head.soft_cap is not None)
        plan = _Plan(hidden, head, teacher_hidden, teacher_head, buffers, chunk_bytes)
        for rows in plan.chunks(weights.nonzero().squeeze(1)):
            chunk_hidden = hidden[rows].to(plan.student_dtype)
            chunk_teacher = teacher_hidden[rows].to(plan.teacher_dtype)
            row_weights = weights[rows].float()
            share = None if forward_share is None else forward_share[rows].float()[:, None]
            loss, grad = _chunk(
                plan, chunk_hidden, head, chunk_teacher, teacher_head, row_weights, share, beta, any(grads)
            )
            total += (row_weights.double() * loss.double()).sum()
            if grad is None:
                continue
            if grad_bias is not None:
                grad_bias[: head.size] += grad.sum(0)
            plan.backpropagate(grad, rows, chunk_hidden, head, grad_hidden, grad_weight)
            del grad  # before the next chunk's logits stand beside it
        ctx.grads = [
            None if g is None else g.to(x.dtype)
            for g, x in ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
        ]
        return total.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        if ctx.grads is None:
            raise RuntimeError("the gradient of divergence_sum was already taken; call divergence_sum again")
        grads, ctx.grads = ctx.grads, None  # scaled in place: a copy would be a second gradient of the head's size
        return *(None if g is None else g.mul_(grad_output) for g in grads), *(None,) * 8


def _chunk(
    plan: "_Plan",
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor,
    share: Tensor | None,
    beta: float | None,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses (c,) of a chunk, and weight times their gradient in h W^T + b, (c, V)."""
    logits = plan.logits(hidden, head)
    cap_slope = None if head.soft_cap is None or not wanted else 1 - (logits / head.soft_cap).square_()
    log_s = logits.log_softmax(-1)
    del logits
    log_t = plan.logits(teacher_hidden, teacher_head).log_softmax(-1)
    loss, grad = _loss_and_logit_grad(log_s, log_t, share, beta, wanted)
    if grad is not None:
        grad.mul_(weights[:, None] * head.scale)
        if cap_slope is not None:
            grad.mul_(cap_slope)
    return loss, grad


def _loss_and_logit_grad(
    log_s: Tensor, log_t: Tensor, share: Tensor | None, beta: float | None, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss (c,) and its gradient in the student's logits (c, V); overwrites both arguments.

    With P, Q for student and teacher, and centred(x) = x - sum_v P x:
      reverse KL  sum P (log P - log Q)    gradient P * centred(log P - log Q)
      JSD_beta                             gradient P * centred((1 - beta) (log P - log M))
      forward KL  sum Q (log Q - log P)    gradient P - Q
    """
    q = None if share is None and beta is None else log_t.exp()
    log_ratio = log_t.neg_().add_(log_s)
    forward = None if share is None else -_rowdot(q, log_ratio)
    p = log_s.exp_()
    if beta is None:
        slope = log_ratio
        centre = loss = _rowdot(p, slope)
    else:
        common = _log_m_over_larger(log_ratio, beta)
        teacher_part = -_rowdot(q, log_ratio.clamp(min=0).add_(common))
        slope = log_ratio.neg_().clamp_(min=0).add_(common).mul_(beta - 1)
        centre = _rowdot(p, slope)
        loss = centre + beta * teacher_part
    if share is not None:
        loss = (1 - share[:, 0]) * loss + share[:, 0] * forward
    if not wanted:
        return loss, None
    slope.sub_(centre[:, None])
    if share is not None:
        slope.mul_(1 - share).add_(share)
    grad = slope.mul_(p)
    if share is not None:
        grad.addcmul_(q, share, value=-1)
    return loss, grad


def _log_m_over_larger(log_ratio: Tensor, beta: float) -> Tensor:
    """log M - log max(P, Q) from r = log P - log Q, with M = beta Q + (1 - beta) P, as log1p(c expm1(-|r|)).

    Then log M - log Q is that + max(r, 0) and log M - log P is that + max(-r, 0), each exact where its model has mass.
    It does not overflow, does not round a small difference away, and is exactly 0 where P = Q.
    """
    common = torch.expm1(-log_ratio.abs())
    return common.mul_(torch.where(log_ratio > 0, beta, 1 - beta)).log1p_()


def token_stats(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    token_ids: Tensor,
    needs: frozenset[str],
    jsd_beta: float = 0.5,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> dict[str, Tensor]:
    """Statistics of every token, one pass, no gradient: the fields of `TokenStats` named in `needs`, and no others.

    Args:
        student_hidden, teacher_hidden: (N, H_s) and (N, H_t), as in `divergence_sum`.
        token_ids: (N,) int64, the sampled tokens.
    Returns:
        name -> (N,) float32 on the device of the hidden states; the top-5 fields are (N, 5), ids int64.
    Raises:
        ValueError: an unknown name, or shapes that do not fit.
    """
    if unknown := needs - STAT_FIELDS:
        raise ValueError(f"needs names {sorted(unknown)}, expected names out of {sorted(STAT_FIELDS)}")
    check_beta(jsd_beta)
    _check_shapes(student_hidden, student_head, teacher_hidden, teacher_head, {"token_ids": token_ids})
    if not needs:
        return {}
    found: dict[str, list[Tensor]] = {name: [] for name in needs}
    plan = _Plan(student_hidden, student_head, teacher_hidden, teacher_head, 6, chunk_bytes)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        for rows in plan.chunks(torch.arange(len(token_ids), device=student_hidden.device)):
            columns = _stats_of(
                plan.logits(student_hidden[rows].to(plan.student_dtype), student_head).log_softmax(-1),
                plan.logits(teacher_hidden[rows].to(plan.teacher_dtype), teacher_head).log_softmax(-1),
                token_ids[rows], needs, jsd_beta,
            )  # fmt: skip
            for name, column in columns.items():
                found[name].append(column)
    return {name: torch.cat(columns) for name, columns in found.items()}


def _stats_of(log_s: Tensor, log_t: Tensor, token_ids: Tensor, needs: frozenset[str], beta: float) -> dict[str, Tensor]:
    found = {}
    p, q = log_s.exp(), log_t.exp()
    if "student_entropy" in needs:
        found["student_entropy"] = -_rowdot(p, log_s)
    if "teacher_entropy" in needs:
        found["teacher_entropy"] = -_rowdot(q, log_t)
    if "reverse_kl" in needs or "forward_kl" in needs:
        log_ratio = log_s - log_t
        # both are >= 0; rounding can leave -1e-8, which would become the minimum of a normalised axis
        found["reverse_kl"] = _rowdot(p, log_ratio).clamp_(min=0)
        found["forward_kl"] = _rowdot(q, log_ratio.neg_()).clamp_(min=0)
    if "jsd" in needs:
        log_ratio = log_s - log_t
        common = _log_m_over_larger(log_ratio, beta)
        from_teacher = -_rowdot(q, log_ratio.clamp(min=0).add_(common))
        from_student = -_rowdot(p, log_ratio.neg_().clamp_(min=0).add_(common))
        found["jsd"] = (beta * from_teacher + (1 - beta) * from_student).clamp_(min=0)
    if "total_variation" in needs:
        found["total_variation"] = (p - q).abs_().sum(-1).mul_(0.5)
    if "student_logprob" in needs:
        found["student_logprob"] = log_s.gather(1, token_ids[:, None])[:, 0]
    if "teacher_logprob" in needs:
        found["teacher_logprob"] = log_t.gather(1, token_ids[:, None])[:, 0]
    if "top1_agree" in needs:
        found["top1_agree"] = (log_s.argmax(-1) == log_t.argmax(-1)).float()
    for who, log_p in (("student", log_s), ("teacher", log_t)):
        if f"{who}_top5_ids" in needs or f"{who}_top5_logprobs" in needs:
            top = log_p.topk(min(5, log_p.shape[-1]))
            found[f"{who}_top5_ids"], found[f"{who}_top5_logprobs"] = top.indices, top.values
    if "overlap_kl" in needs or "teacher_topk_mass" in needs:
        k = min(TOP_K, log_s.shape[-1])
        top_s, top_t = log_s.topk(k).indices, log_t.topk(k).indices
        found["teacher_topk_mass"] = q.gather(1, top_s).sum(-1)
        both = torch.cat([top_s, top_t], -1)
        # an id in both top lists counts once: its second copy gets no mass
        again = torch.cat(
            [torch.zeros_like(top_s, dtype=torch.bool), (top_t[:, :, None] == top_s[:, None, :]).any(-1)], -1
        )
        on_s = log_s.gather(1, both).masked_fill(again, -torch.inf).log_softmax(-1)
        on_t = log_t.gather(1, both).masked_fill(again, -torch.inf).log_softmax(-1)
        found["overlap_kl"] = (on_t.exp() * (on_t - on_s).masked_fill(again, 0)).sum(-1).clamp_(min=0)
    return {name: found[name] for name in needs}


class _Plan:
    """How the work is cut: tokens of a chunk and vocabulary rows of a tile, so that both stay inside the byte budget.

    A tile is the part of a head that is cast at once; a head that needs no cast is used whole.
    """

    def __init__(
        self,
        student_hidden: Tensor,
        student_head: Head,
        teacher_hidden: Tensor,
        teacher_head: Head,
        buffers: int,
        chunk_bytes: int,
    ):
        on_cpu = student_hidden.device.type == "cpu"
        self.student_dtype = torch.float32 if on_cpu else student_hidden.dtype
        self.teacher_dtype = torch.float32 if on_cpu else teacher_hidden.dtype
        vocab = student_head.size
        casts = (self.student_dtype, self.teacher_dtype) != (student_head.weight.dtype, teacher_head.weight.dtype)
        lower = torch.bfloat16 in (self.student_dtype, self.teacher_dtype)
        self.tile = vocab
        if casts or lower:
            width = max(student_hidden.shape[1], teacher_hidden.shape[1])
            self.tile = max(1, min(vocab, chunk_bytes // 4 // (4 * width)))
            chunk_bytes = chunk_bytes * 3 // 4
        self.rows = max(1, chunk_bytes // (4 * vocab * buffers))

    def chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.rows)

    def _tiles(self, head: Head, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, head.size, self.tile):
            part = slice(start, min(start + self.tile, head.size))
            yield part, head.weight[part].to(dtype)

    def logits(self, hidden: Tensor, head: Head) -> Tensor:
        """(c, V) float32 logits of (c, H) hidden states."""
        out = torch.empty(len(hidden), head.size, device=hidden.device)
        for part, weight in self._tiles(head, hidden.dtype):
            _matmul(out[:, part], hidden, weight.T, add=False)
        if head.bias is not None:
            out += head.bias[: head.size]
        if head.scale != 1:
            out *= head.scale
        if head.soft_cap is not None:
            out.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
        return out

    def backpropagate(
        self,
        grad: Tensor,
        rows: Tensor,
        hidden: Tensor,
        head: Head,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        """Adds the two gradient products of a chunk, from (c, V) gradients in h W^T + b."""
        chunk_grad = None if grad_hidden is None else torch.zeros(hidden.shape, device=hidden.device)
        for part, weight in self._tiles(head, hidden.dtype):
            tile_grad = grad[:, part].to(hidden.dtype)
            if chunk_grad is not None:
                _matmul(chunk_grad, tile_grad, weight, add=True)
            if grad_weight is not None:
                _matmul(grad_weight[part], tile_grad.T, hidden, add=True)
        if chunk_grad is not None:
            grad_hidden[rows] = chunk_grad


def _matmul(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (float32) = or += a @ b, accumulated in float32 whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=1 if add else 0, out=out)
    elif add:
        out += torch.mm(a, b, out_dtype=torch.float32)
    else:
        out.copy_(torch.mm(a, b, out_dtype=torch.float32))


def _rowdot(a: Tensor, b: Tensor) -> Tensor:
    """sum_v a b of two (c, V) tensors, (c,); piece by piece, so that no (c, V) product stands in memory.

    torch.linalg.vecdot makes that product, and a batched matrix product sums less exactly (1.8e-5 at V = 151,936).
    """
    width = max(1, (2**18 if a.device.type == "cpu" else 2**22) // max(len(a), 1))
    total = torch.zeros(len(a), device=a.device)
    for start in range(0, a.shape[1], width):
        total += (a[:, start : start + width] * b[:, start : start + width]).sum(-1)
    return total


def _check_shapes(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    columns: dict[str, Tensor | None],
) -> None:
    for who, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
            raise ValueError(
                f"{who} hidden states have shape {tuple(hidden.shape)}, expected (N, {head.weight.shape[1]}): "
                "one row per response token, as wide as the head"
            )
        if head.size > head.weight.shape[0]:
            raise ValueError(f"{who} head has {head.weight.shape[0]} rows, expected at least vocab_size = {head.size}")
    if student_head.size != teacher_head.size:
        raise ValueError(
            f"student head compares {student_head.size} ids and teacher head {teacher_head.size}, expected the same: "
            "set Head.vocab_size to the ids both tokenizers have"
        )
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"{len(student_hidden)} student rows and {len(teacher_hidden)} teacher rows, expected the same"
        )
    for name, column in columns.items():
        if column is not None and tuple(column.shape) != (len(student_hidden),):
            raise ValueError(f"{name} has shape {tuple(column.shape)}, expected ({len(student_hidden)},)")
