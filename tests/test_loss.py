"""The fused loss against naive float64 formulas with autograd, and what it promises about memory and chunks."""

import gc
import math

import pytest
import torch
from helpers import naive_loss, relative

from opd import divergence as reference
from opd.hooks import STAT_FIELDS
from opd.loss import (
    INTERMEDIATES,
    SHARED,
    STATISTICS,
    Formula,
    Head,
    Objective,
    divergence_sum,
    token_stats,
)

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "total_variation")


def case(n=7, v=53, hs=5, ht=9, seed=0, bias=False, scale=1.0, cap=None, dtype=torch.float32, gap=1.0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    student = Head(
        rand(v, hs).to(dtype).requires_grad_(), rand(v).to(dtype).requires_grad_() if bias else None, scale, cap
    )
    teacher = Head((rand(v, ht) * gap).to(dtype), rand(v).to(dtype) if bias else None, scale, cap)
    return rand(n, hs).to(dtype).requires_grad_(), student, rand(n, ht).to(dtype), teacher, torch.rand(n, generator=g)


def naive_logits(hidden, head):
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


def naive_total(hs, student, ht, teacher, weights, share=None, divergence="reverse_kl", beta=0.5):
    logits_s, logits_t = naive_logits(hs, student), naive_logits(ht, teacher)
    loss = naive_loss(divergence, logits_s, logits_t, beta)
    if share is not None:
        loss = (1 - share.double()) * loss + share.double() * naive_loss("forward_kl", logits_s, logits_t)
    return (weights.double() * loss).sum()


def without_ties(weights, hs, student, ht, teacher):
    """The weights without those of tokens that have an entry with P close to Q.

    The gradient of the total variation jumps there, so rounding can choose either side.
    """
    log_ratio = naive_logits(hs, student).log_softmax(-1) - naive_logits(ht, teacher).log_softmax(-1)
    clear = log_ratio.abs().amin(-1) > 2e-5
    assert clear.double().mean() > 0.8
    return weights * clear


def gradients(total, *tensors):
    tensors = [t for t in tensors if t is not None]
    return torch.autograd.grad(total, tensors)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("n,v", [(1, 2), (7, 53), (33, 1031)])
@pytest.mark.parametrize(
    "head", [{}, {"bias": True}, {"scale": 0.25}, {"cap": 3.0}, {"bias": True, "scale": 2.0, "cap": 5.0}]
)
def test_value_and_gradient_equal_the_naive_formula(divergence, mixture, n, v, head):
    hs, student, ht, teacher, weights = case(n, v, **head)
    weights = without_ties(weights, hs, student, ht, teacher)
    share = torch.rand(n, generator=torch.Generator().manual_seed(1)) if mixture else None
    ours = divergence_sum(hs, student, ht, teacher, weights, share, Objective(divergence, 0.3), chunk_bytes=2**16)
    naive = naive_total(hs, student, ht, teacher, weights, share, divergence, 0.3)
    assert ours.dtype == torch.float32
    assert abs(ours.item() - naive.item()) <= 2e-6 * max(1, abs(naive.item()))
    for a, b in zip(
        gradients(ours, hs, student.weight, student.bias),
        gradients(naive, hs, student.weight, student.bias),
        strict=True,
    ):
        assert relative(a, b) < 1e-5  # rounding in float32: up to 4.3e-6 with torch's plainest kernels


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_readable_reference_equals_the_naive_formula(name):
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(9, 31, generator=g).double(), torch.randn(9, 31, generator=g).double()
    arguments = (s, t, 0.2) if name == "jsd" else (s, t)
    torch.testing.assert_close(getattr(reference, name)(*arguments), naive_loss(name, s, t, 0.2))
    p = s.softmax(-1)
    torch.testing.assert_close(reference.entropy(s), -(p * p.log()).sum(-1))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("share", [False, True])
def test_chunks_do_not_change_the_result(divergence, share):
    hs, student, ht, teacher, weights = case(301, 997)
    weights = without_ties(weights, hs, student, ht, teacher)
    f = weights.flip(0) if share else None
    results = []
    for chunk_bytes in (1, 2**16, 2**20, 2**30):  # one row at a time ... everything at once
        total = divergence_sum(hs, student, ht, teacher, weights, f, Objective(divergence), chunk_bytes)
        results.append((total, torch.cat([g.flatten() for g in gradients(total, hs, student.weight)])))
    for total, gradient in results[1:]:
        assert abs(total.item() / results[0][0].item() - 1) < 1e-6
        assert relative(gradient, results[0][1]) < 5e-6  # the terms of the total variation cancel more


def test_rows_of_weight_zero_are_absent_even_when_not_finite():
    hs, student, ht, teacher, weights = case(9, 31)
    weights[[0, 4, 8]] = 0
    broken_s, broken_t = hs.detach().clone(), ht.clone()
    broken_s[0], broken_t[4], broken_s[8] = torch.nan, torch.inf, torch.inf
    broken_s.requires_grad_()
    ours = divergence_sum(broken_s, student, broken_t, teacher, weights)
    keep = weights > 0
    alone = divergence_sum(hs[keep], student, ht[keep], teacher, weights[keep])
    assert ours.item() == alone.item()
    gradient, weight_gradient = gradients(ours, broken_s, student.weight)
    assert gradient[~keep].abs().max() == 0
    assert torch.equal(gradient[keep], gradients(alone, hs)[0][keep])
    assert weight_gradient.isfinite().all()


def test_a_tiny_weight_is_not_zero():
    hs, student, ht, teacher, _ = case(9, 31)
    tiny = torch.ones(9)
    tiny[4] = 1e-9
    alone = torch.zeros(9)
    alone[4] = 1e-9
    gradient = gradients(divergence_sum(hs, student, ht, teacher, tiny), hs)[0]
    naive = gradients(naive_total(hs, student, ht, teacher, tiny), hs)[0]
    assert relative(gradient[4], naive[4]) < 1e-5
    assert divergence_sum(hs, student, ht, teacher, alone).item() > 0


def test_all_weights_zero_but_one_and_all_zero():
    hs, student, ht, teacher, _ = case(5, 17)
    one = torch.tensor([0, 0, 2.0, 0, 0])
    assert relative(divergence_sum(hs, student, ht, teacher, one), naive_total(hs, student, ht, teacher, one)) < 1e-6
    nothing = divergence_sum(hs, student, ht, teacher, torch.zeros(5))
    assert nothing.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(nothing, hs, student.weight))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_models_have_divergence_and_gradient_zero_whatever_the_padding(divergence):
    hs, student, _, _, weights = case(11, 67)
    student = Head(student.weight, vocab_size=61)
    padded = Head(torch.cat([student.weight.detach()[:61], torch.full((19, 5), 1e4)]), vocab_size=61)
    total = divergence_sum(hs, student, hs.detach().clone(), padded, weights, objective=Objective(divergence))
    gradient, weight_gradient = gradients(total, hs, student.weight)
    assert total.item() == 0 and gradient.abs().max() == 0 and weight_gradient.abs().max() == 0
    assert weight_gradient.shape == (67, 5) and weight_gradient[61:].abs().max() == 0


def test_padded_rows_get_no_probability_and_no_gradient():
    hs, student, ht, teacher, weights = case(6, 40)
    cut_s, cut_t = Head(student.weight, vocab_size=33), Head(teacher.weight, vocab_size=33)
    short_s, short_t = Head(student.weight[:33]), Head(teacher.weight[:33])
    ours, other = (divergence_sum(hs, s, ht, t, weights) for s, t in ((cut_s, cut_t), (short_s, short_t)))
    assert ours.item() == other.item()
    a, b = gradients(ours, student.weight)[0], gradients(other, student.weight)[0]
    assert torch.equal(a, b) and a[33:].abs().max() == 0 and a[:33].abs().min() > 0


def test_only_what_requires_a_gradient_gets_one():
    hs, student, ht, teacher, weights = case()
    frozen = Head(student.weight.detach())
    full = gradients(divergence_sum(hs, student, ht, teacher, weights), hs, student.weight)
    assert torch.equal(gradients(divergence_sum(hs, frozen, ht, teacher, weights), hs)[0], full[0])
    only_head = divergence_sum(hs.detach(), student, ht, teacher, weights)
    assert torch.equal(gradients(only_head, student.weight)[0], full[1])
    with torch.no_grad():
        assert not divergence_sum(hs, student, ht, teacher, weights).requires_grad
    assert not divergence_sum(hs.detach(), frozen, ht, teacher, weights).requires_grad


def test_without_autograd_no_gradient_is_formed():
    hs, student, ht, teacher, weights = case(8, 20_000, 64)

    def peak():
        return transient_peak(lambda: divergence_sum(hs, student, ht, teacher, weights, chunk_bytes=2**20))

    with torch.no_grad():
        assert peak() < 2**20 + 2**18
    assert peak() > student.weight.nbytes > 2**22


def test_tied_weights_and_accumulation():
    """One matrix as embedding and head, two backward passes: the gradients of both uses and both passes add up."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(29, 6, generator=g).requires_grad_()
    teacher = Head(torch.randn(29, 4, generator=g))
    ids, ht, weights = torch.arange(8), torch.randn(8, 4, generator=g), torch.ones(8)
    for part in (slice(0, 3), slice(3, 8)):
        divergence_sum(torch.tanh(table[ids[part]]), Head(table), ht[part], teacher, weights[part]).backward()
    ours, table.grad = table.grad, None
    naive_total(torch.tanh(table[ids]), Head(table), ht, teacher, weights).backward()
    assert relative(ours, table.grad) < 2e-6


def test_gradient_scales_with_what_follows_and_is_handed_out_once():
    hs, student, ht, teacher, weights = case()
    base = gradients(divergence_sum(hs, student, ht, teacher, weights), hs)[0]
    assert relative(gradients(divergence_sum(hs, student, ht, teacher, weights) / 4, hs)[0], base / 4) < 1e-7
    total = divergence_sum(hs, student, ht, teacher, weights)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        total.backward()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("gap,kl", [(0.30, 0.33), (0.10, 0.037), (0.030, 0.0034)])
def test_bfloat16_inputs_keep_a_float32_projection(divergence, gap, kl):
    """Against float64 on the very same bf16 numbers; logits rounded to bf16 before the softmax are off by 3 to 34 %."""
    g = torch.Generator().manual_seed(3)
    hs = torch.randn(48, 64, generator=g).bfloat16().requires_grad_()
    ws = (torch.randn(2003, 64, generator=g) * 0.34).bfloat16().requires_grad_()
    ht = torch.cat([hs.detach().float(), gap * torch.randn(48, 64, generator=g)], 1).bfloat16()
    wt = torch.cat([ws.detach(), (torch.randn(2003, 64, generator=g) * 0.34).bfloat16()], 1)
    student, teacher = Head(ws), Head(wt)
    weights = torch.ones(48)
    mean = naive_total(hs, student, ht, teacher, weights).item() / 48
    assert kl / 1.4 < mean < 1.4 * kl
    for chunk_bytes in (2**16, 2**26):  # in many vocabulary tiles, and in one
        total = divergence_sum(hs, student, ht, teacher, weights, None, Objective(divergence), chunk_bytes)
        naive = gradients(naive_total(hs, student, ht, teacher, weights, None, divergence), hs, ws)
        for a, b in zip(gradients(total, hs, ws), naive, strict=True):
            assert a.dtype == torch.bfloat16 and relative(a, b) < 0.005


def test_master_weights_in_float32_under_bfloat16_states():
    """As in training with bf16 compute: the head's gradient comes back in float32, not rounded to the states' dtype."""
    hs, student, ht, teacher, weights = case(40, 301)
    low, low_t = hs.detach().bfloat16().requires_grad_(), ht.bfloat16()
    total = divergence_sum(low, student, low_t, teacher, weights)
    gradient = gradients(total, student.weight)[0]
    naive = gradients(naive_total(low, student, low_t, teacher, weights), student.weight)[0]
    assert gradient.dtype == torch.float32 and relative(gradient, naive) < 1e-5


def test_a_head_of_a_higher_dtype_is_that_head_cast():
    """On a GPU this is a float32 head under bfloat16 states; a CPU multiplies in float32, so it is a float64 head."""
    hs, student, ht, teacher, weights = case(40, 301)
    higher = Head(student.weight.detach().double().requires_grad_())
    totals = [divergence_sum(hs, head, ht, teacher, weights, None, Objective(), 2**14) for head in (student, higher)]
    (a, of_a), (b, of_b) = (gradients(t, hs, h.weight) for t, h in zip(totals, (student, higher), strict=True))
    assert of_b.dtype == torch.float64 and relative(a, b) < 1e-6 and relative(of_a, of_b) < 1e-6


def test_chunk_bytes_bounds_the_transient_memory():
    """Peak of what is allocated beyond inputs and gradients, counted by the profiler of torch, within the budget."""
    hs, student, ht, teacher, weights = case(256, 20_000, 8, 8)
    for divergence, share in (("reverse_kl", None), ("reverse_kl", weights), ("jsd", None), ("jsd", weights)):
        peak = transient_peak(
            lambda d=divergence, f=share: divergence_sum(hs, student, ht, teacher, weights, f, Objective(d, 0.3), 2**23)
        )
        assert peak < 2**23 + 2**20 + 2 * student.weight.nbytes, (divergence, share is None, peak / 2**23)


def test_chunk_bytes_bounds_the_transient_memory_of_a_soft_cap_and_of_the_statistics():
    hs, student, ht, teacher, weights = case(256, 20_000, 8, 8, cap=5.0)
    works = [lambda: divergence_sum(hs, student, ht, teacher, weights, weights, Objective("jsd"), 2**23)]
    works += [
        lambda needs=needs: token_stats(hs, student, ht, teacher, torch.arange(256), needs, 0.3, 2**23)
        for needs in (STAT_FIELDS, frozenset({"jsd"}), frozenset({"student_entropy", "reverse_kl"}))
    ]
    for number, work in enumerate(works):
        peak = transient_peak(work)
        assert peak < 2**23 + 2**20 + 2 * student.weight.nbytes, (number, peak / 2**23)


@pytest.mark.parametrize(
    "needs,buffers",
    [
        ({"student_logprob"}, 2),  # logits and log-probabilities, of the student alone
        ({"student_entropy"}, 2),
        ({"student_entropy", "reverse_kl"}, 3),
        ({"total_variation"}, 3),
        ({"jsd"}, 5),
        (STAT_FIELDS - {"jsd"}, 4),
        (STAT_FIELDS, 5),
    ],
)
def test_statistics_that_nobody_needs_take_no_memory(needs, buffers):
    """Everything fits into one chunk, so the peak is a number of (N, V) buffers, and little beside them."""
    hs, student, ht, teacher, _ = case(256, 20_000, 8, 8)
    peak = transient_peak(lambda: token_stats(hs, student, ht, teacher, torch.arange(256), frozenset(needs)))
    assert buffers <= peak / (4 * 256 * 20_000) < buffers + 0.2


def transient_peak(work):
    """Highest total of live bytes allocated while `work` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak


def test_autocast_does_not_touch_the_loss():
    hs, student, ht, teacher, weights = case(20, 211)
    outside = divergence_sum(hs, student, ht, teacher, weights)
    with torch.autocast("cpu", torch.bfloat16):
        inside = divergence_sum(hs, student, ht, teacher, weights)
    assert inside.item() == outside.item()
    assert torch.equal(gradients(inside, student.weight)[0], gradients(outside, student.weight)[0])


def live_bytes():
    gc.collect()
    tensors = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_nothing_of_size_tokens_times_vocabulary_survives():
    n, v = 64, 4096
    hs, student, ht, teacher, weights = case(n, v)
    before = live_bytes()
    total = divergence_sum(hs, student, ht, teacher, weights, chunk_bytes=2**18)
    kept = live_bytes() - before
    gradients_size = hs.nbytes + student.weight.nbytes
    assert gradients_size <= kept < gradients_size + 1024  # the two gradients and the scalar; one (N, V) is 1 MiB
    total.backward()


@pytest.mark.parametrize(
    "needs",
    [
        {"student_entropy"},
        {"reverse_kl"},
        {"forward_kl"},
        {"jsd"},
        {"total_variation"},
        {"top1_agree"},
        {"overlap_kl"},
        {"teacher_topk_mass"},
        {"student_entropy", "teacher_entropy", "reverse_kl", "student_logprob", "teacher_logprob"},
    ],
)
def test_token_stats_equal_the_naive_formulas(needs):
    hs, student, ht, teacher, _ = case(21, 97, seed=5)
    ids = torch.arange(21) * 3
    ours = token_stats(hs, student, ht, teacher, ids, frozenset(needs), 0.3, chunk_bytes=2**16)
    assert set(ours) == needs
    p, q = (naive_logits(h, head).softmax(-1).detach() for h, head in ((hs, student), (ht, teacher)))
    top_p, top_q = (set_of(row) for row in (p, q))
    expected = {
        "student_entropy": -(p * p.log()).sum(-1),
        "teacher_entropy": -(q * q.log()).sum(-1),
        "reverse_kl": (p * (p / q).log()).sum(-1),
        "forward_kl": (q * (q / p).log()).sum(-1),
        "jsd": naive_loss("jsd", p.log(), q.log(), 0.3),
        "total_variation": (p - q).clamp(min=0).sum(-1),
        "student_logprob": p[range(21), ids].log(),
        "teacher_logprob": q[range(21), ids].log(),
        "top1_agree": torch.tensor(
            [
                float(max(range(97), key=a.__getitem__) == max(range(97), key=b.__getitem__))
                for a, b in zip(p.tolist(), q.tolist(), strict=True)
            ]
        ),
        "teacher_topk_mass": torch.tensor(
            [sum(row[i] for i in ids_) for row, ids_ in zip(q.tolist(), top_p, strict=True)]
        ),
        "overlap_kl": torch.tensor(
            [on_union(a, b, s | t) for a, b, s, t in zip(p.tolist(), q.tolist(), top_p, top_q, strict=True)]
        ),
    }
    for name, column in ours.items():
        torch.testing.assert_close(column.double(), expected[name].double(), rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("v", [97, 3])
def test_top_five_of_both_models(v):
    hs, student, ht, teacher, _ = case(9, v, seed=5)
    needs = {"student_top5_ids", "student_top5_logprobs", "teacher_top5_ids", "teacher_top5_logprobs"}
    found = token_stats(
        hs, student, ht, teacher, torch.zeros(9, dtype=torch.int64), frozenset(needs), chunk_bytes=2**16
    )
    for who, hidden, head in (("student", hs, student), ("teacher", ht, teacher)):
        for row, ids, logprobs in zip(
            naive_logits(hidden, head).softmax(-1).tolist(),
            found[f"{who}_top5_ids"].tolist(),
            found[f"{who}_top5_logprobs"].tolist(),
            strict=True,
        ):
            assert ids == sorted(range(v), key=lambda i, row=row: -row[i])[:5]
            assert logprobs == pytest.approx([math.log(row[i]) for i in ids], rel=1e-4, abs=1e-5)


def test_every_field_has_an_entry_that_reads_what_exists():
    assert STATISTICS.keys() == STAT_FIELDS
    tables = (INTERMEDIATES, SHARED, STATISTICS)
    names = {"student", "teacher", "token_ids", "jsd_beta"}.union(*tables)
    assert len(names) == 4 + sum(len(entries) for entries in tables)  # a name means one thing
    assert {read for entries in tables for formula in entries.values() for read in formula.reads} <= names


@pytest.mark.parametrize("chunk_bytes", [1, 2**16, 2**26])
def test_a_statistic_is_the_same_whatever_else_is_asked_for(chunk_bytes):
    """So no formula reads a buffer that another one has written over."""
    hs, student, ht, teacher, _ = case(21, 97, seed=5, bias=True, cap=4.0)
    arguments = (hs, student, ht, teacher, torch.arange(21) * 3)
    together = token_stats(*arguments, STAT_FIELDS, 0.3, chunk_bytes)
    for name in STAT_FIELDS:
        for other in STAT_FIELDS:
            column = token_stats(*arguments, frozenset({name, other}), 0.3, chunk_bytes)[name]
            torch.testing.assert_close(column, together[name], rtol=1e-5, atol=1e-6, msg=f"{name} beside {other}")


@pytest.mark.parametrize("others", [frozenset(), STAT_FIELDS])
def test_a_new_statistic_takes_one_entry(monkeypatch, others):
    collision = Formula(lambda p_cV: p_cV.square().sum(-1), ("p",))
    surprise = Formula(lambda logits_cV, collision_c: logits_cV.amax(-1) - collision_c, ("student_logits", "collision"))
    monkeypatch.setitem(STATISTICS, "collision", collision)
    monkeypatch.setitem(STATISTICS, "surprise", surprise)
    hs, student, ht, teacher, _ = case(21, 97, seed=5)
    needs = others | {"collision", "surprise"}
    ours = token_stats(hs, student, ht, teacher, torch.arange(21), needs, chunk_bytes=2**14)
    logits = naive_logits(hs, student)
    assert ours.keys() == needs
    naive = logits.softmax(-1).square().sum(-1)
    torch.testing.assert_close(ours["collision"].double(), naive, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["surprise"].double(), logits.amax(-1) - naive, rtol=1e-5, atol=1e-6)


def test_no_tokens_at_all():
    hs, student, ht, teacher, _ = case(1, 11)
    none = token_stats(hs[:0], student, ht[:0], teacher, torch.zeros(0, dtype=torch.int64), frozenset({"reverse_kl"}))
    assert none["reverse_kl"].shape == (0,)
    total = divergence_sum(hs[:0], student, ht[:0], teacher, torch.zeros(0))
    assert total.item() == 0 and gradients(total, student.weight)[0].abs().max() == 0


def set_of(rows):
    return [set(sorted(range(len(row)), key=lambda i, row=row: -row[i])[:16]) for row in rows.tolist()]


def on_union(p, q, union):
    mass_p, mass_q = sum(p[i] for i in union), sum(q[i] for i in union)
    return sum(q[i] / mass_q * math.log(q[i] / mass_q / (p[i] / mass_p)) for i in union)


@pytest.mark.parametrize("gap", [1e-3, 1e-4])
def test_small_divergences_keep_their_digits(gap):
    """Near the optimum: relative error of value and gradient, at a divergence of 1e-7 nats."""
    hs, student, _, _, weights = case(30, 211)
    teacher = Head(
        (
            student.weight.detach().double() + gap * torch.randn(211, 5, generator=torch.Generator().manual_seed(2))
        ).float()
    )
    for divergence in ("jsd", "reverse_kl", "forward_kl"):
        ours = divergence_sum(hs, student, hs.detach(), teacher, weights, objective=Objective(divergence, 0.3))
        naive = naive_total(hs, student, hs.detach(), teacher, weights, None, divergence, 0.3)
        assert relative(gradients(ours, hs)[0], gradients(naive, hs)[0]) < 3e-3


def test_divergences_of_identical_models_are_never_negative():
    hs, student, _, _, _ = case(50, 301)
    stats = token_stats(hs, student, hs, student, torch.zeros(50, dtype=torch.int64), frozenset({"reverse_kl", "jsd"}))
    assert stats["reverse_kl"].abs().max() == 0 and stats["jsd"].min() >= 0


@pytest.mark.parametrize("v,gap", [(61, 1e-5), (7, 1e-7)])
def test_divergences_of_nearly_equal_models_are_never_negative(v, gap):
    """Logits that differ in the sixth digit, or in the last: the sum of the formula is rounding alone, and negative for
    about half of the rows. The least of them would be where a normalised axis begins, and no power of it a number."""
    g = torch.Generator().manual_seed(0)
    logits_s = torch.randn(3000, v, generator=g)
    logits_t = logits_s + gap * torch.randn(3000, v, generator=g)
    log_p, log_q = logits_s.log_softmax(-1), logits_t.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    mixed = (0.3 * q + 0.7 * p).log()
    top = [z.topk(min(16, v)).indices for z in (log_p, log_q)]
    apart = torch.ones(3000, v).scatter_(1, top[0], 0.0).scatter_(1, top[1], 0.0).bool()  # in neither model's top
    on_p, on_q = (z.masked_fill(apart, -torch.inf).log_softmax(-1) for z in (log_p, log_q))
    unclamped = {
        "reverse_kl": (p * (log_p - log_q)).sum(-1),
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "jsd": 0.3 * (q * (log_q - mixed)).sum(-1) + 0.7 * (p * (log_p - mixed)).sum(-1),
        "overlap_kl": (on_q.exp() * (on_q - on_p).masked_fill(apart, 0)).sum(-1),
    }
    head, ids = Head(torch.eye(v)), torch.zeros(3000, dtype=torch.int64)
    needs = frozenset(name for name in unclamped if name != "overlap_kl" or v >= 16)
    found = token_stats(logits_s, head, logits_t, head, ids, needs, 0.3)
    for name, column in found.items():
        assert (unclamped[name] < 0).sum() > 100, name  # float32 does that here, so there is something to catch
        assert column.min() >= 0, name
        assert column.max() < 1e-5, name  # and they are still the divergences: about 5e-11, and 5e-15


@pytest.mark.parametrize(
    "change,message",
    [
        ({"weights": torch.ones(3)}, r"weights has shape \(3,\), expected \(7,\)"),
        ({"forward_share": torch.ones(8)}, r"forward_share has shape \(8,\)"),
        ({"student_hidden": torch.ones(7, 6)}, r"expected \(N, 5\)"),
        ({"teacher_hidden": torch.ones(6, 9)}, "6 teacher rows"),
        ({"teacher_head": Head(torch.ones(52, 9))}, "compares 53 ids and teacher head 52"),
        ({"student_head": Head(torch.ones(50, 5), vocab_size=53)}, "has 50 rows, expected at least"),
    ],
)
def test_malformed_input_is_refused(change, message):
    hs, student, ht, teacher, weights = case()
    arguments = {
        "student_hidden": hs,
        "student_head": student,
        "teacher_hidden": ht,
        "teacher_head": teacher,
        "weights": weights,
    }
    with pytest.raises(ValueError, match=message):
        divergence_sum(**arguments | change)


@pytest.mark.parametrize(
    "arguments,message",
    [(("kl",), "divergence is 'kl'"), (("jsd", 0.0), "beta is 0.0"), (("reverse_kl", 1.0), "beta is 1.0")],
)
def test_a_meaningless_objective_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(*arguments)


def test_unknown_statistics_are_refused():
    hs, student, ht, teacher, _ = case()
    with pytest.raises(ValueError, match=r"needs names \['entropy'\]"):
        token_stats(hs, student, ht, teacher, torch.zeros(7, dtype=torch.int64), frozenset({"entropy"}))


@pytest.mark.parametrize("seed", range(4))
def test_a_teacher_known_on_its_top_k_gives_a_lower_bound_that_rises_to_the_divergence(seed):
    g = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(20, 31, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = s.softmax(-1), t.softmax(-1)
    for name in DIVERGENCES:
        exact, of_classes = naive_loss(name, s, t), vars(reference)[name]
        bounds = torch.stack([of_classes(*reference.topk_classes(s, t, k)) for k in (1, 2, 5, 12, 30, 31)])
        assert (bounds.diff(dim=0) > -1e-12).all() and (bounds <= exact + 1e-12).all()
        assert bounds[0].mean() < 0.9 * exact.mean()
        torch.testing.assert_close(bounds[-1], exact)
    best = q.argsort(-1, descending=True)[:, :2]  # by probability tables: two ids and the rest
    p3, q3 = (torch.cat([x.gather(1, best), 1 - x.gather(1, best).sum(1, keepdim=True)], 1) for x in (p, q))
    torch.testing.assert_close(reference.topk_reverse_kl(s, t, 2), (p3 * (p3 / q3).log()).sum(1))
    torch.testing.assert_close(reference.topk_forward_kl(s, t, 2), (q3 * (q3 / p3).log()).sum(1))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_estimate_from_the_sampled_token_has_the_divergence_as_its_mean(name):
    g = torch.Generator().manual_seed(3)
    s, t = (3 * torch.randn(20, 31, generator=g, dtype=torch.float64) for _ in range(2))
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    settings = {"beta": 0.3} if name == "jsd" else {}
    estimates = vars(reference)[f"sampled_{name}"](log_p, log_q, **settings)  # of every id that could be sampled
    assert (estimates >= -1e-12).all()
    torch.testing.assert_close((log_p.exp() * estimates).sum(-1), naive_loss(name, s, t, **settings))
    assert vars(reference)[f"sampled_{name}"](log_p[0], log_p[0]).abs().max() == 0
