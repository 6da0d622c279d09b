"""Real vLLM in the training process: it samples what the trainer would, has its weights, and is not believed."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import tiny_config

pytest.importorskip("vllm", reason="vLLM has an environment of its own: bash scripts/test.sh --vllm")

from opd import evaluate, train
from opd.cli import InputError, Interrupted, RunError
from opd.config import load_config
from opd.data import read_training_prompts
from opd.models import load
from opd.rollout import Decoding, VllmEngine, own_logprobs, sample
from tip.config import SECTIONS
from tip.weighter import TipWeighter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tiny_pair):
    """The embedded student, an engine that samples from it, and prompts."""
    config = tiny_config("rollout.engine=vllm")
    lm = load(config.student, CPU, "student")
    prompts, _ = read_training_prompts(config.data, lm.tokenizer, 0)
    engine = VllmEngine(lm, config.student, config, 64)
    return replace(lm, sampler=engine), engine, prompts[:24]


@pytest.fixture
def student(made):
    """Whatever a test does to the weights is undone."""
    lm, engine, _ = made
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    yield lm
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            parameter.copy_(before[name])
    engine.sync()


def seeds(count):
    return [(0, "rollout", 1, i) for i in range(count)]


def move(lm, scale=0.02, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * scale)


def test_greedy_responses_are_those_of_transformers(student, made):
    _, engine, prompts = made
    greedy = Decoding(0.0, 1.0, 40)
    for change in (False, True):
        if change:
            move(student)
            engine.sync()
        ours = sample(student, prompts, greedy, 35, 64, seeds(len(prompts)))
        theirs = sample(replace(student, sampler=None), prompts, greedy, 35, 64, seeds(len(prompts)))
        assert ours == theirs
    assert {r.finish_reason for r in ours} <= {"stop", "length"}


def test_rollouts_are_on_policy_seeded_and_told_as_they_come(student, made):
    _, engine, prompts = made
    told = []
    rollouts = sample(student, prompts, Decoding(1.0, 1.0, 40), 35, 64, seeds(len(prompts)), lambda *x: told.append(x))
    assert sum(r for r, _ in told) == len(prompts) and sum(t for _, t in told) == sum(
        len(r.response_ids) for r in rollouts
    )
    again = sample(student, prompts, Decoding(1.0, 1.0, 40), 35, 64, seeds(len(prompts)))
    assert rollouts == again
    other = sample(student, prompts, Decoding(1.0, 1.0, 40), 35, 64, [(1, *s[1:]) for s in seeds(len(prompts))])
    assert rollouts != other
    assert all((r.response_ids[-1] in student.eos_ids) == (r.finish_reason == "stop") for r in rollouts)
    assert not any(token in student.eos_ids for r in rollouts for token in r.response_ids[:-1])
    whole = [r.prompt.token_ids + r.response_ids for r in rollouts]
    for engines, ids in zip(engine.logprobs(whole), whole, strict=True):
        torch.testing.assert_close(engines, own_logprobs(student, ids), rtol=0, atol=1e-4)


def test_samples_have_the_students_distribution(student, made):
    """2,000 first tokens of one prompt against the exact probabilities."""
    _, _, prompts = made
    drawn = sample(student, [prompts[0]] * 2000, Decoding(1.0, 1.0, 1), 35, 64, seeds(2000))
    ids = torch.tensor(prompts[0].token_ids)[None]
    with torch.no_grad():
        exact = student.model(ids).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in drawn]), minlength=len(exact)).double()
    likely = exact * 2000 > 5
    chi2 = ((counts - 2000 * exact)[likely] ** 2 / (2000 * exact)[likely]).sum().item()
    assert chi2 < 4 * likely.sum().item() + 10 and counts[~likely].sum() < 60


@pytest.mark.parametrize("fault", ["stale", "forgotten head", "swapped layers"])
def test_weights_that_are_not_the_trainers_are_found(fault, student, made, monkeypatch):
    _, engine, prompts = made
    assert engine.check_parity(prompts[:8], 0) < 1e-4
    move(student)
    send = engine.llm.collective_rpc
    if fault == "forgotten head":  # what named_parameters() of a tied model would send
        monkeypatch.setattr(engine.llm, "collective_rpc", lambda name, kwargs: send(
            name, kwargs={"weights_iterator": [(n, w) for n, w in kwargs["weights_iterator"] if n != "lm_head.weight"]}))  # fmt: skip
        engine.sync()
    elif fault == "swapped layers":
        swap = {"0": "1", "1": "0"}
        monkeypatch.setattr(engine.llm, "collective_rpc", lambda name, kwargs: send(name, kwargs={"weights_iterator": [
            (".".join([*n.split(".")[:2], swap.get(n.split(".")[2], n.split(".")[2]), *n.split(".")[3:]])
             if n.startswith("model.layers.") else n, w) for n, w in kwargs["weights_iterator"]]}))  # fmt: skip
        engine.sync()
    with pytest.raises(
        RunError, match=r"after step 3: vLLM does not have the trainer's weights: .* gives a token the logprob"
    ):
        engine.check_parity(prompts[:8], 3)
    monkeypatch.undo()
    engine.sync()
    assert engine.check_parity(prompts[:8], 3) < 1e-4


def test_a_stop_in_the_middle_leaves_the_engine_usable(student, made):
    _, _, prompts = made

    def stop(responses, tokens):
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        sample(student, prompts, Decoding(1.0, 1.0, 40), 35, 64, seeds(len(prompts)), stop)
    assert len(sample(student, prompts[:3], Decoding(1.0, 1.0, 40), 35, 64, seeds(3))) == 3


def run(out, *settings):
    config, sections = load_config("configs/tiny.json", [
        "rollout.engine=vllm", "rollout.parity_every=1", f"output_dir={out}", "run_name=run", "optim.steps=5", "eval.limit=24",
        "eval.k=1", "optim.warmup_steps=0", "checkpoint.every=2", "log.token_dump_every=0", *settings], SECTIONS)  # fmt: skip
    return train.run(config, TipWeighter(sections["tip"]), sections)


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("time/", "memory/"))} for r in found]


def test_a_run_keeps_parity_evaluates_on_the_engine_and_continues_exactly(tiny_pair, tmp_path, monkeypatch):
    unbroken = run(tmp_path / "unbroken")
    found = rows(unbroken)
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5] and all(r["rollout/parity"] <= 1e-4 for r in found)
    assert all("time/sync" in json.loads(x) for x in (unbroken / "metrics.jsonl").read_text().splitlines())
    original = train._update

    def dies(parts, step):
        if step == 4:
            raise KeyboardInterrupt
        return original(parts, step)

    monkeypatch.setattr(train, "_update", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    monkeypatch.undo()
    assert rows(run(tmp_path / "broken")) == found
    for name in ("eval/step_000000/tiny.jsonl", "eval/step_000005/tiny.jsonl"):
        assert (tmp_path / "broken/run" / name).read_text() == (unbroken / name).read_text()
    greedy = [json.loads(x) for x in (unbroken / "eval/step_000000/tiny.jsonl").read_text().splitlines()]
    plain = run(tmp_path / "plain", "rollout.engine=transformers")
    theirs = [json.loads(x) for x in (plain / "eval/step_000000/tiny.jsonl").read_text().splitlines()]
    assert [r["response"] for r in greedy if r["sample"] == -1] == [r["response"] for r in theirs if r["sample"] == -1]


def test_a_checkpoint_is_evaluated_on_the_engine(tiny_pair, tmp_path, capsys):
    found = []
    for engine in ("vllm", "transformers"):
        evaluate.command(["--config", "configs/tiny.json", "--model", "outputs/tiny/student", "--limit", "16", "--out",
                          str(tmp_path / engine), "--set", f"rollout.engine={engine}", "--set", "eval.k=0"])  # fmt: skip
        found.append((tmp_path / engine / "tiny.jsonl").read_text())
    assert found[0] == found[1]  # greedy responses and their verdicts


def test_a_model_that_vllm_does_not_take_is_refused(tiny_pair, tmp_path):
    config = tiny_config("rollout.engine=vllm")
    lm = load(config.student, CPU, "student")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"rollout.engine is 'vllm', which does not take"):
        VllmEngine(lm, replace(config.student, path=str(tmp_path)), config, 64)
