"""The energy of the loss's gradient: against gradients by autograd, and the warning of mistakes that a loss misses."""

import pytest
import torch
from helpers import token_stats_of

from opd.hooks import TokenWeights
from tip import energy
from tip.config import TipConfig
from tip.diagnostics import TipObserver
from tip.taxonomy import Quadrants
from tip.weighter import TipWeighter

V = 6


def gradients(student_NV, teacher_NV):
    """Both divergences by their definition, and the energies of their gradients by autograd; float64."""
    logits_NV = student_NV.double().requires_grad_()
    log_q_NV = teacher_NV.double().log_softmax(-1)
    columns = {}
    for name in ("reverse_kl", "forward_kl"):
        log_p_NV = logits_NV.log_softmax(-1)
        first, second = (log_p_NV, log_q_NV) if name == "reverse_kl" else (log_q_NV, log_p_NV)
        columns[name] = (first.exp() * (first - second)).sum(-1)
        (grad_NV,) = torch.autograd.grad(columns[name].sum(), logits_NV)
        columns[f"{name}_energy"] = grad_NV.square().sum(-1)
    p_NV, q_NV = logits_NV.softmax(-1), log_q_NV.exp()
    columns["student_entropy"] = -(p_NV * p_NV.log()).sum(-1)
    columns["total_variation"] = 0.5 * (p_NV - q_NV).abs().sum(-1)
    columns["student_logprob"], columns["teacher_logprob"] = p_NV[:, 0].log(), log_q_NV[:, 0]
    return {name: column.detach().float() for name, column in columns.items()}


def update(sureness):
    """100 tokens: 6 mistakes of a student of that logit margin, 24 of style that both know, and 70 solved ones."""
    student_NV, teacher_NV = torch.zeros(100, V), torch.zeros(100, V)
    student_NV[:6, 0], teacher_NV[:6, 1] = sureness, 9.0
    student_NV[6:30, :3] = 4.0
    teacher_NV[6:30, :3] = torch.tensor([4.8, 4.0, 3.2])
    student_NV[30:, 0], teacher_NV[30:, 0] = 12.0, 12.0
    return token_stats_of(
        sequence_id=torch.zeros(100).long(),
        position=torch.arange(100),
        vocab_size=V,
        step=1,
        **gradients(student_NV, teacher_NV),
    )


def diagnosed(stats, divergence="reverse_kl", **options):
    weighter = TipWeighter(TipConfig(**options))
    weights = weighter(stats, torch.Generator().manual_seed(0))
    return TipObserver(weighter, divergence).diagnose(stats, weights)


def test_the_loss_does_not_see_confident_mistakes_under_reverse_kl_and_says_so():
    for rule in ("all", "divergence", "entropy_topk"):  # the loss decides, whatever is kept
        found = diagnosed(update(sureness=12.0), rule=rule, retention=0.1, mixture="none")
        message = found.warnings["unseen_mistakes"]
        assert "Set tip.mixture=total_variation, or loss.divergence=forward_kl." in message
        assert found.scalars["tip/energy_q3"] < energy.UNSEEN
        assert sum(found.scalars[f"tip/energy_q{q}"] for q in (1, 2, 3, 4)) == pytest.approx(1)


def test_no_warning_where_the_loss_sees_them_or_where_there_are_few():
    sure, less_sure = update(sureness=12.0), update(sureness=4.0)
    mixed = diagnosed(sure, rule="all", mixture="total_variation")
    assert "unseen_mistakes" not in mixed.warnings and mixed.scalars["tip/energy_q3"] > 0.5
    assert "unseen_mistakes" not in diagnosed(sure, "forward_kl", rule="all").warnings
    assert "unseen_mistakes" not in diagnosed(less_sure, rule="all").warnings
    solved = sure.rows(torch.arange(100) >= 6)
    assert "unseen_mistakes" not in diagnosed(solved, rule="all").warnings


def test_a_loss_whose_energy_no_field_holds_is_not_judged():
    weighter = TipWeighter(TipConfig(rule="all"))
    assert not energy.needs("jsd") and "reverse_kl_energy" not in TipObserver(weighter, "jsd").needs
    found = diagnosed(update(sureness=12.0), "jsd", rule="all")
    assert not found.warnings.keys() & {"unseen_mistakes"} and "tip/energy_q1" not in found.scalars


@pytest.mark.parametrize("divergence", energy.FIELDS)
def test_the_energy_of_a_mixed_loss_by_hand(divergence):
    stats = update(sureness=3.0)
    share = torch.linspace(0, 1, 100)
    found = energy.of_loss(stats, share, divergence)
    for i in (0, 17, 99):
        own, forward, f = (float(c[i]) for c in (vars(stats)[f"{divergence}_energy"], stats.forward_kl_energy, share))
        assert found[i].item() == pytest.approx((1 - f) ** 2 * own + f**2 * forward, rel=1e-6)
    assert torch.equal(energy.of_loss(stats, None, divergence).float(), vars(stats)[f"{divergence}_energy"])
    shares = energy.describe(found, Quadrants(torch.arange(100) % 4 + 1, 0.0, 0.0))
    assert shares["tip/energy_q2"] == pytest.approx((found[1::4].sum() / found.sum()).item())


def test_thresholds_count_from_where_they_say():
    """Two tokens, of which the first is a confident mistake."""
    quadrants = Quadrants(torch.tensor([3, 1]), 0.0, 0.0)

    def kinds(energies, divergences):
        columns = (torch.tensor(column, dtype=torch.float64) for column in (energies, divergences))
        return set(energy.warnings(*columns, quadrants))

    assert kinds([0.9, 99.1], [1.0, 1.0]) == {"unseen_mistakes"}  # 0.9 % of the energy, half of the divergence
    assert not kinds([1.0, 99.0], [1.0, 1.0]) and not kinds([0.9, 99.1], [0.99, 1.0])


def test_a_run_asks_for_what_its_observer_reads():
    stats = update(sureness=5.0)
    observer = TipObserver(TipWeighter(TipConfig(rule="all")))
    assert all(vars(stats)[name] is not None for name in observer.needs)
    observer.diagnose(stats, TokenWeights(weights=torch.ones(100)))
