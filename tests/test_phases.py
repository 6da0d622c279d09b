"""Two phases on one device give the run of one phase bit for bit, and hold only what a phase needs."""

import copy
import errno
import json
import random
from dataclasses import replace

import pytest
import runs
import torch
from helpers import engine_for, one_each, pair_of, random_lm, random_rollouts, tiny_config
from runs import interrupted_before
from safetensors.torch import load_file

from opd import build, models, train
from opd.errors import RunError
from opd.grading import Grader
from opd.hooks import UniformWeighter
from opd.phases import Phases
from opd.progress import Watch
from opd.rollout import choose
from opd.rollout.local import TransformersSampler
from opd.step import train_step
from opd.stop import Stop
from opd.teacher import cache as teacher_cache
from opd.teacher.cache import Cache
from opd.teacher.local import LocalTeacher
from opd.verdicts import Verdicts

SETTINGS = (
    "optim.steps=4",
    "optim.warmup_steps=0",
    "eval.limit=6",
    "eval.k=1",
    "checkpoint.every=2",
    "eval.reverse_kl=true",
    "log.diagnostics_every=2",
)
RULES = {
    "all tokens": None,  # no scoring pass
    "soft_or": {"rule": "soft_or", "retention": 0.5},
    "running": {"rule": "soft_or", "retention": 0.5, "scope": "running"},  # in the update's own forward
}


def run(out, rule, *settings, resume="auto"):
    tip = [f"tip.{key}={value}" for key, value in (RULES[rule] or {}).items()]
    return runs.train(out, *SETTINGS, *tip, *settings, resume=resume, plain=not tip)


def results(folder):
    """All that a run says and writes, but for times and memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in r.items() if not k.startswith(("time/", "memory/"))} for r in rows]
    files = {
        str(p.relative_to(folder)): p.read_bytes()
        for kind in ("checkpoints/**/*.safetensors", "eval/**/tiny.jsonl", "tokens/*")
        for p in sorted(folder.glob(kind))
    }
    return numbers, files


@pytest.fixture(scope="module")
def one_phase(tiny_pair, tmp_path_factory):
    return {rule: results(run(tmp_path_factory.mktemp("one"), rule)) for rule in RULES}


@pytest.mark.parametrize("rule", RULES)
def test_two_phases_give_the_same_run_bit_for_bit(rule, one_phase, tmp_path):
    numbers, files = results(run(tmp_path, rule, "engine.phases=2"))
    assert len(numbers) == 4 and any("optimizer" in name for name in files) and any("eval" in name for name in files)
    assert (numbers, files) == one_phase[rule]


@pytest.mark.parametrize("share", [0, 0.5])
def test_spilled_states_give_the_same_run_bit_for_bit_and_are_gone_afterwards(share, one_phase, tmp_path, monkeypatch):
    plain = results(run(tmp_path / "plain", "soft_or", "optim.micro_batch_tokens=512"))
    whole, spilled = [], []
    add, clear = Cache.add, Cache.clear

    def added(self, states):
        add(self, states)
        if self.folder:
            whole.append(self.entries[-1])

    def cleared(self):
        if self.folder and self.folder.exists():
            spilled.append(sorted(p.name for p in self.folder.iterdir()))
        clear(self)

    monkeypatch.setattr(Cache, "add", added)
    monkeypatch.setattr(Cache, "clear", cleared)
    # the states of an update of this pair: 32 rollouts of some 37 tokens, 128 float32 numbers each
    limit = share * 32 * 37 * 128 * 4 / 2**30
    folder = run(tmp_path, "soft_or", f"teacher.cache_gb={limit}", "optim.micro_batch_tokens=512")
    assert results(folder) == plain
    files = [name for names in spilled for name in names]
    assert files and all(name.startswith("rank_0_batch_") and name.endswith(".safetensors") for name in files)
    held = [states for states in whole if isinstance(states, torch.Tensor)]
    assert bool(held) == (share > 0)
    assert not (folder / "teacher_states").exists()


def test_a_stopped_two_phase_run_continues_bit_for_bit(one_phase, tmp_path, monkeypatch):
    interrupted_before(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "soft_or", "engine.phases=2")
    left = tmp_path / "run" / "teacher_states"
    left.mkdir(exist_ok=True)
    (left / "rank_0_batch_000000.safetensors").write_bytes(b"of a killed process")
    monkeypatch.undo()
    assert results(run(tmp_path, "soft_or", "engine.phases=2")) == one_phase["soft_or"]
    assert not left.exists()


def bytes_of(tensors):
    return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors if t.numel()}.values())


class Sampler:
    """Stands for what samples: gives rollouts that are known, and writes down what is asked.

    It is vLLM where it knows what is on the device: then nothing may be.
    """

    def __init__(self, rollouts, told, held=lambda: (0, 0, 0, 0)):
        self.rollouts, self.told, self.held, self.weights, self.asleep = rollouts, told, held, {}, False

    def sample(self, prompts, decoding, vocab_size, seeds, advance):
        self.told.append("wake and sample" if self.asleep else "sample")
        self.asleep = False
        assert self.held() == (0, 0, 0, 0)
        return self.rollouts

    def sleep(self):
        self.told.append("sleep")
        self.asleep = True

    def take(self, named_weights, probe=None):
        self.told.append("take" if probe is None else "take and compare")
        self.asleep = False
        assert self.held() == (0, 0, 0, 0)  # on a GPU its memory is free for vLLM
        self.weights = {name: tensor.clone() for name, tensor in named_weights()}
        return 0.0


def parts(two, vllm):
    student, teacher = random_lm(1), random_lm(2, hidden=48, layers=3, name="teacher")
    phases = Phases(torch.device("cpu"), two, vllm)
    phases.add("student", student.model.parameters)
    head = set(teacher.head_scope.parameters())
    phases.add("teacher", lambda: [p for p in teacher.model.parameters() if p not in head], frozen=True)
    phases.add("teacher head", lambda: head, frozen=True)
    reference = engine_for(student)
    engine = type(reference)(student, reference.config, 10, phases.content)
    phases.add("optimizer", engine.moments)

    def held():
        body = [p for p in teacher.model.parameters() if p not in head]
        return tuple(bytes_of(t) for t in (student.model.parameters(), engine.moments(), body, head))

    return student, teacher, engine, phases, held


def test_a_phase_holds_what_it_needs_and_nothing_else():
    student, teacher, engine, phases, held = parts(True, False)
    whole = sum(p.nbytes for p in random_lm(1).model.parameters())
    body = sum(p.nbytes for p in random_lm(2, hidden=48, layers=3).model.parameters())
    head = 48 * 35 * 4
    seen = {}

    def enter(phase):
        phases.enter(phase)
        seen.setdefault(phase, []).append(held())

    assert held() == (0, 0, 0, 0)
    for step in (1, 2):
        enter("rollout")
        train_step(
            pair_of(student, teacher),
            engine,
            one_each(random_rollouts(student)),
            UniformWeighter(),
            step=step,
            seed=0,
            watch=Watch(student.device, enter),
        )
    assert seen["rollout"] == [(whole, 0, 0, 0), (whole, 0, 0, 0)]
    assert seen["teacher"] == [(0, 0, body - head, head), (0, 0, body - head, head)]
    # scoring and update of the first step, which makes the moments, and of the second
    assert seen["update"] == 2 * [(whole, 0, 0, head)] + 2 * [(whole, 2 * whole, 0, head)]
    assert all(p.data_ptr() != phases.host[p].data_ptr() for p in student.model.parameters())  # moved, here too
    phases.enter("teacher")
    with pytest.raises((RuntimeError, IndexError, ValueError)):  # never a silent answer from what is put away
        student.model(torch.zeros(1, 3, dtype=torch.long))
    phases.enter("update")
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        teacher.model(torch.zeros(1, 3, dtype=torch.long))


def test_one_phase_leaves_everything_where_it_is():
    _, _, _, phases, held = parts(False, False)
    before = held()
    for phase in ("rollout", "teacher", "update"):
        phases.enter(phase)
        assert held() == before and all(before[i] > 0 for i in (0, 2, 3))


def a_run(parts, sampler, *settings):
    """A run of the small models, as far as its updates need one."""
    student, teacher, engine, phases, _ = parts
    config = tiny_config("rollout.prompts_per_step=6", *settings)
    phases.sampler = sampler
    return build.Run(
        config=config,
        identity={},
        shared=None,
        pair=pair_of(student, teacher),
        teacher=teacher,
        engine=engine,
        sampler=sampler,
        phases=phases,
        weighter=UniformWeighter(),
        observer=None,
        prompts=[rollout.prompt for rollout in sampler.rollouts],
        benchmarks=[],
        dialogue=None,
        total_steps=10,
        record=None,
        grader=(grader := Grader()),
        verdicts=Verdicts(grader, student.tokenizer, False),
        stop=Stop(),
        step=0,
    )


def test_vllm_sleeps_before_the_teacher_comes_and_gets_the_new_weights_when_the_student_has_left(monkeypatch):
    made, plain_parts = parts(True, True), parts(False, False)
    student, _, engine, phases, held = made
    told, rollouts = [], random_rollouts(student)
    sampler = Sampler(rollouts, told, held)
    run = a_run(made, sampler, "rollout.engine=vllm", "engine.phases=2", "rollout.parity_every=2")
    plain = a_run(plain_parts, Sampler(rollouts, []))
    enter = phases.enter

    def recorded(phase):
        told.append(phase)
        enter(phase)

    monkeypatch.setattr(phases, "enter", recorded)
    train.send_weights(run)  # as at the beginning of a run
    assert all(torch.equal(sampler.weights[name], w) for name, w in plain.student.model.state_dict().items())
    for _ in range(2):
        train.update(run)
        train.update(plain)
    phases.enter("rollout")  # an evaluation: nothing was trained
    run.sampler.sample([], None, 35, [], None)
    phases.enter("teacher")
    phases.enter("rollout")
    run.sampler.sample([], None, 35, [], None)
    compared = ["update", "sleep", "rollout", "take and compare"]
    learned = ["rollout", "sample", "teacher", "sleep", *["update", "sleep"] * 3]  # scoring, update, and what follows
    evaluated = ["rollout", "sample", "teacher", "sleep", "rollout", "wake and sample"]
    assert told == [*compared, *learned, "rollout", "take", *learned, *compared, *evaluated]
    expected = plain.student.model.state_dict()
    assert sampler.weights.keys() == expected.keys() and "lm_head.weight" in expected
    assert all(torch.equal(sampler.weights[name], expected[name]) for name in expected)
    assert held() == (0, 0, 0, 0)
    # and a checkpoint can be written of what is put away
    assert all(torch.equal(engine.parameters_by_name()[name], expected[name]) for name in expected)
    moments = plain.engine.moments_by_name()
    assert engine.moments_by_name().keys() == moments.keys() and all(
        torch.equal(engine.moments_by_name()[n], moments[n]) for n in moments
    )


def test_a_cache_keeps_what_fits_and_reads_the_rest_back(tmp_path):
    g = torch.Generator().manual_seed(0)
    random.seed(0)
    states = [torch.randn(random.randint(1, 9), 16, generator=g).to(torch.bfloat16) for _ in range(12)]
    cache = Cache(sum(s.nbytes for s in states) // 2, tmp_path / "states")
    for one in states:
        cache.add(one)
    files = sorted((tmp_path / "states").iterdir())
    assert 0 < len(files) < len(cache) == 12 and cache.held <= cache.limit
    for _ in range(2):
        assert all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in zip(cache, states, strict=True))
    assert torch.equal(load_file(files[-1])["states"], states[-1])
    cache.clear()
    assert len(cache) == 0 and not (tmp_path / "states").exists()


def test_states_go_back_to_their_own_micro_batches(tmp_path):
    """The second use of a cache forgets the first."""
    teacher = random_lm(2, name="teacher")
    cache = Cache(2000, tmp_path / "states")
    for seed in (0, 1):
        batches = one_each(random_rollouts(teacher, seed=seed))
        assert LocalTeacher(teacher, cache).hidden_states(batches) is cache
        for batch, states in zip(batches, cache, strict=True):
            with torch.no_grad():
                assert torch.equal(states, teacher.hidden_states(batch, torch.arange(len(batch.token_ids))))


def test_a_full_disk_is_said_and_leaves_nothing(tiny_pair, tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"the first part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache, "save_file", full)
    with pytest.raises(
        RunError,
        match=r"above teacher.cache_gb and .*teacher_states.* cannot be written .*MiB are free.*make room, or raise",
    ):
        run(tmp_path, "soft_or", "teacher.cache_gb=0")
    assert not (tmp_path / "run" / "teacher_states").exists()


def test_the_teacher_is_loaded_when_the_student_has_left(tiny_pair, tmp_path, monkeypatch):
    students, seen = [], []
    load, open_teacher = models.load, build.open_teacher

    def loaded(section, device, name, *sharding):
        lm = load(section, device, name, *sharding)
        students.extend([lm] if name == "student" else [])
        return lm

    def teacher_loaded(*arguments):
        seen.append(bytes_of(students[-1].model.parameters()))
        return open_teacher(*arguments)

    monkeypatch.setattr(models, "load", loaded)
    monkeypatch.setattr(build, "open_teacher", teacher_loaded)
    for phases in (1, 2):
        run(
            tmp_path / str(phases),
            "all tokens",
            f"engine.phases={phases}",
            "optim.steps=1",
            "eval.benchmarks=[]",
            "eval.k=null",
        )
    assert seen[0] > 0 and seen[1] == 0


class Elsewhere:
    """A sampler with weights of its own, as vLLM is, that samples with transformers."""

    def __init__(self, lm, section, config, longest):
        self.own = replace(lm, model=copy.deepcopy(lm.model))
        if lm.model.get_input_embeddings().weight.numel() == 0:  # put away: vLLM reads the files
            self.own = models.load(section, torch.device("cpu"), "student")
        self.sample = TransformersSampler(self.own, 64).sample

    def sleep(self):
        pass

    close = sleep

    def take(self, named_weights, probe=None):
        self.own.model.load_state_dict(dict(named_weights()))
        return 0.0 if probe is None else self.check_parity(probe)

    def check_parity(self, probe):
        difference = (models.sequence_logprobs(self.own, probe.sequences) - probe.logprobs).abs().max().item()
        assert difference == 0
        return difference


def test_an_engine_with_weights_of_its_own_has_the_students_after_every_update(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "VllmSampler", Elsewhere)
    found = [
        results(
            run(
                tmp_path / str(phases),
                "soft_or",
                "rollout.engine=vllm",
                "rollout.parity_every=1",
                f"engine.phases={phases}",
            )
        )
        for phases in (1, 2)
    ]
    assert found[0] == found[1]
    assert [row["rollout/parity"] for row in found[0][0]] == [0] * 4


def test_what_looks_into_a_loss_that_is_not_finite_has_the_gradients_room(monkeypatch):
    student, teacher = random_lm(1), random_lm(2, name="teacher")
    engine = engine_for(student)
    with torch.no_grad():
        teacher.model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        train_step(
            pair_of(student, teacher),
            engine,
            one_each(random_rollouts(student)),
            UniformWeighter(),
            step=1,
            seed=0,
        )
    assert all(p.grad is None for p in student.model.parameters()) and not student.model.training


def test_a_model_that_is_put_away_still_knows_its_device_and_shapes_for_the_optimizer():
    student, *_ = parts(True, False)
    assert student.device == torch.device("cpu")
    engine = engine_for(student)
    dimensions = [{p.ndim for p in group["params"]} for group in engine.optimizer.param_groups]
    assert dimensions == [{2}, {1}]  # weight decay on matrices alone
    assert replace(student, name="x").head(35).size == 35
