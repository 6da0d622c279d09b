"""Two gloo processes give the single-process update: loss, gradient and selection, token for token."""

import multiprocessing
import os
import tempfile
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import engine_for, flat_gradient, pair_of, random_lm, random_rollouts, relative, with_privileged

from opd.batch import make_micro_batches
from opd.grading import Verdict
from opd.hooks import TokenWeights
from opd.step import train_step
from opd.teacher.self import live
from opd.verdicts import Verdicts
from tip.config import TipConfig
from tip.rules import RULES
from tip.scores import Spread
from tip.weighter import TipWeighter

SELF_TAUGHT = ["taught by itself", "taught by its beginning"]  # the teacher's prompts are others


class OnlyTheFirstRank:
    """Keeps tokens of the even sequences with uneven weights, so that a rank that has the odd ones keeps none."""

    needs = frozenset({"total_variation"})

    def __call__(self, stats, generator):
        kept = (stats.sequence_id % 2 == 0).float()
        return TokenWeights(weights=kept * (1 + stats.position % 3), forward_share=stats.total_variation)


class ByPlace:
    """Weighs tokens by what a scorer says of them."""

    needs = frozenset({"place"})

    def __call__(self, stats, generator):
        return TokenWeights(weights=stats.extra["place"])


class Places:
    """A scorer that counts the tokens of each response."""

    names = frozenset({"place"})

    def __call__(self, rollouts):
        return {"place": [torch.arange(1.0, 1 + len(r.response_ids)) for r in rollouts]}


class EveryThird:
    """A grader that finds every third response right, and gives up on the last one."""

    def grade(self, pairs, answer_lines):
        assert dist.get_rank() == 0 if dist.is_initialized() else True
        return [Verdict("7", None if i == len(pairs) - 1 else i % 3 == 0) for i in range(len(pairs))]


class Nothing:
    needs = frozenset()

    def __call__(self, stats, generator):
        return TokenWeights(weights=torch.zeros(len(stats.position)))


def weighter_of(name):
    if name.startswith("running "):  # it has seen an update before
        weighter = TipWeighter(TipConfig(rule=name.removeprefix("running "), retention=0.4, scope="running"))
        spread = Spread(torch.linspace(0, 2, 1001, dtype=torch.float64))
        weighter.memory = {"student_entropy": spread, "reverse_kl": spread}
        return weighter
    if name.startswith("by "):
        return TipWeighter(TipConfig(rule="soft_or", retention=0.4, rollout_weight=name.removeprefix("by ")))
    named = {"one rank": OnlyTheFirstRank(), "nothing": Nothing(), "scorer": ByPlace()}
    named |= dict.fromkeys(SELF_TAUGHT, TipWeighter(TipConfig(rule="soft_or", retention=0.4)))
    return named.get(name) or TipWeighter(TipConfig(rule=name, retention=0.4))


def update(name, mine):
    """One update on the rollouts whose sequence id `mine` accepts."""
    torch.set_num_threads(1)
    student, teacher = random_lm(1), random_lm(2, hidden=48, layers=3, name="teacher")
    weighter = weighter_of(name)
    everywhere = random_rollouts(student, count=7)
    if name in SELF_TAUGHT:
        teacher = live(student) if name == "taught by itself" else random_lm(1, name="teacher")
        everywhere = with_privileged(everywhere)
    prompts = [everywhere[i // 2 * 2].prompt for i in range(7)]  # two rollouts of each prompt, and one of the last
    everywhere = [replace(r, prompt=prompt) for r, prompt in zip(everywhere, prompts, strict=True)]
    if name in ("first_turns", "last_turn"):  # an environment said the second token of the longer ones
        everywhere = [replace(r, turns=((0, 1), (2, n))) if (n := len(r.response_ids)) > 2 else r for r in everywhere]
    verdicts = Verdicts(EveryThird(), student.tokenizer, False)
    verdicts.begin(everywhere)
    rollouts = [r for r in everywhere if mine(r.sequence_id)]
    engine = engine_for(student, "optim.warmup_steps=0", "optim.lr=1e-2")
    gradients, original = [], torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda p, limit: (
        gradients.append(flat_gradient(student.model)) or original(p, limit)
    )
    try:
        result = train_step(
            replace(pair_of(student, teacher), scorers=(verdicts, Places())),
            engine,
            make_micro_batches(rollouts, 40, 0, "keep", packed_row=40),
            weighter,
            step=1,
            seed=0,
        )
    finally:
        torch.nn.utils.clip_grad_norm_ = original
        verdicts.close()
    weights = torch.cat([p.detach().flatten() for p in student.model.parameters()])
    if name.startswith("running "):  # what was learnt is the same everywhere
        weights = torch.cat([weights, *(s.points.float() for s in weighter.memory.values())])
    ids = torch.stack([result.stats.sequence_id, result.stats.position])
    return result.loss, result.weights.weights, ids, gradients[0] if gradients else None, weights


def work(rank, names, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {name: update(name, lambda i: i % 2 == rank) for name in names}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


NAMES = ["one rank", "nothing", "scorer", *sorted(RULES), "running soft_or", "running soft_or_sampling"]
NAMES += SELF_TAUGHT
NAMES += [f"by {how}" for how in ("reward", "pass_rate", "right", "wrong")]


@pytest.fixture(scope="module")
def both():
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        environment = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(["tests", ".", *([environment] if environment else [])])
        processes = [context.Process(target=work, args=(rank, NAMES, folder)) for rank in (0, 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        if environment is None:
            del os.environ["PYTHONPATH"]
        return [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]


@pytest.mark.filterwarnings("ignore:.*no token has weight")
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(name, both):
    loss, kept, ids, gradient, weights = update(name, lambda i: True)
    for rank in (0, 1):
        other_loss, other_kept, other_ids, other_gradient, other_weights = both[rank][name]
        assert torch.equal(ids, other_ids)
        torch.testing.assert_close(other_kept, kept, rtol=1e-5, atol=1e-6)
        assert torch.equal(other_kept > 0, kept > 0)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        if name == "nothing":
            assert gradient is None and other_gradient is None and torch.equal(other_weights, weights)
        else:
            assert relative(other_gradient, gradient) < 3e-6
            # Adam's first step is the gradient's sign, so a gradient of rounding size may step the other way
            assert relative(other_weights, weights) < 1e-4
    assert torch.equal(both[0][name][4], both[1][name][4])  # the ranks stay together, bit for bit
