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
        buffers = 3 + 2 * (beta is not None) + (head.soft_cap is not None)
        work = _Workspace(hidden, head, teacher_hidden, teacher_head, buffers, chunk_bytes)
        for rows in work.chunks(weights.nonzero().squeeze(1)):
            chunk_hidden = hidden[rows].to(work.student_dtype)
            log_s, cap_slope = work.log_softmax(1, chunk_hidden, head, slope=any(grads))
            log_t, _ = work.log_softmax(2, teacher_hidden[rows].to(work.teacher_dtype), teacher_head)
            row_weights = weights[rows].float()
            share = None if forward_share is None else forward_share[rows].float()
            loss, grad = _loss_and_logit_grad(log_s, log_t, share, beta, work, wanted=any(grads))
            total += (row_weights.double() * loss.double()).sum()
            if grad is None:
                continue
            if cap_slope is not None:
                grad.mul_(cap_slope)
            # weight and scale belong to rows, so they multiply (c, H) factors of the products and not (c, V) gradients
            row_factor = row_weights * head.scale
            if grad_bias is not None:
                grad_bias[: head.size] += row_factor @ grad
            work.backpropagate(grad, row_factor, rows, chunk_hidden, head, grad_hidden, grad_weight)
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


def _loss_and_logit_grad(
    log_s: Tensor, log_t: Tensor, share: Tensor | None, beta: float | None, work: "_Workspace", wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss (c,) and its gradient in the student's logits (c, V); overwrites both arguments, and buffers 0, 3 and 4.

    With P, Q for student and teacher, and f for share:
      D = reverse KL  sum P r, r = log P - log Q          gradient P r - D P
      D = JSD_beta                                        gradient P s - (sum P s) P, s = (1 - beta) (log P - log M)
      forward KL  -sum Q r                                gradient P - Q
      together    (1 - f) D + f forward KL
    """
    rows = len(log_s)
    q = None if share is None and beta is None else torch.exp(log_t, out=work.buffer(0, rows))
    log_ratio = torch.sub(log_s, log_t, out=log_t)
    forward = None if share is None else -_rowdot(q, log_ratio)
    p = log_s.exp_()
    teacher_part = 0.0
    if beta is not None:
        common = _log_m_over_larger(log_ratio, beta, work.buffer(3, rows), work.buffer(4, rows))
        over_q = torch.clamp(log_ratio, min=0, out=work.buffer(4, rows)).add_(common)
        teacher_part = -beta * _rowdot(q, over_q)
        log_ratio.neg_().clamp_(min=0).add_(common).mul_(beta - 1)  # now s
    grad = log_ratio.mul_(p)
    centre = grad.sum(-1)
    loss = centre + teacher_part
    if share is not None:
        loss = (1 - share) * loss + share * forward
    if not wanted:
        return loss, None
    if share is None:
        return loss, grad.addcmul_(p, -centre[:, None])
    grad.mul_(1 - share[:, None]).addcmul_(p, (share - (1 - share) * centre)[:, None])
    return loss, grad.addcmul_(q, -share[:, None])


def _log_m_over_larger(log_ratio: Tensor, beta: float, out: Tensor, scratch: Tensor) -> Tensor:
    """log M - log max(P, Q) from r = log P - log Q, with M = beta Q + (1 - beta) P, as log1p(c expm1(-|r|)).

    c is beta where P > Q, else 1 - beta. Then log M - log Q is that + max(r, 0) and log M - log P is that + max(-r, 0),
    each exact where its model has mass. It does not overflow, does not round a small difference away, and is exactly 0
    where P = Q.
    """
    factor = torch.gt(log_ratio, 0, out=scratch).mul_(2 * beta - 1).add_(1 - beta)
    return torch.abs(log_ratio, out=out).neg_().expm1_().mul_(factor).log1p_()


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
    work = _Workspace(student_hidden, student_head, teacher_hidden, teacher_head, 4 + 2 * ("jsd" in needs), chunk_bytes)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        for rows in work.chunks(torch.arange(len(token_ids), device=student_hidden.device)):
            log_s, _ = work.log_softmax(1, student_hidden[rows].to(work.student_dtype), student_head)
            log_t, _ = work.log_softmax(2, teacher_hidden[rows].to(work.teacher_dtype), teacher_head)
            for name, column in _stats_of(log_s, log_t, token_ids[rows], needs, jsd_beta, work).items():
                found[name].append(column)
    return {name: torch.cat(columns) for name, columns in found.items()}


def _stats_of(
    log_s: Tensor, log_t: Tensor, token_ids: Tensor, needs: frozenset[str], beta: float, work: "_Workspace"
) -> dict[str, Tensor]:
    """The statistics of a chunk; overwrites buffer 0 and those from 3 on, and computes only what `needs` asks for."""
    rows, found = len(log_s), {}
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
        found.update(_overlap(log_s, log_t))

    log_ratio = None
    if needs & {"reverse_kl", "forward_kl", "jsd", "reverse_kl_energy"}:
        log_ratio = torch.sub(log_s, log_t, out=work.buffer(3, rows))
    # both KLs are >= 0; rounding can leave -1e-8, which would become the minimum of a normalised axis
    if needs & {"student_entropy", "reverse_kl", "jsd", "total_variation", "reverse_kl_energy", "forward_kl_energy"}:
        p = torch.exp(log_s, out=work.buffer(0, rows))
        if "student_entropy" in needs:
            found["student_entropy"] = -_rowdot(p, log_s)
        if "reverse_kl" in needs or "reverse_kl_energy" in needs:
            found["reverse_kl"] = _rowdot(p, log_ratio).clamp_(min=0)
        if "reverse_kl_energy" in needs:
            found["reverse_kl_energy"] = _energy(p, log_ratio, found["reverse_kl"])
    if needs & {"teacher_entropy", "forward_kl", "jsd", "total_variation", "forward_kl_energy"}:
        if "teacher_entropy" in needs or "forward_kl" in needs or "jsd" in needs:
            q = torch.exp(log_t, out=log_s)  # log P is not needed any more
            if "teacher_entropy" in needs:
                found["teacher_entropy"] = -_rowdot(q, log_t)
            if "forward_kl" in needs:
                found["forward_kl"] = -_rowdot(q, log_ratio).clamp_(max=0)
            log_t.copy_(q)
        else:
            log_t.exp_()
        q = log_t
        if "forward_kl_energy" in needs:
            found["forward_kl_energy"] = _energy(None, p, q)
        if "total_variation" in needs:
            found["total_variation"] = torch.sub(p, q, out=log_s).abs_().sum(-1).mul_(0.5)
        if "jsd" in needs:
            common = _log_m_over_larger(log_ratio, beta, work.buffer(4, rows), work.buffer(5, rows))
            over_q = torch.clamp(log_ratio, min=0, out=work.buffer(5, rows)).add_(common)
            over_p = log_ratio.neg_().clamp_(min=0).add_(common)
            found["jsd"] = (-beta * _rowdot(q, over_q) - (1 - beta) * _rowdot(p, over_p)).clamp_(min=0)
    return {name: found[name] for name in needs}


def _overlap(log_s: Tensor, log_t: Tensor) -> dict[str, Tensor]:
    """overlap_kl and teacher_topk_mass of TA-OPD: on the union of both models' likeliest tokens."""
    k = min(TOP_K, log_s.shape[-1])
    top_s, top_t = log_s.topk(k).indices, log_t.topk(k).indices
    both = torch.cat([top_s, top_t], -1)
    # an id in both top lists counts once: its second copy gets no mass
    again = torch.cat([torch.zeros_like(top_s, dtype=torch.bool), (top_t[:, :, None] == top_s[:, None, :]).any(-1)], -1)
    on_s = log_s.gather(1, both).masked_fill(again, -torch.inf).log_softmax(-1)
    on_t = log_t.gather(1, both).masked_fill(again, -torch.inf).log_softmax(-1)
    return {
        "overlap_kl": (on_t.exp() * (on_t - on_s).masked_fill(again, 0)).sum(-1).clamp_(min=0),
        "teacher_topk_mass": log_t.gather(1, top_s).exp().sum(-1),
    }


class _Workspace:
    """How the work is cut, and the memory it is done in.

    Tokens of a chunk and vocabulary rows of a tile are chosen so that all (c, V) buffers and the tile stay inside the
    byte budget. The buffers are allocated once and used for every chunk. A tile is the part of a head that is cast at
    once; a head that needs no cast is used whole.
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
        self.device = student_hidden.device
        self.vocab = student_head.size
        casts = (self.student_dtype, self.teacher_dtype) != (student_head.weight.dtype, teacher_head.weight.dtype)
        lower = torch.bfloat16 in (self.student_dtype, self.teacher_dtype)
        self.tile = self.vocab
        if casts or lower:
            width = max(student_hidden.shape[1], teacher_hidden.shape[1])
            self.tile = max(1, min(self.vocab, chunk_bytes // 8 // (4 * width)))  # two may stand at once
            chunk_bytes = chunk_bytes * 3 // 4
        self.rows = max(1, min(chunk_bytes // (4 * self.vocab * buffers), len(student_hidden)))
        self.buffers: list[Tensor | None] = [None] * buffers

    def chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.rows)

    def buffer(self, number: int, rows: int) -> Tensor:
        """(rows, V) float32 of the chunk's memory."""
        if self.buffers[number] is None:
            self.buffers[number] = torch.empty(self.rows, self.vocab, device=self.device)
        return self.buffers[number][:rows]

    def log_softmax(self, number: int, hidden: Tensor, head: Head, slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of (c, H) states into buffer `number`, by way of buffer 0; with `slope` also the derivative
        of the soft cap, in the last buffer."""
        logits = self.buffer(0, len(hidden))
        for part, weight in self._tiles(head, hidden.dtype):
            _matmul(logits[:, part], hidden, weight.T, add=False)
        if head.bias is not None:
            logits += head.bias[: head.size]
        if head.scale != 1:
            logits *= head.scale
        cap_slope = None
        if head.soft_cap is not None:
            logits.div_(head.soft_cap).tanh_()
            if slope:
                cap_slope = torch.square(logits, out=self.buffer(len(self.buffers) - 1, len(hidden))).neg_().add_(1)
            logits.mul_(head.soft_cap)
        return torch.log_softmax(logits, -1, out=self.buffer(number, len(hidden))), cap_slope

    def backpropagate(
        self,
        grad: Tensor,
        row_factor: Tensor,
        rows: Tensor,
        hidden: Tensor,
        head: Head,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        """Adds the two gradient products of a chunk: of diag(row_factor) grad, (c, V), in h W^T + b."""
        chunk_grad = torch.zeros(hidden.shape, device=hidden.device)
        scaled_hidden = (hidden * row_factor[:, None]).to(hidden.dtype)
        for part, weight in self._tiles(head, hidden.dtype):
            tile_grad = grad[:, part].to(hidden.dtype)
            if grad_hidden is not None:
                _matmul(chunk_grad, tile_grad, weight, add=True)
            if grad_weight is not None:
                _matmul(grad_weight[part], tile_grad.T, scaled_hidden, add=True)
        if grad_hidden is not None:
            grad_hidden[rows] = chunk_grad.mul_(row_factor[:, None])

    def _tiles(self, head: Head, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, head.size, self.tile):
            part = slice(start, min(start + self.tile, head.size))
            yield part, head.weight[part].to(dtype)


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


def _energy(factor: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """sum_v (factor (a - b))^2 of (c, V) tensors, (c,); b may be (c,); piece by piece like `_rowdot`."""
    width = max(1, (2**18 if a.device.type == "cpu" else 2**22) // max(len(a), 1))
    total = torch.zeros(len(a), device=a.device)
    for start in range(0, a.shape[1], width):
        part = slice(start, start + width)
        piece = a[:, part] - (b[:, part] if b.ndim == 2 else b[:, None])
        if factor is not None:
            piece.mul_(factor[:, part])
        total += piece.square_().sum(-1)
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
