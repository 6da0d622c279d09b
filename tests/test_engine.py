"""Schedule, decay, clipping, and AdamW against its formula."""

import math

import pytest
import torch
from helpers import engine_for, random_lm

from opd.engine.adamw import learning_rate


def test_schedules_by_hand():
    cosine = [learning_rate(s, 6, 2.0, "cosine", 2) for s in range(1, 7)]
    assert cosine == pytest.approx([1.0, 2.0, 2.0, 1 + math.cos(math.pi / 4), 1.0, 1 + math.cos(3 * math.pi / 4)])
    assert [learning_rate(s, 4, 2.0, "cosine", 0) for s in (1, 3)] == pytest.approx([2.0, 1.0])
    assert [learning_rate(s, 6, 3.0, "constant", 3) for s in range(1, 7)] == pytest.approx([1, 2, 3, 3, 3, 3])


def step_with(engine, gradients, number=1):
    engine.start(number)
    for (name, parameter), gradient in zip(engine.named_parameters.items(), gradients, strict=True):
        parameter.grad = gradient.clone()
        assert name
    return engine.finish(apply=True)


def test_the_update_is_adamw_with_clipping_and_decay_on_matrices_only():
    lm = random_lm(0)
    engine = engine_for(
        lm,
        "optim.lr=0.01",
        "optim.warmup_steps=0",
        "optim.weight_decay=0.5",
        "optim.grad_clip=0.25",
        "optim.betas=[0.9,0.99]",
    )
    before = {n: p.detach().double().clone() for n, p in engine.named_parameters.items()}
    g = torch.Generator().manual_seed(0)
    moments = {n: [torch.zeros_like(p), torch.zeros_like(p)] for n, p in before.items()}
    for number in (1, 2):
        gradients = [torch.randn(p.shape, generator=g) for p in before.values()]
        norm = math.sqrt(sum(x.double().square().sum().item() for x in gradients))
        assert step_with(engine, gradients, number) == pytest.approx(norm, rel=1e-5)
        for (name, p), gradient in zip(before.items(), gradients, strict=True):
            clipped = gradient.double() * 0.25 / norm
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * clipped)
            v.mul_(0.99).add_(0.01 * clipped**2)
            if p.ndim >= 2:
                p.mul_(1 - 0.01 * 0.5)
            p.sub_(0.01 * (m / (1 - 0.9**number)) / ((v / (1 - 0.99**number)).sqrt() + 1e-8))
    assert {p.ndim for p in before.values()} == {1, 2}
    for name, p in engine.named_parameters.items():
        torch.testing.assert_close(p.detach().double(), before[name], rtol=1e-5, atol=1e-6)


def test_state_goes_out_and_in_again():
    first, second = engine_for(random_lm(0)), engine_for(random_lm(0))
    gradients = [torch.ones_like(p) for p in first.named_parameters.values()]
    step_with(first, gradients)
    second.load({k: v.clone() for k, v in first.moments_by_name().items()}, {})
    for name, p in second.named_parameters.items():
        p.data.copy_(first.named_parameters[name].data)
    step_with(first, gradients, 2), step_with(second, gradients, 2)
    assert all(torch.equal(p, second.named_parameters[n]) for n, p in first.named_parameters.items())


def test_a_gradient_that_is_not_finite_is_not_applied():
    engine = engine_for(random_lm(0))
    before = [p.clone() for p in engine.named_parameters.values()]
    gradients = [torch.ones_like(p) for p in before]
    gradients[3].view(-1)[0] = torch.nan
    with pytest.raises(FloatingPointError, match="norm of the gradient is nan"):
        step_with(engine, gradients)
    assert (
        all(torch.equal(p, b) for p, b in zip(engine.named_parameters.values(), before, strict=True))
        and not engine.moments_by_name()
    )
