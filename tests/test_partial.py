"""A teacher that shows only a part of its distribution: its statistics against probability tables, and what is left."""

import dataclasses

import pytest
import torch
from helpers import naive_loss, one_each, pair_of, random_lm, random_rollouts

from opd import cli
from opd.batch import make_micro_batches
from opd.models import head_logits
from opd.step import score_update
from tip import analyze, partial
from tip.config import TipConfig
from tip.diagnostics import needs_of_every_rule
from tip.divergences import DIVERGENCES
from tip.rules import RULES

RETENTIONS = (0.5, 0.2)


@pytest.fixture(scope="module")
def scored():
    """A pair, the micro-batches of its rollouts, and their statistics."""
    student, teacher = random_lm(1), random_lm(2, hidden=48, layers=3, name="teacher")
    batches = one_each(random_rollouts(student, count=8))
    pair = pair_of(student, teacher)
    needs = needs_of_every_rule("reverse_kl") | DIVERGENCES.keys()
    return pair, batches, score_update(pair, batches, needs, 1)


def tables(pair, batches):
    """Both models' probabilities of all tokens, (N, V) float64, in the order of the statistics."""
    rows = []
    for batch in sorted(batches, key=lambda batch: batch.sequence_id[0]):
        (teacher_NH,) = pair.teacher.hidden_states([batch])
        student_NH = pair.student.hidden_states(batch, torch.arange(len(batch.token_ids)))
        models = ((student_NH, pair.student), (teacher_NH, pair.teacher))
        logits = [head_logits(hidden.detach(), lm.head(pair.vocab_size)).double() for hidden, lm in models]
        rows.append([x.softmax(-1).detach() for x in logits])
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def test_a_view_is_of_the_top_k_and_one_more_class(scored):
    pair, batches, stats = scored
    p, q = tables(pair, batches)
    views = partial.topk_views(pair, batches, stats, (1, 3, 35, 99))
    assert list(views) == ["top 1", "top 3", "top 35", "top 99"]
    for k in (1, 3):
        best = q.argsort(-1, descending=True)[:, :k]
        classes = [torch.cat([x.gather(1, best), 1 - x.gather(1, best).sum(1, keepdim=True)], 1) for x in (p, q)]
        view = views[f"top {k}"]
        for name in DIVERGENCES:
            expected = naive_loss(name, *(c.log() for c in classes))
            torch.testing.assert_close(vars(view)[name].double(), expected, rtol=1e-4, atol=1e-5)
            assert (vars(view)[name] <= vars(stats)[name] + 1e-5).all()
        for mass, x in (("student_mass", classes[0]), ("teacher_mass", classes[1])):
            torch.testing.assert_close(view.extra[mass].double(), x[:, :k].sum(1), rtol=1e-4, atol=1e-6)
        assert torch.equal(view.student_entropy, stats.student_entropy)
    for name in DIVERGENCES:  # all that there is
        torch.testing.assert_close(vars(views["top 35"])[name], vars(stats)[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vars(views["top 99"])[name], vars(stats)[name], rtol=1e-4, atol=1e-5)


def test_a_view_depends_neither_on_micro_batches_nor_on_chunks(scored, monkeypatch):
    monkeypatch.setattr(partial, "BUFFERS", 100)
    pair, batches, stats = scored
    small = dataclasses.replace(pair, loss=dataclasses.replace(pair.loss, chunk_bytes=2**16))  # 4 tokens at a time
    packed = make_micro_batches(random_rollouts(pair.student, count=8)[::-1], 60, 7, "keep")
    for other, cut in ((small, batches), (pair, packed)):
        one, two = (partial.topk_views(*x, stats, (2,))["top 2"] for x in ((pair, batches), (other, cut)))
        for name in DIVERGENCES:
            torch.testing.assert_close(vars(one)[name], vars(two)[name], rtol=1e-4, atol=1e-5)


def test_the_sampled_token_alone(scored):
    pair, batches, stats = scored
    p, q = tables(pair, batches)
    view = partial.sampled_view(stats, 0.5)
    here = stats.token_id[:, None]
    t = (q / p).gather(1, here)[:, 0]
    torch.testing.assert_close(view.reverse_kl.double(), t - 1 - t.log(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(view.total_variation.double(), (t - 1).abs() / 2, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(view.extra["teacher_mass"].double(), q.gather(1, here)[:, 0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(view.extra["student_mass"].double(), p.gather(1, here)[:, 0], rtol=1e-3, atol=1e-5)


def test_what_is_left_by_hand(scored):
    _, _, stats = scored
    config = TipConfig()
    extra = dict.fromkeys(partial.MASSES, torch.full_like(stats.reverse_kl, 0.5))
    same = dataclasses.replace(stats, extra=extra)
    half = dataclasses.replace(same, reverse_kl=stats.reverse_kl / 2)
    found = partial.survival(stats, {"same": same, "half": half}, config, 0, RETENTIONS)
    d = stats.reverse_kl.double()
    assert found["same"]["divergence"] == pytest.approx(1) and found["same"]["largest_error"] == 0
    assert found["half"]["divergence"] == pytest.approx(0.5) and found["half"]["teacher_mass"] == 0.5
    assert found["half"]["mean_error"] == pytest.approx((d / 2).mean().item(), rel=1e-6)
    assert found["half"]["largest_error"] == pytest.approx((d / 2).max().item(), rel=1e-6)
    # a scaled axis keeps its order, and min-max maps it to the same places
    for name in ("soft_or", "divergence", "q3"):
        assert found["half"]["rules"][name]["rank_correlation"] == pytest.approx(1)
        assert found["half"]["rules"][name]["jaccard"] == {"0.5": 1, "0.2": 1}
    turned = dataclasses.replace(same, reverse_kl=stats.reverse_kl.max() - stats.reverse_kl)
    found = partial.survival(stats, {"turned": turned}, config, 0, RETENTIONS)["turned"]["rules"]
    assert found["divergence"]["rank_correlation"] == pytest.approx(-1)
    assert found["divergence"]["jaccard"]["0.2"] == 0 and found["q3"]["jaccard"]["0.2"] == 1
    halves = dict.fromkeys(("divergence", "mean_error", "largest_error", *partial.MASSES), 0.5)
    text = partial.table({"turned": halves | {"rules": found}}, "total_variation")
    assert "| turned            | 50.0 %" in text and "| 0.500         |" in text and "nats" not in text


def test_the_rules_that_a_partial_teacher_can_serve():
    found = partial.rules_of_divergence("reverse_kl")
    assert {"soft_or", "divergence", "q3", "total_variation"} <= set(found)
    assert not {"teachability", "entropy_topk", "random", "all", "product"} & set(found) and set(found) < set(RULES)


@pytest.mark.parametrize("text", ["0", "8,x", "", "8,,32", "1.5"])
def test_bad_numbers_are_refused(text, tmp_path):
    with pytest.raises(cli.InputError, match=r"--teacher-topk: got '.*', expected a whole number from 1"):
        analyze.command(["--config", "configs/tiny.json", "--out", str(tmp_path / "out"), "--teacher-topk", text])
