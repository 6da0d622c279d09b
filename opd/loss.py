"""Divergences and token statistics from hidden states, fused with the LM heads, a chunk of tokens at a time.

The textbook computes logits (N, V), calls autograd, and keeps 12 to 28 bytes per token and vocabulary entry alive:
at V = 151,936 a response of 8,192 tokens costs 15 to 35 GB. A loop over chunks does not help, because autograd saves
every chunk. Here each chunk of tokens is projected once, its loss *and its gradient* are formed in place, and only
the gradients with respect to hidden states and head leave the chunk. The arithmetic is the least possible,
3 H_s + H_t multiply-adds per token and vocabulary entry: one projection of each model and the two gradient products.
The loss never projects tokens of weight 0; the statistics project all tokens.

On CUDA, opd.kernels does the elementwise work of the Kullback-Leibler divergences, because there PyTorch's operations,
each of which reads and writes a (c, V) tensor, take longer than the products. Everything else is plain PyTorch. Left
out on purpose: targets and labels (there are none), and any division: a loss is a *sum*, and the training step divides
once by one global number.

P is the student's distribution, Q the teacher's, and M = beta Q + (1 - beta) P their mixture. All numbers are in nats.
Shape suffixes: N tokens, V vocabulary (the compared ids), H hidden size of the model at hand, R rows of its head
(R >= V), c tokens of a chunk, K likeliest ids. So `log_p_cV` is (c, V).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd.chunks import DEFAULT_CHUNK_BYTES, Chunk, Head, States, Workspace, add_product, dot, has_kernels, sum_of
from opd.divergence import check_beta

TOP_K = 16  # of overlap_kl and teacher_topk_mass: TA-OPD, arXiv 2605.26844


DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "total_variation")


@dataclass(frozen=True)
class Objective:
    """The divergence D of a token, one of DIVERGENCES; opd.divergence has a function of each name.

    "reverse_kl" is KL(P || Q), "forward_kl" is KL(Q || P), "jsd" is JSD_beta, and "total_variation" is 1/2 sum |P - Q|.

    Raises:
        ValueError: another name, or a beta outside (0, 1).
    """

    divergence: str = "reverse_kl"
    jsd_beta: float = 0.5  # read by "jsd" alone

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence is {self.divergence!r}, expected one of {', '.join(map(repr, DIVERGENCES))}")
        check_beta(self.jsd_beta)


REVERSE_KL = Objective()


# --- the loss ---------------------------------------------------------------------------------------------------------
def divergence_sum(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor,
    forward_share: Tensor | None = None,
    objective: Objective = REVERSE_KL,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """Sum over tokens of w_t * loss_t, loss_t = (1 - f_t) D_t + f_t KL(Q || P); not divided by anything.

    The gradient reaches `student_hidden`, and weight and bias of `student_head`; whatever does not require it costs
    nothing. It is formed in the forward pass and is handed out once (a second backward raises RuntimeError).
    Logits are float32. float32 inputs are multiplied in float32; lower dtypes on CUDA in their own dtype with float32
    output, on a CPU upcast in vocabulary tiles.

    Args:
        student_hidden: (N, H_s), states after the final norm that *predict* the response tokens.
        teacher_hidden: (N, H_t), the same of the teacher.
        weights: (N,), >= 0. Rows of weight 0 are ignored even if they are not finite.
        forward_share: f, (N,) in [0, 1]; None is 0.
        objective: which divergence D is.
        chunk_bytes: transient memory; the result does not depend on it beyond rounding.
    Returns:
        float32 scalar, in nats.
    Raises:
        ValueError: shapes or vocabulary sizes that do not fit.
    """
    student, teacher = States(student_hidden, student_head), States(teacher_hidden.detach(), teacher_head)
    _check_shapes(student, teacher, {"weights": weights, "forward_share": forward_share})
    if objective.divergence == "forward_kl":
        forward_share = torch.ones_like(weights)
    summands = _Summands(student_head, teacher, weights.detach(), forward_share, objective, chunk_bytes)
    sources = (student_hidden, student_head.weight, student_head.bias)
    if not torch.is_grad_enabled():  # a Function is told what requires a gradient even where none is recorded
        sources = tuple(None if source is None else source.detach() for source in sources)
    with torch.autocast(student_hidden.device.type, enabled=False):  # it would round the row sums to bf16
        return _DivergenceSum.apply(*sources, summands)


@dataclass(frozen=True)
class _Summands:
    """What the sum is made of, except for the three tensors that autograd has to see."""

    student_head: Head
    teacher: States
    weights_N: Tensor
    forward_share_N: Tensor | None
    objective: Objective
    chunk_bytes: int

    @property
    def buffers(self) -> int:
        """How many (c, V) buffers stand at once: three, two more for the JSD, one more for the slope of a soft cap."""
        return 3 + 2 * (self.objective.divergence == "jsd") + (self.student_head.soft_cap is not None)

    @property
    def fused(self) -> bool:
        """Whether kernels do the elementwise work. They have no form for a bias, which few heads have."""
        by_kl = self.objective.divergence in ("reverse_kl", "forward_kl")
        return by_kl and self.student_head.bias is None and has_kernels(self.weights_N.device.type)


class _DivergenceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_RH: Tensor, bias_R: Tensor | None, summands: _Summands) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        gradients = _Gradients((hidden_NH, weight_RH, bias_R), ctx.needs_input_grad[:3])
        student, soft_cap = States(hidden_NH, summands.student_head), summands.student_head.soft_cap
        work = Workspace(student, summands.teacher, summands.buffers, summands.chunk_bytes)
        total = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        chunk_loss = _fused_loss if summands.fused else _plain_loss
        for rows_c in work.chunks(summands.weights_N.nonzero().squeeze(1)):
            chunks = student.chunk(rows_c, work.tile), summands.teacher.chunk(rows_c, work.tile)
            weights_c = summands.weights_N[rows_c].float()
            share_c = None if summands.forward_share_N is None else summands.forward_share_N[rows_c].float()
            slope_cV = work.take("cap_slope") if with_gradient and soft_cap is not None else None
            value_c, gradient = chunk_loss(*chunks, share_c, summands.objective, work, slope_cV)
            total += (weights_c.double() * value_c.double()).sum()
            if with_gradient:
                grad_cV = gradient()
                grad_cV = grad_cV if slope_cV is None else grad_cV.mul_(slope_cV)
                gradients.add(grad_cV, weights_c, rows_c, chunks[0])
        ctx.gradients = gradients.in_dtypes_of(hidden_NH, weight_RH, bias_R)
        return total.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of divergence_sum was already taken; call divergence_sum again")
        # scaled in place, because a copy would be as large as the head
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(grad_output) for gradient in gradients), None


def _fused_loss(
    student: Chunk,
    teacher: Chunk,
    share_c: Tensor | None,
    objective: Objective,
    work: Workspace,
    slope_cV: Tensor | None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """As _plain_loss, by opd.kernels. The gradient is in the dtype of the products that come next."""
    from opd import kernels

    logits_cV = student.logits(work.take("student_logits"), slope_cV), teacher.logits(work.take("teacher_logits"))
    sums = kernels.row_sums(*logits_cV)
    value_c = sums.reverse_kl if share_c is None else torch.lerp(sums.reverse_kl, sums.forward_kl, share_c)

    def gradient() -> Tensor:
        out_cV = work.take("gradient").view(student.states.dtype)[:, : work.vocabulary]
        return kernels.write_gradient(*logits_cV, sums, share_c, out_cV)

    return value_c, gradient


def _plain_loss(
    student: Chunk,
    teacher: Chunk,
    share_c: Tensor | None,
    objective: Objective,
    work: Workspace,
    slope_cV: Tensor | None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """The loss of each token, (c,), and what computes its gradient in the student's logits, (c, V).

    A head with a soft cap gets the derivative of the cap into `slope_cV`, if given.
    """
    log_p_cV = _log_probabilities("log_p", student, work, slope_cV)
    log_q_cV = _log_probabilities("log_q", teacher, work)
    loss = _chunk_loss(log_p_cV, log_q_cV, share_c, objective, work)
    return loss.value_c, partial(_logit_gradient, loss, share_c)


def _log_probabilities(name: str, chunk: Chunk, work: Workspace, slope_cV: Tensor | None = None) -> Tensor:
    """(c, V) in the buffer `name`; the buffer of the logits is free again."""
    logits_cV = chunk.logits(out=work.take("logits"), slope_cV=slope_cV)
    log_probabilities_cV = torch.log_softmax(logits_cV, -1, out=work.take(name))
    work.release("logits")
    return log_probabilities_cV


@dataclass(frozen=True)
class _ChunkLoss:
    """The loss of a chunk's tokens, and what its gradient is made of. The buffers are overwritten by the gradient."""

    value_c: Tensor
    p_cV: Tensor
    q_cV: Tensor | None  # None: only p is needed
    scored_p_cV: Tensor  # P s, with the score s of `_chunk_loss`
    centre_c: Tensor  # sum_v P s


def _chunk_loss(
    log_p_cV: Tensor, log_q_cV: Tensor, share_c: Tensor | None, objective: Objective, work: Workspace
) -> _ChunkLoss:
    """(1 - f) D + f forward KL of each token; overwrites both log-probabilities.

    D is sum_v P s plus a part that weighs the teacher's probabilities alone, with a score s of each vocabulary entry:
      reverse KL       s = r, r = log P - log Q
      JSD_beta         s = (1 - beta) (log P - log M), and beta KL(Q || M) is added
      total variation  s = 1/2 sign(r), and -sum Q s is added
    The forward KL is -sum Q r. With f = 1 everywhere, D is not used, and its score is that of the reverse KL.
    """
    scores_itself = objective.divergence in (
        "jsd",
        "total_variation",
    )  # and its scores need the teacher's probabilities
    q_cV = torch.exp(log_q_cV, out=work.take("q")) if scores_itself or share_c is not None else None
    log_ratio_cV = torch.sub(log_p_cV, log_q_cV, out=log_q_cV)
    forward_kl_c = None if share_c is None else -dot(q_cV, log_ratio_cV)
    p_cV = log_p_cV.exp_()
    match objective.divergence:
        case "jsd":
            teacher_part_c = _jsd_scores(log_ratio_cV, q_cV, objective.jsd_beta, work)
        case "total_variation":
            teacher_part_c = -dot(q_cV, log_ratio_cV.sign_().mul_(0.5))
        case _:
            teacher_part_c = 0.0
    scored_p_cV = log_ratio_cV.mul_(p_cV)
    centre_c = scored_p_cV.sum(-1)
    value_c = centre_c + teacher_part_c
    if share_c is not None:
        value_c = (1 - share_c) * value_c + share_c * forward_kl_c
    return _ChunkLoss(value_c, p_cV, q_cV, scored_p_cV, centre_c)


def _jsd_scores(log_ratio_cV: Tensor, q_cV: Tensor, beta: float, work: Workspace) -> Tensor:
    """Overwrites the log ratio by the scores (1 - beta) (log P - log M) of the JSD; returns beta KL(Q || M), (c,)."""
    share_cV = _smaller_share(log_ratio_cV, beta, out=work.take("smaller_share"))
    larger_cV = _log_m_over_larger(log_ratio_cV, share_cV, out=work.take("log_m_over_larger"))
    work.release("smaller_share")
    teacher_part_c = -beta * dot(q_cV, _log_m_over_q(log_ratio_cV, larger_cV, out=work.take("log_m_over_q")))
    _log_m_over_p(log_ratio_cV, larger_cV, out=log_ratio_cV).mul_(beta - 1)
    return teacher_part_c


def _logit_gradient(loss: _ChunkLoss, share_c: Tensor | None) -> Tensor:
    """Gradient of each token's loss in the student's logits, (c, V), written over P s.

    That of D is P s - (sum P s) P, for all kinds of scores; that of the forward KL is P - Q.
    """
    if share_c is None:
        return loss.scored_p_cV.addcmul_(loss.p_cV, -loss.centre_c[:, None])
    rest_c = 1 - share_c
    grad_cV = loss.scored_p_cV.mul_(rest_c[:, None])
    grad_cV.addcmul_(loss.p_cV, (share_c - rest_c * loss.centre_c)[:, None])
    return grad_cV.addcmul_(loss.q_cV, -share_c[:, None])


class _Gradients:
    """Gradients of the sum in hidden states (N, H), weight (R, H) and bias (R,) of the student, in float32.

    A gradient that is not wanted is None and costs nothing.
    """

    def __init__(self, sources: tuple[Tensor | None, ...], wanted: tuple[bool, ...]):
        self.hidden_NH, self.weight_RH, self.bias_R = (
            torch.zeros_like(source, dtype=torch.float32) if want else None
            for source, want in zip(sources, wanted, strict=True)
        )

    def add(self, grad_cV: Tensor, weights_c: Tensor, rows_c: Tensor, chunk: Chunk) -> None:
        """Adds the products of a chunk; `grad_cV` is its gradient in (h W^T + b) * scale, before the token weights."""
        # weight and scale belong to rows, so they multiply (c, H) factors of the products and not (c, V) gradients
        factor_c = weights_c * chunk.head.scale
        if self.bias_R is not None:
            self.bias_R[: chunk.head.size] += factor_c @ grad_cV
        hidden_cH = chunk.hidden_cH
        grad_cH = torch.zeros(hidden_cH.shape, device=hidden_cH.device)
        scaled_cH = (hidden_cH * factor_c[:, None]).to(hidden_cH.dtype)
        for part, weight_tile in chunk.tiles():
            grad_tile = grad_cV[:, part].to(hidden_cH.dtype)
            if self.hidden_NH is not None:
                add_product(grad_tile, weight_tile, out=grad_cH)
            if self.weight_RH is not None:
                add_product(grad_tile.T, scaled_cH, out=self.weight_RH[part])
        if self.hidden_NH is not None:
            self.hidden_NH[rows_c] = grad_cH.mul_(factor_c[:, None])

    def in_dtypes_of(self, *sources: Tensor | None) -> list[Tensor | None]:
        gradients = (self.hidden_NH, self.weight_RH, self.bias_R)
        pairs = zip(gradients, sources, strict=True)
        return [None if gradient is None else gradient.to(source.dtype) for gradient, source in pairs]


# --- the statistics ---------------------------------------------------------------------------------------------------
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
        needs: keys of STATISTICS.
        jsd_beta: the beta of the field `jsd`.
        chunk_bytes: transient memory; the result does not depend on it beyond rounding.
    Returns:
        name -> (N,) float32 on the device of the hidden states; the top-5 fields are (N, 5), ids int64.
    Raises:
        ValueError: an unknown name, a beta outside (0, 1), or shapes that do not fit.
    """
    if unknown := needs - STATISTICS.keys():
        raise ValueError(f"needs names {sorted(unknown)}, expected names out of {sorted(STATISTICS)}")
    check_beta(jsd_beta)
    student, teacher = States(student_hidden, student_head), States(teacher_hidden, teacher_head)
    _check_shapes(student, teacher, {"token_ids": token_ids})
    if not needs:
        return {}
    columns: dict[str, list[Tensor]] = {name: [] for name in needs}
    fused = bool(needs & {"reverse_kl", "forward_kl"}) and has_kernels(student_hidden.device.type)
    plan = _Plan(needs, FUSED if fused else {})
    work = Workspace(student, teacher, plan.buffers, chunk_bytes)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        for rows_c in work.chunks(torch.arange(len(token_ids), device=student_hidden.device)):
            models = {"student": student.chunk(rows_c, work.tile), "teacher": teacher.chunk(rows_c, work.tile)}
            results = plan.compute(models | {"token_ids": token_ids[rows_c], "jsd_beta": jsd_beta}, work)
            for name, column in columns.items():
                column.append(results[name])
    return {name: torch.cat(column) for name, column in columns.items()}


def reads_teacher(needs: frozenset[str]) -> bool:
    """Whether one of these statistics needs the teacher's hidden states. Where none does, they are not looked at."""
    return "teacher_logits" in _Plan(needs, {}).formulas


@dataclass(frozen=True)
class Formula:
    """How something of a chunk is computed: `function` of what `reads` names, in that order.

    `reads` may name keys of INTERMEDIATES, SHARED and STATISTICS, and what a chunk is given: "student" and "teacher"
    (`Chunk`), "token_ids" (c,) int64 and "jsd_beta" (float). The result must not be a view of an intermediate, whose
    buffer is overwritten later.
    """

    function: Callable[..., Tensor]
    reads: tuple[str, ...]


class _Plan:
    """The formulas that some statistics need, in the order of their computation, each once.

    An intermediate gives its buffer back as soon as no later formula reads it. So the number of buffers, and with it
    the number of tokens that are projected at once, follows from the tables and from what is asked for. Formulas of
    `instead` take the place of those of the same name.
    """

    def __init__(self, needs: frozenset[str], instead: dict[str, Formula]):
        self.formulas: dict[str, Formula] = {}
        known = INTERMEDIATES | SHARED | STATISTICS | instead
        for name in STATISTICS:
            if name in needs:
                self._append(name, known)
        # a later reader replaces an earlier one, so the last one stays
        last_reader = {read: name for name, formula in self.formulas.items() for read in formula.reads}
        self.spent = {name: [read for read in INTERMEDIATES if last_reader.get(read) == name] for name in self.formulas}

    def _append(self, name: str, known: dict[str, Formula]) -> None:
        if name in self.formulas or name not in known:
            return  # it is there already, or it is given with the chunk
        for read in known[name].reads:
            self._append(read, known)
        self.formulas[name] = known[name]

    @property
    def buffers(self) -> int:
        """How many intermediates stand at once."""
        held, most = set(), 1  # a chunk needs a size even if no intermediate is read
        for name in self.formulas:
            held |= {name} & INTERMEDIATES.keys()
            most = max(most, len(held))
            held -= set(self.spent[name])
        return most

    def compute(self, given: dict[str, object], work: Workspace) -> dict[str, Tensor]:
        """All formulas on one chunk: name -> value. What lies in a buffer is overwritten later."""
        values = dict(given)
        for name, formula in self.formulas.items():
            inputs = [values[read] for read in formula.reads]
            if name in INTERMEDIATES:
                values[name] = formula.function(*inputs, out=work.take(name))
            else:
                values[name] = formula.function(*inputs)
            for read in self.spent[name]:
                work.release(read)
        return values


def _smaller_share(log_ratio_cV: Tensor, beta: float, out: Tensor) -> Tensor:
    """Share in M of the model that gives an entry less: beta where P > Q, else 1 - beta."""
    return torch.gt(log_ratio_cV, 0, out=out).mul_(2 * beta - 1).add_(1 - beta)


def _log_m_over_larger(log_ratio_cV: Tensor, smaller_share_cV: Tensor, out: Tensor) -> Tensor:
    """log M - log max(P, Q) from r = log P - log Q, as log1p(c expm1(-|r|)) with c of `_smaller_share`.

    This does not overflow, does not round a small difference away, and is exactly 0 where P = Q.
    """
    return torch.abs(log_ratio_cV, out=out).neg_().expm1_().mul_(smaller_share_cV).log1p_()


def _log_m_over_q(log_ratio_cV: Tensor, log_m_over_larger_cV: Tensor, out: Tensor) -> Tensor:
    """log M - log Q, exact where Q has mass."""
    return torch.clamp(log_ratio_cV, min=0, out=out).add_(log_m_over_larger_cV)


def _log_m_over_p(log_ratio_cV: Tensor, log_m_over_larger_cV: Tensor, out: Tensor) -> Tensor:
    """log M - log P, exact where P has mass; `out` may be the log ratio itself."""
    return torch.neg(log_ratio_cV, out=out).clamp_(min=0).add_(log_m_over_larger_cV)


def _likeliest(log_p_cV: Tensor) -> torch.return_types.topk:
    """Values and indices of the top 16, (c, K), likeliest first; all of them when V < 16."""
    return log_p_cV.topk(min(TOP_K, log_p_cV.shape[-1]))


def _overlap_kl(
    log_p_cV: Tensor, log_q_cV: Tensor, student_top: torch.return_types.topk, teacher_top: torch.return_types.topk
) -> Tensor:
    """KL(Q || P), both renormalised on the union of both models' likeliest ids: TA-OPD, arXiv 2605.26844."""
    top_p_cK, top_q_cK = student_top.indices, teacher_top.indices
    union_cK = torch.cat([top_p_cK, top_q_cK], -1)
    # an id in both top lists counts once: its second copy gets no mass
    in_both_cK = (top_q_cK[:, :, None] == top_p_cK[:, None, :]).any(-1)
    again_cK = torch.cat([torch.zeros_like(top_p_cK, dtype=torch.bool), in_both_cK], -1)
    on_p_cK, on_q_cK = (
        log_cV.gather(1, union_cK).masked_fill(again_cK, -torch.inf).log_softmax(-1) for log_cV in (log_p_cV, log_q_cV)
    )
    return (on_q_cK.exp() * (on_q_cK - on_p_cK).masked_fill(again_cK, 0)).sum(-1).clamp_(min=0)


def _logprob(log_p_cV: Tensor, ids_c: Tensor) -> Tensor:
    return log_p_cV.gather(1, ids_c[:, None])[:, 0]


def _entropy(p_cV: Tensor, log_p_cV: Tensor) -> Tensor:
    return -dot(p_cV, log_p_cV)


def _reverse_kl_energy(p_cV: Tensor, log_ratio_cV: Tensor, reverse_kl_c: Tensor) -> Tensor:
    """sum_v (P (r - D))^2: the gradient of D = KL(P || Q) in the student's logits is P (r - D)."""

    def squares(p: Tensor, log_ratio: Tensor) -> Tensor:
        return (log_ratio - reverse_kl_c[:, None]).mul_(p).square_()

    return sum_of(squares, p_cV, log_ratio_cV)


def _jsd(kl_teacher_mixture_c: Tensor, kl_student_mixture_c: Tensor, beta: float) -> Tensor:
    return (beta * kl_teacher_mixture_c + (1 - beta) * kl_student_mixture_c).clamp_(min=0)


# (c, V) float32, each in a buffer of the workspace while it is read; the function writes into `out`.
INTERMEDIATES: dict[str, Formula] = {
    "student_logits": Formula(lambda student, out: student.logits(out), ("student",)),
    "teacher_logits": Formula(lambda teacher, out: teacher.logits(out), ("teacher",)),
    "log_p": Formula(partial(torch.log_softmax, dim=-1), ("student_logits",)),
    "log_q": Formula(partial(torch.log_softmax, dim=-1), ("teacher_logits",)),
    "p": Formula(torch.exp, ("log_p",)),
    "q": Formula(torch.exp, ("log_q",)),
    "log_ratio": Formula(torch.sub, ("log_p", "log_q")),
    "smaller_share": Formula(_smaller_share, ("log_ratio", "jsd_beta")),
    "log_m_over_larger": Formula(_log_m_over_larger, ("log_ratio", "smaller_share")),
    "log_m_over_q": Formula(_log_m_over_q, ("log_ratio", "log_m_over_larger")),
    "log_m_over_p": Formula(_log_m_over_p, ("log_ratio", "log_m_over_larger")),
}

# Small values, (c,) or (c, K), that several statistics read, or that let a buffer go earlier.
SHARED: dict[str, Formula] = {
    "student_top": Formula(_likeliest, ("log_p",)),
    "teacher_top": Formula(_likeliest, ("log_q",)),
    "kl_teacher_mixture": Formula(lambda q, log_m_over_q: -dot(q, log_m_over_q), ("q", "log_m_over_q")),
    "kl_student_mixture": Formula(lambda p, log_m_over_p: -dot(p, log_m_over_p), ("p", "log_m_over_p")),
}

# The fields of TokenStats, (c,) or (c, 5). A new statistic needs an entry here and a field of opd.hooks.TokenStats. The
# order affects how many buffers stand at once and nothing else. The divergences are clamped: rounding can leave -1e-8
# where they are 0, and a weighter that scales a column by its minimum would take that as the minimum.
STATISTICS: dict[str, Formula] = {
    "student_logprob": Formula(_logprob, ("log_p", "token_ids")),
    "teacher_logprob": Formula(_logprob, ("log_q", "token_ids")),
    "top1_agree": Formula(lambda log_p, log_q: (log_p.argmax(-1) == log_q.argmax(-1)).float(), ("log_p", "log_q")),
    "student_top5_ids": Formula(lambda top: top.indices[:, :5], ("student_top",)),
    "student_top5_logprobs": Formula(lambda top: top.values[:, :5], ("student_top",)),
    "teacher_top5_ids": Formula(lambda top: top.indices[:, :5], ("teacher_top",)),
    "teacher_top5_logprobs": Formula(lambda top: top.values[:, :5], ("teacher_top",)),
    "teacher_topk_mass": Formula(
        lambda log_q, top: log_q.gather(1, top.indices).exp().sum(-1), ("log_q", "student_top")
    ),
    "overlap_kl": Formula(_overlap_kl, ("log_p", "log_q", "student_top", "teacher_top")),
    "reverse_kl": Formula(lambda log_ratio, p: dot(p, log_ratio).clamp_(min=0), ("log_ratio", "p")),
    "reverse_kl_energy": Formula(_reverse_kl_energy, ("p", "log_ratio", "reverse_kl")),
    "student_entropy": Formula(_entropy, ("p", "log_p")),
    "forward_kl": Formula(lambda log_ratio, q: -dot(q, log_ratio).clamp_(max=0), ("log_ratio", "q")),
    "teacher_entropy": Formula(_entropy, ("q", "log_q")),
    "forward_kl_energy": Formula(lambda p, q: sum_of(lambda a, b: (a - b).square_(), p, q), ("p", "q")),
    "total_variation": Formula(lambda p, q: sum_of(lambda a, b: (a - b).abs_(), p, q).mul_(0.5), ("p", "q")),
    "jsd": Formula(_jsd, ("kl_teacher_mixture", "kl_student_mixture", "jsd_beta")),
}


def _row_sums(student_logits_cV: Tensor, teacher_logits_cV: Tensor) -> Any:
    from opd import kernels

    return kernels.row_sums(student_logits_cV, teacher_logits_cV)


# Where opd.kernels run and a divergence is needed, one reading of the logits gives these too.
FUSED: dict[str, Formula] = {
    "row_sums": Formula(_row_sums, ("student_logits", "teacher_logits")),
    "student_entropy": Formula(lambda sums: sums.student_entropy, ("row_sums",)),
    "teacher_entropy": Formula(lambda sums: sums.teacher_entropy, ("row_sums",)),
    "reverse_kl": Formula(lambda sums: sums.reverse_kl.clamp(min=0), ("row_sums",)),
    "forward_kl": Formula(lambda sums: sums.forward_kl.clamp(min=0), ("row_sums",)),
    "student_logprob": Formula(
        lambda logits, sums, ids: _logprob(logits, ids) - sums.log_z_student,
        ("student_logits", "row_sums", "token_ids"),
    ),
    "teacher_logprob": Formula(
        lambda logits, sums, ids: _logprob(logits, ids) - sums.log_z_teacher,
        ("teacher_logits", "row_sums", "token_ids"),
    ),
}


# --- shapes -----------------------------------------------------------------------------------------------------------
def _check_shapes(student: States, teacher: States, columns: dict[str, Tensor | None]) -> None:
    for who, model in (("student", student), ("teacher", teacher)):
        shape, weight_shape = tuple(model.hidden_NH.shape), model.head.weight.shape
        if len(shape) != 2 or shape[1] != weight_shape[1]:
            raise ValueError(
                f"{who} hidden states have shape {shape}, expected (N, {weight_shape[1]}): "
                "one row per response token, as wide as the head"
            )
        if model.head.size > weight_shape[0]:
            raise ValueError(f"{who} head has {weight_shape[0]} rows, expected at least vocab_size = {model.head.size}")
    if student.head.size != teacher.head.size:
        raise ValueError(
            f"student head compares {student.head.size} ids and teacher head {teacher.head.size}, expected the same: "
            "set Head.vocab_size to the ids both tokenizers have"
        )
    rows, teacher_rows = len(student.hidden_NH), len(teacher.hidden_NH)
    if rows != teacher_rows:
        raise ValueError(f"{rows} student rows and {teacher_rows} teacher rows, expected the same")
    for name, column in columns.items():
        if column is not None and tuple(column.shape) != (rows,):
            raise ValueError(f"{name} has shape {tuple(column.shape)}, expected ({rows},)")
