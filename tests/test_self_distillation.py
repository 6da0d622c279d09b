"""The teacher is the student with a privileged prompt: the update against naive formulas, and whole runs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import runs
import torch
from helpers import (
    LOSS,
    engine_for,
    flat_gradient,
    naive_loss,
    one_each,
    pair_of,
    random_lm,
    random_rollouts,
    relative,
    with_privileged,
)
from safetensors.torch import load_file

from opd import models
from opd.batch import make_micro_batches
from opd.config import LossSection
from opd.hooks import UniformWeighter
from opd.rollout import Decoding, vllm
from opd.rollout.local import TransformersSampler
from opd.step import Pair, train_step
from opd.teacher.cache import Cache
from opd.teacher.local import LocalTeacher
from opd.teacher.self import Average, live
from tip.config import TipConfig
from tip.weighter import TipWeighter

SAME = 3e-6  # as in test_step.py
STATISTICS = frozenset({"student_entropy", "teacher_entropy", "reverse_kl", "forward_kl", "teacher_logprob"})
MARK = "thus hmm "  # stands in no problem of the embedded pair
PROMPT = {"template": MARK + "{answer}", "role": "user", "missing": "error", "max_tokens": 40}
SELF = ("teacher.mode=self", "teacher.path=null", f"data.teacher_prompt={json.dumps(PROMPT)}")
WEIGHTS = {
    "initial": ("teacher.weights=initial",),
    "live": ("teacher.weights=live",),
    "ema": ("teacher.weights=ema", "teacher.decay=0.9"),
}
SHORT = ("optim.steps=3", "optim.warmup_steps=0", "rollout.prompts_per_step=8", "eval.limit=4", "eval.k=0")
SHORT += ("eval.every=0", "checkpoint.every=2")


def step(batches, weighter=None, *, teacher=None, loss=LOSS, measure=frozenset()):
    """One update of a student whose teacher has its own weights, by default a frozen copy; (result, gradient)."""
    student, seen = random_lm(1), []
    engine = engine_for(student)
    finish = engine.finish
    engine.finish = lambda apply: (seen.append(flat_gradient(student.model)), finish(apply))[1]
    pair = pair_of(student, live(student) if teacher == "live" else random_lm(1, name="teacher"), loss)
    weighter = weighter or UniformWeighter()
    return train_step(pair, engine, batches, weighter, step=1, seed=0, measure=measure), seen[0]


def naive(rollouts, divergence, beta=0.5):
    """Loss, gradient and statistics in float64, with the two contexts run one by one and nothing padded or shared."""
    student, teacher = random_lm(1), random_lm(1, name="teacher")
    student.model.double(), teacher.model.double()
    losses, columns = [], {name: [] for name in STATISTICS}
    for rollout in rollouts:
        rows = []
        for lm, prompt in ((student, rollout.prompt.token_ids), (teacher, rollout.prompt.teacher_ids)):
            logits = lm.model(input_ids=torch.tensor([prompt + rollout.response_ids]), use_cache=False).logits[0]
            rows.append(logits[len(prompt) - 1 : -1])
        losses.append(naive_loss(divergence, *rows, beta))
        logp, logq = (x.detach().log_softmax(-1) for x in rows)
        columns["student_entropy"].append(-(logp.exp() * logp).sum(-1))
        columns["teacher_entropy"].append(-(logq.exp() * logq).sum(-1))
        columns["reverse_kl"].append((logp.exp() * (logp - logq)).sum(-1))
        columns["forward_kl"].append((logq.exp() * (logq - logp)).sum(-1))
        columns["teacher_logprob"].append(logq.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0])
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), flat_gradient(student.model), {name: torch.cat(parts) for name, parts in columns.items()}


@pytest.mark.parametrize("teacher", [None, "live"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "total_variation"])
def test_without_a_privileged_prompt_loss_and_gradient_are_exactly_0(divergence, teacher):
    rollouts = random_rollouts(random_lm(1))
    same = [replace(r, prompt=replace(r.prompt, privileged_ids=r.prompt.token_ids)) for r in rollouts]
    loss = LossSection(divergence=divergence, jsd_beta=0.5, chunk_bytes=2**28)
    for batches in (one_each(rollouts), one_each(same), make_micro_batches(same, 10**6, 0, "keep", 10**6)):
        result, gradient = step(batches, teacher=teacher, loss=loss)
        assert result.loss == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize("teacher", [None, "live"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "total_variation"])
def test_the_update_equals_a_naive_formula_that_runs_the_two_contexts_separately(divergence, teacher):
    rollouts = with_privileged(random_rollouts(random_lm(1)))
    loss = LossSection(divergence=divergence, jsd_beta=0.3, chunk_bytes=2**16)
    result, gradient = step(one_each(rollouts), teacher=teacher, loss=loss, measure=STATISTICS)
    value, expected, columns = naive(rollouts, divergence, 0.3)
    assert value > 0.05 and result.loss == pytest.approx(value, rel=1e-5) and relative(gradient, expected) < 1e-5
    for name, column in columns.items():
        torch.testing.assert_close(vars(result.stats)[name].double(), column, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighter", [UniformWeighter(), TipWeighter(TipConfig())])
def test_the_gradient_does_not_depend_on_micro_batches_padding_shared_rows_or_order(weighter):
    rollouts = with_privileged(random_rollouts(random_lm(1), count=14, response=(1, 60)))
    base = step(one_each(rollouts), weighter)[1]
    longest = max(max(len(r.prompt.token_ids), len(r.prompt.teacher_ids)) + len(r.response_ids) for r in rollouts)
    for budget, pad_id, packed in ((3 * longest, 0, 0), (10**6, 31, 0), (4 * longest, 0, longest), (10**6, 31, 10**6)):
        batches = make_micro_batches(rollouts[::-1], budget, pad_id, "keep", packed)[::-1]
        assert any(b.for_teacher.position_ids is not None for b in batches) == bool(packed)
        assert all(b.for_teacher.input_ids.numel() <= max(budget, longest) for b in batches)
        assert relative(step(batches, weighter)[1], base) < SAME


def test_rows_are_shared_by_the_longer_of_the_two_prompts():
    rollouts = with_privileged(random_rollouts(random_lm(1), count=7, response=(8, 12)))
    rollouts[3] = replace(rollouts[3], turns=((0, 2), (5, 8)))  # an environment spoke in between, the same to both
    batches = make_micro_batches(rollouts, 10**6, 0, "keep", 10**6)
    (batch,) = batches
    seen = batch.for_teacher
    assert seen is not batch and seen.rollouts == batch.rollouts and len(seen.input_ids) == len(batch.input_ids)
    assert all(torch.equal(seen.facts[name], column) for name, column in batch.facts.items())
    for b, ids in ((batch, "token_ids"), (seen, "teacher_ids")):
        # the token that a hidden state predicts stands behind it
        predicted = b.input_ids[b.rows, b.columns + 1]
        assert torch.equal(predicted, batch.token_ids)
        (first,) = (n for n, r in enumerate(b.rollouts) if r.sequence_id == 0)
        at = int((b.sequence_id == 0).nonzero()[0])
        prompt = getattr(b.rollouts[first].prompt, ids)
        begin = int(b.columns[at]) + 1 - len(prompt)
        assert b.input_ids[int(b.rows[at]), begin : begin + len(prompt)].tolist() == list(prompt)


def test_the_average_by_hand():
    """a = decay a + (1 - decay) student after each update, by a loop in float64."""
    student, teacher = random_lm(1, tie_word_embeddings=False), random_lm(1, tie_word_embeddings=False, name="teacher")
    engine = engine_for(student, "optim.lr=1e-2", "optim.warmup_steps=0")
    average = Average(teacher, engine, 0.7)
    expected = {name: p.detach().double().clone() for name, p in student.model.named_parameters()}
    pair, rollouts = Pair(student, LocalTeacher(teacher), 35, LOSS), with_privileged(random_rollouts(student))
    for number in (1, 2, 3):
        train_step(pair, engine, one_each(rollouts), UniformWeighter(), step=number, seed=0)
        average.follow()
        for name, parameter in student.model.named_parameters():
            expected[name] = 0.7 * expected[name] + 0.3 * parameter.detach().double()
    for name, parameter in teacher.model.named_parameters():
        assert not torch.equal(parameter, dict(student.model.named_parameters())[name])
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert not parameter.requires_grad
    saved = {name: tensor.clone() for name, tensor in average.state().items()}
    other = Average(random_lm(9, tie_word_embeddings=False, name="teacher"), engine, 0.7)
    other.load_state(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in other.state().items())


# whole runs


def results(folder):
    """Metrics but for times and memory, and the bytes of weights, moments, averages, dumps and evaluations."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in r.items() if not k.startswith(("time/", "memory/"))} for r in rows]
    kinds = ("checkpoints/**/*.safetensors", "eval/**/tiny.jsonl", "tokens/*")
    return numbers, {str(p.relative_to(folder)): p.read_bytes() for kind in kinds for p in sorted(folder.glob(kind))}


SETTINGS = (*SELF, *SHORT, "log.token_dump_every=2")
READ = []  # the name of every model of the whole runs, and what it sampled for or scored


@pytest.fixture(scope="module")
def whole(tiny_pair, tmp_path_factory):
    sample, hidden_states = TransformersSampler.sample, models.LanguageModel.hidden_states

    def sampling(self, prompts, *rest):
        READ.extend((self.lm.name, self.lm.tokenizer.decode(p.token_ids)) for p in prompts)
        return sample(self, prompts, *rest)

    def scoring(self, batch, keep):
        READ.extend((self.name, self.tokenizer.decode(row)) for row in batch.input_ids)
        return hidden_states(self, batch, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersSampler, "sample", sampling)
        patch.setattr(models.LanguageModel, "hidden_states", scoring)
        return {w: runs.train(tmp_path_factory.mktemp(w), *SETTINGS, *more) for w, more in WEIGHTS.items()}


def test_each_teacher_has_the_weights_that_it_should(whole):
    """The first update is the same for all three; later ones differ. The average is in every checkpoint."""
    losses = {w: [row["loss/divergence"] for row in results(folder)[0]] for w, folder in whole.items()}
    assert len({one[0] for one in losses.values()}) == 1 and len({one[1] for one in losses.values()}) == 3
    for weights, folder in whole.items():
        kept = sorted(folder.glob("checkpoints/*/trainer/teacher.safetensors"))
        assert len(kept) == (2 if weights == "ema" else 0)
        evaluated = [
            json.loads((folder / f"eval/{name}/tiny.jsonl").read_text().splitlines()[0])
            for name in ("teacher", "step_000000")
        ]
        assert MARK in evaluated[0]["prompt"] and MARK not in evaluated[1]["prompt"]
    first, last = (load_file(path) for path in sorted(whole["ema"].glob("checkpoints/*/trainer/teacher.safetensors")))
    assert all(tensor.dtype == torch.float32 for tensor in first.values())
    assert any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_run_that_continues_in_two_phases_with_states_on_disk_is_the_unbroken_one(
    whole, tmp_path, monkeypatch, weights
):
    settings = (*SETTINGS, *WEIGHTS[weights])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        runs.interrupted_before(3, patch)  # behind the checkpoint of update 2
        runs.train(tmp_path, *settings)
    again = runs.train(tmp_path, *settings, "engine.phases=2", "teacher.cache_gb=0")
    assert results(again) == results(whole[weights])


def test_the_student_never_reads_a_privileged_text(whole):
    """Neither in a rollout, nor in an evaluation of its own, nor where it is scored or learns."""
    assert {name for name, text in READ if MARK in text} == {"teacher"}
    assert {name for name, text in READ if MARK not in text and text.startswith("<|im_start|>user")} == {"student"}
    rows = [json.loads(line) for line in (whole["initial"] / "tokens/step_000002.jsonl").read_text().splitlines()]
    assert rows and all(MARK in row["teacher_prompt"] for row in rows)
    assert not any(MARK in row["prompt"] + row["response"] for row in rows)


def test_vllm_is_asked_with_the_students_prompt_alone(monkeypatch):
    asked = []

    class Generation:
        def __init__(self, fleet, requests, *_):
            asked.extend(requests)

        def generate(self):
            return {request["id"]: (5,) for request in asked}

    monkeypatch.setattr(vllm, "_Generation", Generation)
    lm = random_lm(1)
    sampler = object.__new__(vllm.VllmSampler)
    sampler.lm, sampler.fleet = lm, SimpleNamespace(wake=lambda: None)
    prompts = [r.prompt for r in with_privileged(random_rollouts(lm))]
    rollouts = sampler.sample(prompts, Decoding(1.0, 1.0, 4), 35, [(0, i) for i in range(len(prompts))])
    assert [request["prompt"] for request in asked] == [prompt.token_ids for prompt in prompts]
    assert [rollout.prompt for rollout in rollouts] == prompts  # with what the teacher reads


def test_spilled_states_of_a_self_teacher_are_those_in_memory(tmp_path):
    student = random_lm(1)
    batches = one_each(with_privileged(random_rollouts(student)))
    kept, spilled = (
        LocalTeacher(live(student), cache).hidden_states(batches) for cache in (Cache(), Cache(0, tmp_path / "states"))
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, spilled, strict=True)) and len(kept) == len(batches)
