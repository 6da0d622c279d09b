"""Real vLLM in processes of its own: it samples what the trainer would, has its weights, and is neither believed nor
needed for the run to survive."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import random_lm, random_rollouts, tiny_config
from runs import interrupted_before

from opd import adapters, evaluate, train
from opd.config import ROOT, LoraSection, load_config
from opd.data import read_training_prompts
from opd.errors import InputError, Interrupted, RunError
from opd.models import load, sequence_logprobs
from opd.progress import Progress
from opd.rollout import Decoding, connection, vllm
from opd.rollout.choose import fixed_sampler, make_probe
from opd.rollout.connection import python_of_vllm
from opd.rollout.local import TransformersSampler
from opd.rollout.turns import converse, open_dialogue
from opd.rollout.vllm import VllmSampler
from opd.rollout.wire import KEY
from tip.config import SECTIONS
from tip.weighter import TipWeighter

pytestmark = pytest.mark.vllm
CPU = torch.device("cpu")
SAMPLED, GREEDY = Decoding(1.0, 1.0, 40), Decoding(0.0, 1.0, 40)


def start(*settings):
    """The embedded student, vLLM that samples from it, and prompts."""
    config = tiny_config("rollout.engine=vllm", *settings)
    lm = load(config.student, CPU, "student")
    prompts, _ = read_training_prompts(config.data, lm.tokenizer, 0)
    return lm, VllmSampler(lm, config.student, config, 64), prompts[:24]


@pytest.fixture(scope="module")
def made(tiny_pair):
    lm, sampler, prompts = start()
    yield lm, sampler, prompts
    sampler.close()


def send(lm, sampler, change=lambda name, weight: (name, weight)):
    sampler.take(lambda: (pair for pair in (change(n, w) for n, w in lm.model.state_dict().items()) if pair))


def parity(lm, sampler, prompts):
    return sampler.check_parity(make_probe(lm, prompts))


@pytest.fixture
def student(made):
    """Whatever a test does to the weights is undone."""
    lm, sampler, _ = made
    sampler.fleet.restarted = False
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    yield lm
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            parameter.copy_(before[name])
    sampler.fleet.restarted = False
    send(lm, sampler)


@pytest.fixture
def sampler(made):
    return made[1]


@pytest.fixture
def prompts(made):
    return made[2]


def draw(sampler, prompts, decoding=SAMPLED, *advance, vocabulary=35):
    return sampler.sample(prompts, decoding, vocabulary, seeds(len(prompts)), *advance)


def seeds(count):
    return [(0, "rollout", 1, i) for i in range(count)]


def move(lm, scale=0.02, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * scale)


def test_greedy_responses_are_those_of_transformers(student, sampler, prompts, monkeypatch):
    monkeypatch.setattr(vllm, "BUCKET", 50_000)  # many of them
    for change in (False, True):
        if change:
            move(student)
            send(student, sampler)
            assert len(list(sampler.fleet.weights.iterdir())) > 5
        ours = draw(sampler, prompts, GREEDY)
        theirs = draw(TransformersSampler(student, 64), prompts, GREEDY)
        assert ours == theirs
    assert {r.finish_reason for r in ours} <= {"stop", "length"}


def test_adapters_are_sampled_merged(tmp_path):
    """vLLM cannot read a folder with adapters. It loads the model beneath and gets merged weights, of now and later."""
    lora = LoraSection(rank=4, alpha=8.0, targets="all-linear")
    config = tiny_config("rollout.engine=vllm")
    section = replace(config.student, lora=lora)
    lm = load(section, CPU, "student")
    adapters.add(lm.model, section, 0)
    shift = partial(move, SimpleNamespace(model=SimpleNamespace(parameters=adapters.trained(lm.model).values)))
    shift(scale=0.1)
    adapters.save(lm.model, adapters.trained(lm.model), tmp_path / "adapter")
    lm.tokenizer.save_pretrained(tmp_path / "adapter")
    prompts = read_training_prompts(config.data, lm.tokenizer, 0)[0][:24]
    theirs = draw(TransformersSampler(lm, 64), prompts, GREEDY)
    assert theirs != draw(TransformersSampler(load(config.student, CPU, "student"), 64), prompts, GREEDY)
    with fixed_sampler(lm, replace(section, path=str(tmp_path / "adapter")), config, prompts, 40) as sampler:
        assert draw(sampler, prompts, GREEDY) == theirs
        shift(scale=0.1, seed=1)
        sampler.take(lambda: adapters.merged_weights(lm.model), make_probe(lm, prompts))
        assert draw(sampler, prompts, GREEDY) == draw(TransformersSampler(lm, 64), prompts, GREEDY) != theirs


def test_conversations_are_those_of_transformers():
    """Four turns with an environment, greedily: each is a request with all that was said before."""
    config, _ = load_config("configs/tiny_planning.json", ["rollout.engine=vllm"])
    lm = load(config.student, CPU, "student")
    dialogue = open_dialogue(config.data.environment, lm, config.data)
    prompts = read_training_prompts(config.data, lm.tokenizer, 0)[0][:8]
    decoding = Decoding(0.0, 1.0, config.rollout.max_response_tokens)
    sampler = VllmSampler(lm, config.student, config, 256)
    try:
        ours, theirs = (
            converse(s, dialogue, prompts, decoding, 76, seeds(8)) for s in (sampler, TransformersSampler(lm, 64))
        )
    finally:
        sampler.close()
    assert ours == theirs and max(len(r.turns) for r in ours) >= 4


class KilledInTurn3:
    """Samples as vLLM does, whose process is killed in the third turn of the conversations, at its first tokens."""

    def __init__(self, sampler):
        self.sampler, self.turn, self.again = sampler, 0, []  # what a new process was asked for

    def sample(self, prompts, decoding, vocab_size, seeds, advance):
        self.turn += 1
        if self.turn != 3:
            return self.sampler.sample(prompts, decoding, vocab_size, seeds, advance)
        (server,) = self.sampler.fleet.servers
        process, send = server.place.process, type(server).send

        def sent(connection, **message):
            if process.poll() is not None and message["do"] == "generate":
                self.again += [request["id"] for request in message["requests"]]
            send(connection, **message)

        def kill(responses, tokens):
            if tokens and process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait(60)
            advance(responses, tokens)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(server), "send", sent)
            return self.sampler.sample(prompts, decoding, vocab_size, seeds, kill)


def test_an_engine_killed_in_the_third_turn_comes_back_and_the_conversations_are_the_same(capsys):
    """Of a conversation only the present turn is lost. An engine that is lost again ends the run."""
    config, _ = load_config("configs/tiny_planning.json", ["rollout.engine=vllm"])
    lm = load(config.student, CPU, "student")
    dialogue = open_dialogue(config.data.environment, lm, config.data)
    prompts = read_training_prompts(config.data, lm.tokenizer, 0)[0][:16]
    decoding = Decoding(1.0, 1.0, config.rollout.max_response_tokens)
    sampler = VllmSampler(lm, config.student, config, 256)
    talk = lambda s: converse(s, dialogue, prompts, decoding, 76, seeds(16))  # noqa: E731
    try:
        expected, killed = talk(sampler), KilledInTurn3(sampler)
        assert talk(killed) == expected and max(len(r.turns) for r in expected) >= 4
        assert sampler.fleet.restarted and killed.again and killed.turn >= 4
        assert "killed by signal 9" in capsys.readouterr().err
        with pytest.raises(RunError, match=r"lost for the second time: its process was killed by signal 9"):
            talk(KilledInTurn3(sampler))
    finally:
        sampler.close()


def test_a_run_whose_engine_is_killed_in_a_third_turn_is_the_unbroken_one(tmp_path, monkeypatch):
    """Killed in update 2 it goes on with the same tokens; killed in update 3 too it ends, and continues as it was."""
    settings = (
        "optim.steps=4",
        "rollout.prompts_per_step=8",
        "checkpoint.every=1",
        "eval.benchmarks=[]",
        "eval.k=null",
    )
    unbroken = run(tmp_path / "unbroken", *settings, pair="tiny_planning")
    calls, sample = [], VllmSampler.sample

    def sampling(self, prompts, decoding, vocab_size, seeds, advance=lambda responses, tokens: None):
        (_, _, update, *_), turn = seeds[0], len(seeds[0]) > 4 and seeds[0][-1]
        if turn == 2 and update in (2, 3) and update not in calls:
            calls.append(update)
            killed = KilledInTurn3(SimpleNamespace(fleet=self.fleet, sample=partial(sample, self)))
            killed.turn = 2
            return killed.sample(prompts, decoding, vocab_size, seeds, advance)
        return sample(self, prompts, decoding, vocab_size, seeds, advance)

    monkeypatch.setattr(VllmSampler, "sample", sampling)
    with pytest.raises(RunError, match="vLLM is lost for the second time"):
        run(tmp_path / "killed", *settings, pair="tiny_planning")
    assert calls == [2, 3] and [row["step"] for row in rows(tmp_path / "killed" / "run")] == [1, 2]
    assert rows(tmp_path / "killed" / "run") == rows(unbroken)[:2]
    monkeypatch.undo()
    again = run(tmp_path / "killed", *settings, pair="tiny_planning")
    assert rows(again) == rows(unbroken)
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        parts = [(folder / "checkpoints/step_000004" / name).read_bytes() for folder in (unbroken, again)]
        assert parts[0] == parts[1]


@pytest.mark.parametrize(
    "settings",
    [
        ("teacher.weights=live", "eval.benchmarks=[]", "eval.k=null"),
        ("teacher.weights=ema", "teacher.decay=0.9", "eval.limit=4", "eval.k=0", "eval.every=0"),
    ],
    ids=["live", "ema"],
)
def test_a_student_that_teaches_itself_learns_the_same_from_either_sampler(settings, tmp_path):
    """Greedy rollouts are those of transformers, token for token, and so the updates are the same bit for bit."""
    settings += ("optim.steps=3", "rollout.temperature=0")
    found = [
        run(tmp_path / engine, *settings, f"rollout.engine={engine}", pair="tiny_self")
        for engine in ("vllm", "transformers")
    ]
    sampled = [[{k: v for k, v in row.items() if k != "rollout/parity"} for row in rows(folder)] for folder in found]
    assert sampled[0] == sampled[1] and min(row["loss/divergence"] for row in sampled[0]) > 0
    files = ["checkpoints/step_000003/model.safetensors", "checkpoints/step_000003/trainer/optimizer.safetensors"]
    if (
        "eval.benchmarks=[]" not in settings
    ):  # the teacher, on its own prompts and on an engine of its own, and the student
        files += [f"eval/{who}/tiny_hinted.jsonl" for who in ("teacher", "step_000003")]
    for name in files:
        assert (found[0] / name).read_bytes() == (found[1] / name).read_bytes(), name


def test_any_of_several_eos_ids_ends_a_response(student, sampler, prompts, monkeypatch):
    drawn = draw(TransformersSampler(student, 64), prompts, GREEDY)
    counts = torch.bincount(torch.tensor([token for r in drawn for token in r.response_ids[1:-1]]), minlength=35)
    both = replace(student, eos_ids=(*student.eos_ids, int(counts.argmax())))
    monkeypatch.setattr(sampler, "lm", both)
    ours = draw(sampler, prompts, GREEDY)
    assert ours == draw(TransformersSampler(both, 64), prompts, GREEDY)
    assert sum(len(r.response_ids) for r in ours) < sum(len(r.response_ids) for r in drawn)


def test_rollouts_are_on_policy_seeded_and_told_as_they_come(student, sampler, prompts):
    told = []
    rollouts = draw(sampler, prompts, SAMPLED, lambda *x: told.append(x))
    assert sum(r for r, _ in told) == len(prompts) and sum(t for _, t in told) == sum(
        len(r.response_ids) for r in rollouts
    )
    again = draw(sampler, prompts)
    assert rollouts == again
    other = sampler.sample(prompts, SAMPLED, 35, [(1, *s[1:]) for s in seeds(len(prompts))])
    assert rollouts != other
    assert all((r.response_ids[-1] in student.eos_ids) == (r.finish_reason == "stop") for r in rollouts)
    assert not any(token in student.eos_ids for r in rollouts for token in r.response_ids[:-1])
    whole = [r.prompt.token_ids + r.response_ids for r in rollouts]
    (found,) = sampler.logprobs(whole)
    for logprobs, ids in zip(found, whole, strict=True):
        torch.testing.assert_close(logprobs, sequence_logprobs(student, [ids]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("vocabulary", "top_p", "top_k"), [(35, 1.0, None), (20, 1.0, None), (35, 0.5, None), (35, 1.0, 4)]
)
def test_samples_have_the_students_distribution(vocabulary, top_p, top_k, student, sampler, prompts):
    """2,000 first tokens of one prompt follow the exact probabilities; ids that are excluded never come."""
    drawn = draw(sampler, [prompts[0]] * 2000, Decoding(1.0, top_p, 1, top_k), vocabulary=vocabulary)
    ids = torch.tensor(prompts[0].token_ids)[None]
    with torch.no_grad():
        logits = student.model(ids).logits[0, -1].double()
    if vocabulary == 20:
        assert logits.softmax(-1)[20:].sum() > 0.1  # or it would show nothing
    exact = logits[:vocabulary].softmax(-1)
    ordered, ids = exact.sort(descending=True)
    outside = ids[top_k:] if top_k else ids[ordered.cumsum(-1) - ordered >= top_p]
    assert len(outside) > 20 or (top_p == 1 and not top_k)
    exact[outside] = 0
    exact /= exact.sum()
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in drawn]), minlength=vocabulary).double()
    assert len(counts) == vocabulary and not counts[outside].any()
    likely = exact * 2000 > 5
    chi2 = ((counts - 2000 * exact)[likely] ** 2 / (2000 * exact)[likely]).sum().item()
    assert chi2 < 4 * likely.sum().item() + 10 and counts[~likely].sum() < 60


def swapped(name, weight):
    part = name.split(".")
    if part[:2] == ["model", "layers"] and part[2] in "01":
        part[2] = "10"[int(part[2])]
    return ".".join(part), weight


FAULTS = {
    "stale": None,
    "forgotten head": lambda name, weight: (
        None if name == "lm_head.weight" else (name, weight)
    ),  # as named_parameters() does
    "swapped layers": swapped,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_trainers_are_found(fault, student, sampler, prompts):
    assert parity(student, sampler, prompts) < 1e-4
    move(student)
    if FAULTS[fault]:
        send(student, sampler, FAULTS[fault])
    with pytest.raises(
        RunError,
        match=r"vLLM does not have the trainer's weights: .* at the worst it has -\d+\.\d+ and the trainer "
        r"-\d+\.\d+, so",
    ):
        parity(student, sampler, prompts)
    send(student, sampler)
    assert parity(student, sampler, prompts) < 1e-4


def test_a_stop_in_the_middle_leaves_the_engine_usable(student, sampler, prompts):
    def stop(responses, tokens):
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        draw(sampler, prompts, SAMPLED, stop)
    assert len(draw(sampler, prompts[:3])) == 3


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_lost_engine_comes_back_with_the_weights_it_had_and_finished_responses_are_kept(
    how, student, sampler, prompts, monkeypatch, capsys
):
    move(student, scale=0.1)  # so that responses have many lengths, whatever the pair says
    send(student, sampler)
    expected = draw(sampler, prompts)
    (server,) = sampler.fleet.servers
    finished, asked = [], []
    send_message = type(server).send

    def sent(self, **message):
        asked.extend([r["id"] for r in message["requests"]] if message["do"] == "generate" else [])
        send_message(self, **message)

    def hurt(responses, tokens):
        finished.append(responses)
        if sum(finished) >= 5 and not sampler.fleet.restarted:
            if how == "killed":
                os.kill(server.place.process.pid, signal.SIGKILL)
            else:
                os.kill(server.place.process.pid, signal.SIGSTOP)
                server.timeout = 2

    monkeypatch.setattr(type(server), "send", sent)
    first = server.place.process.pid
    assert draw(sampler, prompts, SAMPLED, hurt) == expected
    server.timeout = 600
    again = asked[len(prompts) :]
    assert sampler.fleet.restarted and server.place.process.pid != first and 0 < len(again) <= len(prompts) - 5
    assert sum(finished) == len(prompts)
    said = capsys.readouterr().err
    assert "killed by signal 9" in said if how == "killed" else "no sign of life for 2 s" in said
    assert parity(student, sampler, prompts) < 1e-4
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_an_engine_lost_for_the_second_time_ends_the_run_and_names_the_cause(student, sampler, prompts):
    sampler.fleet.restarted = True

    def kill(responses, tokens):
        os.kill(sampler.fleet.servers[0].place.process.pid, signal.SIGKILL)

    with pytest.raises(
        RunError, match=r"vLLM is lost for the second time: its process was killed by signal 9\. Checkpoints are intact"
    ):
        draw(sampler, prompts, SAMPLED, kill)
    sampler.fleet.restarted = False  # what follows finds it dead, and starts it again


def test_a_stop_does_not_wait_for_an_engine_that_hangs(student, sampler, prompts, monkeypatch):
    monkeypatch.setattr(connection, "SHUTDOWN", 1)
    stopped = []

    def stop(responses, tokens):
        if not stopped:
            os.kill(sampler.fleet.servers[0].place.process.pid, signal.SIGSTOP)
            stopped.append(time.monotonic())
        elif time.monotonic() - stopped[0] > 0.9:  # asked every second, although nothing comes
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        draw(sampler, prompts, SAMPLED, stop)
    assert time.monotonic() - stopped[0] < 60 and sampler.fleet.servers[0].place.process.poll() is not None


def test_an_engine_that_died_between_updates_gets_the_new_weights(student, sampler, prompts):
    os.kill(sampler.fleet.servers[0].place.process.pid, signal.SIGKILL)
    move(student, seed=1)
    send(student, sampler)
    assert sampler.fleet.restarted and parity(student, sampler, prompts) < 1e-4


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def servers(count):
    """As a user starts them on another host."""
    ports = [free_port() for _ in range(count)]
    environment = os.environ | {KEY: "secret"}
    started = [
        subprocess.Popen(
            [python_of_vllm(), "-m", "opd.vllm_server", "--listen", f"127.0.0.1:{port}"], cwd=ROOT, env=environment
        )
        for port in ports
    ]
    try:
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for process in started:
            process.terminate()
            assert process.wait(30) == 128 + signal.SIGTERM


def test_servers_elsewhere_share_the_responses_and_serve_one_run_after_another(student, sampler, prompts, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    move(student, scale=0.1)  # responses of many lengths: none of a server's is the last when the first one ends
    send(student, sampler)
    expected = draw(sampler, prompts)
    with servers(2) as addresses:
        for number in range(2):
            _, elsewhere, _ = start(f"rollout.servers={json.dumps(addresses)}")
            send(student, elsewhere)  # through the connection: they need not see this machine's files
            assert parity(student, elsewhere, prompts) < 1e-4
            assert draw(elsewhere, prompts) == expected
            if number == 0:  # the one that crashes is started again by its own supervisor
                pids = subprocess.run(
                    ["pgrep", "-f", f"listen {addresses[1]} --child"], capture_output=True, text=True
                ).stdout.split()
                killed = []

                def kill(responses, tokens, pids=pids, killed=killed):
                    if not killed:
                        killed.extend(pids)
                        for pid in pids:
                            os.kill(int(pid), signal.SIGKILL)

                assert draw(elsewhere, prompts, SAMPLED, kill) == expected
                assert killed and elsewhere.fleet.restarted
            elsewhere.close()


def test_nothing_computed_with_old_weights_is_reused(tmp_path):
    """A prompt of more than two cache blocks, asked again after an update."""
    lm = random_lm(1, head_dim=32, max_position_embeddings=512)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    config = tiny_config("rollout.engine=vllm", f"student.path={tmp_path}")
    sampler = VllmSampler(lm, config.student, config, 400)
    prompts = [replace(r.prompt, id=str(i)) for i, r in enumerate(random_rollouts(lm, count=2, prompt=(300, 320)))]
    try:
        for seed in (None, 0, 1):
            if seed is not None:
                move(lm, 0.05, seed)
            send(lm, sampler)
            assert draw(sampler, prompts, GREEDY) == draw(TransformersSampler(lm, 64), prompts, GREEDY)
    finally:
        sampler.close()


def test_two_gpus_share_one_model(student, prompts):
    """Tensor parallel, here two processes on a CPU: the weights of every update reach both."""
    _, shared, _ = start("rollout.tensor_parallel=2")
    try:
        assert parity(student, shared, prompts) < 1e-4
        move(student)
        with pytest.raises(RunError, match="does not have the trainer's weights"):
            parity(student, shared, prompts)
        send(student, shared)
        assert parity(student, shared, prompts) < 1e-4
        assert draw(shared, prompts, GREEDY) == draw(TransformersSampler(student, 64), prompts, GREEDY)
    finally:
        shared.close()


@pytest.mark.parametrize("group", [1, 2])
def test_two_processes_with_split_weights_have_an_engine_each_or_share_one(group, tiny_pair, tmp_path):
    """ZeRO-3: what vLLM gets is gathered; every sync is compared."""
    arguments = [
        f"rollout.tensor_parallel={group}",
        "rollout.engine=vllm",
        "rollout.parity_every=1",
        "engine.kind=deepspeed",
        "engine.deepspeed=zero3",
        f"output_dir={tmp_path}",
        "run_name=run",
        "optim.steps=3",
        "optim.warmup_steps=0",
        "optim.lr=1e-3",
        "eval.benchmarks=[]",
        "eval.k=null",
    ]
    command = [sys.executable, "-m", "opd.launch", "opd.train", "--config", "configs/tiny.json"]
    command += [x for a in arguments for x in ("--set", a)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NUM_GPUS": "2"}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(tmp_path / "run")
    assert len(found) == 3 and all(0 < r["rollout/parity"] <= 1e-4 for r in found)
    one = run(tmp_path / "one", "optim.steps=3", "optim.lr=1e-3", "eval.benchmarks=[]", "eval.k=null", weighter=None)
    for ours, theirs in zip(found, rows(one), strict=True):  # the same responses: seeds go by response, not by process
        assert ours["tokens/response"] == theirs["tokens/response"]
        assert ours["loss/divergence"] == pytest.approx(theirs["loss/divergence"], rel=1e-4)


def run(out, *settings, weighter=TipWeighter, pair="tiny"):
    config, sections = load_config(
        f"configs/{pair}.json",
        [
            "rollout.engine=vllm",
            "rollout.parity_every=1",
            f"output_dir={out}",
            "run_name=run",
            "optim.steps=5",
            "eval.limit=24",
            "eval.k=1",
            "optim.warmup_steps=0",
            "checkpoint.every=2",
            "log.token_dump_every=0",
            *settings,
        ],
        SECTIONS,
    )
    shared = out.parent / "shared"  # the teacher's evaluation, which has a vLLM of its own, only once
    return train.run(config, weighter(sections["tip"]), sections, shared=shared) if weighter else train.run(config)


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("time/", "memory/"))} for r in found]


def test_a_run_keeps_parity_evaluates_on_the_engine_and_continues_exactly(tiny_pair, tmp_path, monkeypatch):
    unbroken = run(tmp_path / "unbroken")
    found = rows(unbroken)
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5] and all(r["rollout/parity"] <= 1e-4 for r in found)
    assert all("time/sync" in json.loads(x) for x in (unbroken / "metrics.jsonl").read_text().splitlines())
    interrupted_before(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    monkeypatch.undo()
    assert rows(run(tmp_path / "broken")) == found
    _killed_twice(unbroken, tmp_path / "killed", monkeypatch)
    for name in ("eval/step_000000/tiny.jsonl", "eval/step_000005/tiny.jsonl"):
        assert (tmp_path / "broken/run" / name).read_text() == (unbroken / name).read_text()
    two_phases = run(tmp_path / "two", "engine.phases=2")
    assert rows(two_phases) == found
    for weights in ("model.safetensors", "trainer/optimizer.safetensors"):
        parts = (folder / "checkpoints/step_000005" / weights for folder in (unbroken, two_phases))
        assert len({part.read_bytes() for part in parts}) == 1
    plain = run(tmp_path / "plain", "rollout.engine=transformers")
    for who in ("teacher", "step_000000"):
        lines = [
            (folder / "eval" / who / "tiny.jsonl").read_text().splitlines() for folder in (unbroken, two_phases, plain)
        ]
        greedy = [[r["response"] for r in map(json.loads, found) if r["sample"] == -1] for found in lines]
        assert greedy[0] == greedy[1] == greedy[2] and len(greedy[0]) == 24


def _killed_twice(unbroken, out, monkeypatch):
    """vLLM is killed in the middle of the rollouts of updates 2 and 4: the run recovers once; continued, it
    finishes."""
    kills = []
    advance = Progress.advance

    def hurt(self, responses, tokens):
        advance(self, responses, tokens)
        if self.label in ("rollouts of step 2", "rollouts of step 4") and self.done >= 8 and self.label not in kills:
            kills.append(self.label)
            subprocess.run(["pkill", "-9", "-P", str(os.getpid()), "-f", "opd.vllm_server --listen /"], check=True)

    monkeypatch.setattr(Progress, "advance", hurt)
    with pytest.raises(RunError, match="vLLM is lost for the second time"):
        run(out)
    assert len(kills) == 2 and [r["step"] for r in rows(out / "run")] == [1, 2, 3]
    monkeypatch.undo()
    assert rows(run(out)) == rows(unbroken)


def test_a_checkpoint_is_evaluated_on_the_engine(tiny_pair, tmp_path, capsys):
    found = []
    for engine in ("vllm", "transformers"):
        evaluate.command(
            [
                "--config",
                "configs/tiny.json",
                "--model",
                "data/tiny/pairs/chain/student",
                "--limit",
                "16",
                "--out",
                str(tmp_path / engine),
                "--set",
                f"rollout.engine={engine}",
                "--set",
                "eval.k=0",
            ]
        )
        found.append((tmp_path / engine / "tiny.jsonl").read_text())
    assert found[0] == found[1]  # greedy responses and their verdicts


def test_a_model_that_vllm_does_not_take_is_refused(tiny_pair, tmp_path):
    config = tiny_config("rollout.engine=vllm")
    lm = load(config.student, CPU, "student")
    shutil.copytree(config.student.path, tmp_path, dirs_exist_ok=True)
    odd = json.loads((tmp_path / "config.json").read_text()) | {"head_dim": 48}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    with pytest.raises(InputError, match=r"rollout.engine is 'vllm', which does not take"):
        VllmSampler(lm, replace(config.student, path=str(tmp_path)), config, 64)
