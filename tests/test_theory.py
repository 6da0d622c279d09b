"""The theory of TIP (arXiv 2604.14084), as numbers: what makes a token worth training on."""

import itertools

import pytest
import torch
from helpers import pair_of, random_lm, random_rollouts, token_stats_of

from opd.batch import make_micro_batches
from opd.loss import Head, Objective, divergence_sum, token_stats
from tip import oracle
from tip.config import TipConfig
from tip.rules import RULES
from tip.scores import Axes, soft_or

torch.set_num_threads(1)


def pair(seed, scale=2.0, size=11):
    generator = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    return s, t, s.softmax(-1), t.softmax(-1)


def gradient_in_logits(s, t, divergence):
    """By the product's loss: logits as hidden states of an identity head."""
    head = Head(torch.eye(len(s)))
    hidden = s.float()[None].requires_grad_()
    divergence_sum(hidden, head, t.float()[None], head, torch.ones(1), None, Objective(divergence)).backward()
    return hidden.grad[0].double()


@pytest.mark.parametrize("seed", range(4))
def test_gradients_in_logits(seed):
    s, t, p, q = pair(seed)
    torch.testing.assert_close(gradient_in_logits(s, t, "forward_kl"), p - q, rtol=1e-4, atol=1e-6)
    ratio = (p / q).log()
    reverse = p * (ratio - (p * ratio).sum())
    torch.testing.assert_close(gradient_in_logits(s, t, "reverse_kl"), reverse, rtol=1e-4, atol=1e-6)
    ids, head = torch.zeros(1, dtype=torch.int64), Head(torch.eye(len(s)))
    needs = frozenset({"reverse_kl_energy", "forward_kl_energy"})
    found = token_stats(s.float()[None], head, t.float()[None], head, ids, needs)
    assert found["reverse_kl_energy"].item() == pytest.approx(reverse.square().sum().item(), rel=1e-4)
    assert found["forward_kl_energy"].item() == pytest.approx((p - q).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_hessian_of_forward_kl_and_its_trace(seed):
    s, _, p, q = pair(seed)
    cross_entropy = lambda logits: -(q * logits.log_softmax(-1)).sum()  # noqa: E731
    hessian = torch.autograd.functional.hessian(cross_entropy, s)
    torch.testing.assert_close(hessian, torch.diag(p) - torch.outer(p, p))
    assert hessian.trace().item() == pytest.approx(1 - p.square().sum().item())


def test_confident_tokens_are_flat():
    traces = []
    for scale in (0.0, 0.5, 2.0, 8.0):
        p = (scale * torch.arange(6, dtype=torch.float64)).softmax(-1)
        traces.append(1 - p.square().sum().item())
    assert traces == sorted(traces, reverse=True) and traces[-1] < 0.01 < 0.8 < traces[0]


def test_the_gradient_of_reverse_kl_vanishes_at_a_confident_mistake_and_that_of_forward_kl_does_not():
    """p -> 1 on a token to which the teacher gives 0.001: D grows to ln 1000 while its gradient dies."""
    q = torch.full((5,), 0.999 / 4, dtype=torch.float64)
    q[0] = 0.001
    reverse, forward, values = [], [], []
    for margin in (2.0, 6.0, 12.0):
        s = torch.tensor([margin, 0, 0, 0, 0], dtype=torch.float64)
        reverse.append(gradient_in_logits(s, q.log(), "reverse_kl").norm().item())
        forward.append(gradient_in_logits(s, q.log(), "forward_kl").norm().item())
        p = s.softmax(-1)
        values.append((p * (p / q).log()).sum().item())
    assert values == sorted(values) and values[-1] > 6.8
    assert reverse[-1] < 1e-3 < 0.3 < reverse[0] and forward[-1] > 1.0


@pytest.mark.parametrize("seed", range(4))
def test_the_weight_of_steepest_descent_in_logits(seed):
    """Second-order model of forward KL along its gradient: w = |g|^2 / (eta g' H g) is its minimum."""
    s, _, p, q = pair(seed, 1.0)
    g, hessian, eta = p - q, torch.diag(p) - torch.outer(p, p), 0.3
    best = (g @ g / (eta * (g @ hessian @ g))).item()
    model = lambda w: (-eta * w * (g @ g) + 0.5 * (eta * w) ** 2 * (g @ hessian @ g)).item()  # noqa: E731
    assert all(model(best) < model(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))
    # and the loss itself does fall there
    kl = lambda logits: (q * (q.log() - logits.log_softmax(-1))).sum().item()  # noqa: E731
    assert kl(s - eta * best * g) < kl(s)


def test_the_oracle_weight_is_the_minimum_of_a_quadratic():
    """L(x) = B/2 |x|^2, so B-smooth: a step -eta w g along a token's gradient gains most at w = phi / (eta B |g|^2)."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(7, generator=generator).double(), torch.randn(7, generator=generator).double()
    smooth, eta = 3.0, 0.1
    phi, m = (smooth * x @ g).item(), (g @ g).item()
    loss = lambda w: (smooth / 2 * (x - eta * w * g).square().sum()).item()  # noqa: E731
    best = phi / (eta * smooth * m)
    assert loss(0.0) - loss(best) == pytest.approx(phi**2 / (2 * smooth * m))
    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_the_brute_force_oracle_finds_the_gradients_of_single_tokens():
    student, teacher = random_lm(1), random_lm(2, hidden=48, layers=3, name="teacher")
    batches = make_micro_batches(random_rollouts(student, count=4), 60, 0, "keep")
    fresh = make_micro_batches(random_rollouts(student, count=3, seed=5), 60, 0, "keep")
    rows, gradients, target = oracle.token_gradients(pair_of(student, teacher), batches, fresh, 20, 0)
    counts = {i: sum(i == j for b in batches for j in b.sequence_id.tolist()) for i in range(4)}
    assert gradients.shape == (len(rows), target.shape[0]) and 4 < len(rows) <= 20
    assert all(rows[:, 0].tolist().count(i) == counts[i] for i in rows[:, 0].unique().tolist())  # whole rollouts
    # the target again: mean reverse KL from whole logits, plain autograd
    total, count = 0.0, 0
    for batch in fresh:
        s, t = (lm.model(batch.input_ids).logits for lm in (student, teacher))
        s, t = (z[batch.rows, batch.columns].log_softmax(-1) for z in (s, t))
        total, count = total + (s.exp() * (s - t)).sum(), count + len(batch.rows)
    again = torch.autograd.grad(total / count, list(student.model.parameters()))
    torch.testing.assert_close(target, torch.cat([g.flatten() for g in again]), rtol=1e-3, atol=1e-5)
    # a small step along one token's gradient changes the fresh loss by -eta <grad L, g>: central difference, float64
    eta, g = 1e-4, gradients[3].double() / gradients[3].norm()
    parameters = list(student.model.double().parameters())
    teacher.model.double()
    parts = [part.view_as(p) for part, p in zip(g.split([p.numel() for p in parameters]), parameters, strict=True)]
    # the pad row of the (tied) embedding is 0 and torch gives its look-ups no gradient, so leave it where it is
    parts[0] = parts[0].clone()
    parts[0][student.tokenizer.pad_token_id] = 0
    expected = sum(
        (a * b.view_as(a)).sum().item()
        for a, b in zip(parts, target.double().split([p.numel() for p in parts]), strict=True)
    )
    values = []
    for sign in (1, -2):  # the embedding is the first parameter; to +eta, then to -eta
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter += sign * eta * part
            values.append(_mean_kl(student, teacher, fresh))
    assert (values[0] - values[1]) / 2 / eta == pytest.approx(expected, rel=1e-2)


def _mean_kl(student, teacher, batches):
    total, count = 0.0, 0
    for batch in batches:
        s, t = (lm.model(batch.input_ids).logits for lm in (student, teacher))
        s, t = (z[batch.rows, batch.columns].log_softmax(-1) for z in (s, t))
        total, count = total + (s.exp() * (s - t)).sum().item(), count + len(batch.rows)
    return total / count


def test_the_blind_spot_of_entropy():
    """Any f(h) that grows from f(0) = 0 scores a confident mistake near 0; Soft-OR scores it by its divergence."""
    h, d = torch.tensor([1e-6], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    for f in (
        lambda x: x,
        lambda x: x**2,
        lambda x: x.sqrt(),
        lambda x: (3 * x).tanh(),
        lambda x: (5 * x).clamp(max=1),
    ):
        assert f(h).item() < 2e-3
    assert soft_or(h, d).item() == pytest.approx(0.8, abs=1e-5)
    zero, one = torch.zeros(1), torch.ones(1)
    assert soft_or(zero, zero) == 0 and soft_or(zero, one) == soft_or(one, zero) == soft_or(one, one) == 1
    grid = torch.linspace(0, 1, 21, dtype=torch.float64)
    hs, ds = torch.meshgrid(grid, grid, indexing="ij")
    torch.testing.assert_close(soft_or(hs, ds), 1 - (1 - hs) * (1 - ds))  # high where either is, once
    assert (soft_or(hs, ds).diff(dim=0) >= -1e-12).all() and (soft_or(hs, ds).diff(dim=1) >= -1e-12).all()


def test_the_blind_spot_in_a_selection():
    """One confident mistake among many: entropy ranks it last, Soft-OR and divergence keep it at 10 %."""
    h = torch.linspace(0.01, 1.0, 20).double()
    d = torch.full((20,), 0.1)
    d[0] = 5.0
    stats = token_stats_of(
        sequence_id=torch.zeros(20).long(),
        position=torch.arange(20),
        vocab_size=7,
        step=1,
        student_entropy=h.float(),
        reverse_kl=d,
    )
    by_rule = {
        name: RULES[name].score(stats, Axes(stats, TipConfig())) for name in ("entropy_topk", "soft_or", "divergence")
    }
    place = {name: int((score > score[0]).sum()) for name, score in by_rule.items()}
    assert place == {"entropy_topk": 19, "soft_or": 0, "divergence": 0}


def test_independent_inclusion_is_unbiased_with_the_variance_of_the_formula():
    """Every one of 2^6 outcomes of keeping token t with probability p_t at weight 1 / p_t, exactly."""
    generator = torch.Generator().manual_seed(0)
    m = 6
    g = torch.randn(m, 3, generator=generator, dtype=torch.float64)
    p = 0.1 + 0.8 * torch.rand(m, generator=generator, dtype=torch.float64)
    mean, second = torch.zeros(3, dtype=torch.float64), 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=m):
        kept = torch.tensor(outcome, dtype=torch.float64)
        probability = torch.where(kept > 0, p, 1 - p).prod()
        estimate = (kept / p) @ g / m
        mean += probability * estimate
        second += probability * (estimate - g.mean(0)).square().sum()
    torch.testing.assert_close(mean, g.mean(0))
    formula = ((1 - p) / p * g.square().sum(1)).sum() / m**2
    torch.testing.assert_close(second, formula)


def test_sampling_without_replacement_is_not_that_and_the_paper_takes_the_plain_mean():
    """Of two kept of three drawn in proportion to h, the plain mean is biased towards high h (and 1 / p_t would not
    mend it)."""
    h, g = [0.6, 0.3, 0.1], [1.0, 0.0, 0.0]
    expected = 0.0
    for i, j in itertools.permutations(range(3), 2):
        expected += h[i] * h[j] / (1 - h[i]) * (g[i] + g[j]) / 2
    assert expected > 0.4 > sum(g) / 3
