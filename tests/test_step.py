"""Identities of the training step. "Same gradient" is the relative L2 norm of the whole gradient, 1e-6 unless said."""

import warnings
from dataclasses import replace

import pytest
import torch
from helpers import LOSS, engine_for, flat_gradient, naive_loss, one_each, pair_of, random_lm, random_rollouts, relative

from opd.batch import make_micro_batches
from opd.config import LossSection
from opd.data import Prompt, Rollout
from opd.hooks import TokenStats, TokenWeights, UniformWeighter
from opd.loss import reads_teacher
from opd.step import train_step
from tip.config import TipConfig
from tip.rules import RULES
from tip.weighter import TipWeighter

SAME = 3e-6  # rounding of float32: the largest of 1,410 comparisons was 1.7e-6


class Fixed:
    """A weighter with weights given as a function of the statistics."""

    def __init__(self, weights, needs=(), share=None):
        self.weights, self.needs, self.share = weights, frozenset(needs), share

    def __call__(self, stats: TokenStats, generator) -> TokenWeights:
        share = None if self.share is None else self.share(stats)
        return TokenWeights(weights=self.weights(stats), forward_share=share)


def varied(stats):
    """Weights that differ by token, some 0, whatever the order of the rows."""
    return ((stats.sequence_id * 7 + stats.position * 3) % 5).float()


def step(micro_batches, weighter=None, *, student=None, teacher=None, loss=LOSS, number=1, engine_overrides=()):
    """Runs one update and returns the result, the gradient before the optimizer cleared it, and the student."""
    student = student or random_lm(1)
    teacher = teacher or random_lm(2, hidden=48, layers=3, name="teacher")
    engine = engine_for(student, *engine_overrides)
    seen = []
    original = engine.finish

    def finish(apply):
        seen.append(flat_gradient(student.model))
        return original(apply)

    engine.finish = finish
    result = train_step(
        pair_of(student, teacher, loss),
        engine,
        micro_batches,
        weighter or UniformWeighter(),
        step=number,
        seed=0,
    )
    return result, seen[0], student, engine


def naive_gradient(rollouts, weight_of, divergence="reverse_kl", share_of=None, beta=0.5):
    """Sum of w D / sum of w by plain autograd in float64, one unpadded sequence at a time."""
    student, teacher = random_lm(1), random_lm(2, hidden=48, layers=3, name="teacher")
    student.model.double(), teacher.model.double()
    numerator, denominator = 0, 0.0
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
        logits = [m.model(input_ids=ids, use_cache=False).logits[0] for m in (student, teacher)]
        for t in range(len(rollout.response_ids)):
            before = len(rollout.prompt.token_ids) + t - 1
            rows = [x[before : before + 1] for x in logits]
            value = naive_loss(divergence, *rows, beta)[0]
            if share_of is not None:
                f = share_of(rollout.sequence_id, t)
                value = (1 - f) * value + f * naive_loss("forward_kl", *rows)[0]
            numerator = numerator + weight_of(rollout.sequence_id, t) * value
            denominator += weight_of(rollout.sequence_id, t)
    (numerator / denominator).backward()
    return (numerator / denominator).item(), flat_gradient(student.model)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "total_variation"])
def test_update_equals_naive_float64_formula(divergence):
    rollouts = random_rollouts(random_lm(1))
    loss = LossSection(divergence=divergence, jsd_beta=0.3, chunk_bytes=2**16)
    share = lambda s: ((s.position + s.sequence_id) % 3).float() / 2  # noqa: E731
    result, gradient, _, _ = step(one_each(rollouts), Fixed(varied, share=share), loss=loss)
    value, naive = naive_gradient(
        rollouts, lambda i, t: (i * 7 + t * 3) % 5, divergence, lambda i, t: (i + t) % 3 / 2, beta=0.3
    )
    assert result.loss == pytest.approx(value, rel=1e-5)
    assert relative(gradient, naive) < 1e-5  # float32 bodies against float64 ones


@pytest.mark.parametrize("weighter", [UniformWeighter(), Fixed(varied), TipWeighter(TipConfig())])
def test_gradient_does_not_depend_on_micro_batches_padding_packing_or_order(weighter):
    rollouts = random_rollouts(random_lm(1), count=7, response=(1, 24))
    base = step(one_each(rollouts), weighter)[1]
    longest = max(len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts)
    by_three, together = (make_micro_batches(rollouts, n * longest, 0, "keep") for n in (3, 7))
    assert [len(b.input_ids) for b in together] == [7] and max(len(b.input_ids) for b in by_three) >= 3
    assert relative(step(by_three, weighter)[1], base) < SAME
    assert relative(step(together, weighter)[1], base) < SAME
    assert relative(step(make_micro_batches(rollouts, 10**6, 31, "keep"), weighter)[1], base) < SAME  # another pad id
    assert relative(step(make_micro_batches(rollouts[::-1], 3 * longest, 0, "keep")[::-1], weighter)[1], base) < SAME
    for budget, pad_id in ((4 * longest, 0), (10**6, 0), (10**6, 31)):
        packed = make_micro_batches(rollouts, budget, pad_id, "keep", longest)
        assert any(b.position_ids is not None for b in packed)
        assert relative(step(packed, weighter)[1], base) < SAME


def test_pad_token_that_is_the_eos_token_changes_nothing():
    student = random_lm(1)
    rollouts = random_rollouts(student)
    end = student.eos_ids[0]
    a, b = (step(make_micro_batches(rollouts, 10**6, pad, "keep"))[1] for pad in (0, end))
    assert torch.equal(a, b)


def test_uniform_weights_are_plain_opd_bit_for_bit():
    rollouts = random_rollouts(random_lm(1))
    plain = step(one_each(rollouts), UniformWeighter())
    same = [Fixed(lambda s, w=w: torch.full((len(s.position),), w)) for w in (8.0, 0.3, 1e-39, 1e38)]
    same += [TipWeighter(TipConfig(rule="all")), TipWeighter(TipConfig(rule="soft_or", retention=1.0))]
    for weighter in same:
        other = step(one_each(rollouts), weighter)
        assert other[0].loss == plain[0].loss and torch.equal(other[1], plain[1])
        for p, q in zip(plain[2].model.parameters(), other[2].model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_only_relative_weights_matter():
    rollouts = random_rollouts(random_lm(1))
    base = step(one_each(rollouts), Fixed(varied))[1]
    assert torch.equal(step(one_each(rollouts), Fixed(lambda s: 8 * varied(s)))[1], base)
    for scale in (0.3, 1e-30, 1e30):
        assert relative(step(one_each(rollouts), Fixed(lambda s, x=scale: x * varied(s)))[1], base) < SAME


def test_weight_zero_is_as_if_the_token_were_not_there():
    """Zeroing the tail of each response = cutting it off (a later token cannot be seen by an earlier one)."""
    rollouts = random_rollouts(random_lm(1), response=(4, 12))
    cut = [Rollout(r.sequence_id, r.prompt, r.response_ids[:3], "length") for r in rollouts]
    masked, gradient, _, _ = step(one_each(rollouts), Fixed(lambda s: (s.position < 3).float()))
    alone, other, _, _ = step(one_each(cut))
    assert masked.loss == pytest.approx(alone.loss, rel=1e-6) and relative(gradient, other) < SAME
    assert masked.metrics["tokens/kept"] == alone.metrics["tokens/response"] == 18


def test_empty_selection_changes_neither_weights_nor_moments_and_warns_once():
    """After a real update, so that there are moments; and with gradients of 0 rather than none, which Adam would
    apply."""
    student = random_lm(1)
    rollouts = random_rollouts(student)
    engine = engine_for(student, "optim.warmup_steps=0", "optim.lr=1e-2", "optim.weight_decay=0.1")
    pair, batches = pair_of(student, random_lm(2, name="teacher")), one_each(rollouts)
    train_step(pair, engine, batches, UniformWeighter(), step=1, seed=0)
    weights = {n: p.clone() for n, p in student.model.named_parameters()}
    moments = {n: v.clone() for n, v in engine.moments_by_name().items()}
    original = engine.start

    def start(number):
        rate = original(number)
        for p in student.model.parameters():
            p.grad = torch.zeros_like(p)
        return rate

    engine.start = start
    with pytest.warns(UserWarning, match="no token has weight above 0") as caught:
        nothing = Fixed(lambda s: torch.zeros(len(s.position)))
        result = train_step(pair, engine, batches, nothing, step=2, seed=0)
    assert len(caught) == 1 and result.loss == 0 and result.metrics["tokens/kept"] == 0
    assert result.metrics["optim/lr"] > 0  # the schedule goes on
    assert all(torch.equal(p, weights[n]) for n, p in student.model.named_parameters())
    assert all(torch.equal(v, moments[n]) for n, v in engine.moments_by_name().items()) and moments


@pytest.mark.parametrize("rule", sorted(RULES))
def test_an_update_whose_rollouts_are_all_dropped_is_an_empty_selection(rule):
    rollouts = random_rollouts(random_lm(1), end="length")
    with pytest.warns(UserWarning, match="no token has weight"):
        result = step(make_micro_batches(rollouts, 100, 0, "drop"), TipWeighter(TipConfig(rule=rule)))[0]
    assert result.loss == 0 and result.metrics["tokens/response"] == 0


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "total_variation"])
def test_student_equal_to_teacher_gives_zero(divergence):
    student, teacher = random_lm(1), random_lm(1, name="teacher")
    loss = LossSection(divergence=divergence, jsd_beta=0.5, chunk_bytes=2**28)
    result, gradient, _, _ = step(one_each(random_rollouts(student)), student=student, teacher=teacher, loss=loss)
    assert result.loss == 0 and gradient.abs().max() == 0


def test_every_response_token_is_predicted_and_nothing_else():
    """From the prompt's last state for the first one; the EOS that ends a response is learned, padding is not."""
    student = random_lm(1)
    end = student.eos_ids[0]
    rollouts = [
        Rollout(0, Prompt("a", (5, 6, 7), "0"), (8, 9, end), "stop"),
        Rollout(1, Prompt("b", (5,), "0"), (end,), "stop"),
    ]
    (batch,) = make_micro_batches(rollouts, 100, end, "keep")
    assert batch.token_ids.tolist() == [8, 9, end, end]
    assert list(zip(batch.rows.tolist(), batch.columns.tolist(), strict=True)) == [(0, 2), (0, 3), (0, 4), (1, 0)]
    assert batch.sequence_id.tolist() == [0, 0, 0, 1] and batch.position.tolist() == [0, 1, 2, 0]
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, end], [5, end, *[end] * 4]] and batch.position_ids is None
    (shared,) = make_micro_batches(
        [*rollouts, Rollout(2, Prompt("c", (4, 3), "0"), (7, end), "stop")], 100, 0, "keep", 6
    )
    assert shared.input_ids.tolist() == [[5, 6, 7, 8, 9, end], [4, 3, 7, end, 5, end]]
    assert list(zip(shared.rows.tolist(), shared.columns.tolist(), strict=True))[3:] == [(1, 1), (1, 2), (1, 4)]
    assert shared.sequence_id.tolist() == [0, 0, 0, 2, 2, 1] and shared.position.tolist() == [0, 1, 2, 0, 1, 0]


def test_the_end_of_a_response_is_learned():
    """A teacher that always ends at once teaches the student to end: P(EOS) after the prompt rises."""
    student, teacher = random_lm(1, std=0.05), random_lm(2, name="teacher", tie_word_embeddings=False)
    end = student.eos_ids[0]
    teacher.model.lm_head.weight.zero_()
    teacher.model.lm_head.weight[end] = 1.0
    teacher.model.model.norm.weight.fill_(0.0)
    states = torch.ones(1, 32)
    teacher.model.model.norm.forward = lambda x: states.expand(*x.shape[:-1], 32)  # logits: 32 for EOS, 0 elsewhere
    rollout = Rollout(0, Prompt("a", (5, 6, 7), "0"), (end,), "stop")
    ids = torch.tensor([[5, 6, 7]])

    def probability():
        with torch.no_grad():
            return student.model(input_ids=ids).logits[0, -1].softmax(-1)[end].item()

    before = probability()
    loss = LossSection(divergence="forward_kl", jsd_beta=0.5, chunk_bytes=2**28)
    for number in range(1, 9):
        step(
            one_each([rollout]),
            student=student,
            teacher=teacher,
            loss=loss,
            number=number,
            engine_overrides=["optim.lr=1e-2", "optim.warmup_steps=0"],
        )
    assert before < 0.1 < 0.5 < probability()


def test_bfloat16_autocast_moves_float32_weights_at_a_tiny_rate():
    student = random_lm(1, dtype=torch.bfloat16)
    teacher = random_lm(2, name="teacher")
    assert all(p.dtype == torch.float32 for p in student.model.parameters())
    before = [p.clone() for p in student.model.parameters()]
    engine = engine_for(student, "optim.lr=1e-6", "optim.warmup_steps=0")
    rollouts = random_rollouts(student)
    for number in range(1, 11):
        train_step(
            pair_of(student, teacher),
            engine,
            one_each(rollouts),
            UniformWeighter(),
            step=number,
            seed=0,
        )
    moved = [(p - q).abs().max().item() for p, q in zip(before, student.model.parameters(), strict=True)]
    assert all(5e-6 < m < 2e-5 for m in moved)  # ten steps of Adam at 1e-6; in bf16 most would round to nothing


def test_bfloat16_autocast_stays_close_to_float32():
    rollouts = random_rollouts(random_lm(1))
    exact, lower = (step(one_each(rollouts), student=random_lm(1, dtype=d)) for d in (torch.float32, torch.bfloat16))
    assert relative(lower[1], exact[1]) < 0.1 and lower[0].loss != exact[0].loss


def test_gradient_checkpointing_does_not_change_the_gradient():
    rollouts = random_rollouts(random_lm(1))
    plain = step(one_each(rollouts))[1]
    for batches in (one_each(rollouts), make_micro_batches(rollouts, 10**6, 0, "keep", 10**6)):
        checkpointed = step(batches, engine_overrides=["engine.gradient_checkpointing=true"])[1]
        assert relative(checkpointed, plain) < SAME


def test_statistics_are_sorted_and_the_same_for_any_cut():
    rollouts = random_rollouts(random_lm(1), count=7, response=(1, 24))
    needs = ("student_entropy", "reverse_kl", "student_logprob")
    ones = Fixed(lambda s: torch.ones(len(s.position)), needs)
    a = step(one_each(rollouts), ones)[0].stats
    expected = [(i, t) for i, r in enumerate(rollouts) for t in range(len(r.response_ids))]
    assert list(zip(a.sequence_id.tolist(), a.position.tolist(), strict=True)) == expected
    for packed_row in (0, 10**6):
        b = step(make_micro_batches(rollouts[::-1], 10**6, 0, "keep", packed_row), ones)[0].stats
        assert torch.equal(a.sequence_id, b.sequence_id) and torch.equal(a.position, b.position)
        for name in needs:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5)
    assert a.teacher_entropy is None and a.vocab_size == 35 and a.step == 1


def test_the_weighters_randomness_is_seeded_by_run_and_step():
    class Draw:
        needs = frozenset()

        def __call__(self, stats, generator):
            return TokenWeights(weights=torch.rand(len(stats.position), generator=generator))

    batches = one_each(random_rollouts(random_lm(1)))
    first, again, later = (step(batches, Draw(), number=n)[0].weights.weights for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later)


@pytest.mark.parametrize(
    "rule,measure,passes", [("all", (), 1), ("random", (), 1), ("soft_or", (), 2), ("all", ("reverse_kl",), 2)]
)
def test_a_scoring_pass_is_made_only_when_somebody_needs_one(monkeypatch, rule, measure, passes):
    """Forwards of the student's body per micro-batch: the weighted one, and scoring for a rule or for diagnostics."""
    student, calls = random_lm(1), []
    original = type(student).hidden_states
    monkeypatch.setattr(type(student), "hidden_states", lambda lm, *a: calls.append(lm.name) or original(lm, *a))
    train_step(
        pair_of(student, random_lm(2, name="teacher")),
        engine_for(student),
        one_each(random_rollouts(student, count=4)),
        TipWeighter(TipConfig(rule=rule)),
        step=1,
        seed=0,
        measure=frozenset(measure),
    )
    assert calls.count("student") in (4 * passes, 4 * passes - 1) and calls.count("teacher") == 4


class Untouchable(torch.Tensor):
    """A tensor that has a shape, a dtype and a device, and whose values nobody may use."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function.__name__ in ("__get__", "__len__"), f"{function.__name__} uses it"
        return super().__torch_function__(function, types, args, kwargs)


def test_statistics_of_the_student_alone_never_touch_the_teacher(monkeypatch):
    student, teacher = random_lm(1), random_lm(2, hidden=48, name="teacher")
    (batch,) = make_micro_batches(random_rollouts(student), 10**6, 0, "keep")
    alone = frozenset({"student_entropy", "student_logprob", "student_top5_ids"})
    pair = pair_of(student, teacher)
    (states,) = pair.teacher.hidden_states([batch])
    expected = pair.stats(batch, states, alone | {"reverse_kl"})
    head = pair.teacher.head(35)
    forbidden = replace(head, weight=head.weight.as_subclass(Untouchable))
    monkeypatch.setattr(type(pair.teacher), "head", lambda teacher, vocab_size: forbidden)
    found = pair.stats(batch, states.as_subclass(Untouchable), alone)
    assert found.keys() == alone and all(torch.equal(found[name], expected[name]) for name in alone)
    with pytest.raises(AssertionError, match="uses it"):  # the states, on their way to the device
        pair.stats(batch, states.as_subclass(Untouchable), frozenset({"reverse_kl"}))
    with pytest.raises(AssertionError, match="uses it"):  # the head
        pair.stats(batch, states, frozenset({"reverse_kl"}))
    assert reads_teacher(frozenset({"teacher_entropy"})) and not reads_teacher(RULES["entropy_topk"].needs)


@pytest.mark.parametrize(
    "answer,message",
    [
        (lambda n: TokenWeights(weights=torch.ones(n + 1)), "expected"),
        (lambda n: TokenWeights(weights=torch.ones(n, dtype=torch.int64)), "dtype"),
        (lambda n: TokenWeights(weights=-torch.ones(n)), r"values in \[-1"),
        (lambda n: TokenWeights(weights=torch.full((n,), torch.nan)), "not finite"),
        (lambda n: TokenWeights(weights=torch.ones(n, requires_grad=True)), "requires a gradient"),
        (
            lambda n: TokenWeights(weights=torch.ones(n), forward_share=torch.full((n,), 1.5)),
            "forward_share has values",
        ),
    ],
)
def test_malformed_weights_are_refused(answer, message):
    class Bad:
        needs = frozenset()

        def __call__(self, stats, generator):
            return answer(len(stats.position))

    with pytest.raises(ValueError, match=message):
        step(one_each(random_rollouts(random_lm(1))), Bad())


def test_a_loss_that_is_not_finite_stops_before_the_optimizer():
    student = random_lm(1)
    student.model.model.norm.weight.data[0] = torch.nan
    before = [p.clone() for p in student.model.parameters()]
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(one_each(random_rollouts(student)), student=student, number=3)
    assert all(torch.equal(p, q) or p.isnan().any() for p, q in zip(before, student.model.parameters(), strict=True))
