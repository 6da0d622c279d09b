"""Real DeepSpeed on two CPU processes gives the plain engine's student: every ZeRO stage, uneven and empty ranks."""

import json
import math
import multiprocessing
import os
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import engine_for, pair_of, random_lm, random_rollouts, relative, tiny_config, with_privileged
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd import distributed, models
from opd.batch import make_micro_batches
from opd.build import load_student
from opd.engine import deepspeed as deepspeed_engine
from opd.engine.deepspeed import DeepSpeedEngine
from opd.engine.zero_file import read_deepspeed
from opd.errors import InputError
from opd.hooks import TokenWeights, UniformWeighter
from opd.record import checkpoint
from opd.rollout import Decoding
from opd.rollout.local import TransformersSampler
from opd.step import train_step
from opd.teacher import local as local_teacher
from opd.teacher.self import Average, live, open_teacher
from tip.config import TipConfig
from tip.weighter import TipWeighter

UPDATES = 10
SETTINGS = ["optim.warmup_steps=3", "optim.lr=1e-3", "optim.weight_decay=0.1", "optim.grad_clip=0.5"]
RULES = {
    "all": UniformWeighter,
    "soft_or": lambda: TipWeighter(TipConfig(rule="soft_or", retention=0.4)),
    "running": lambda: TipWeighter(TipConfig(rule="soft_or", retention=0.4, scope="running")),
    "sampled": lambda: TipWeighter(TipConfig(rule="entropy_sampling", retention=0.4)),
    "mixture": lambda: TipWeighter(TipConfig(rule="total_variation", retention=0.4, mixture="total_variation")),
}
# how the rollouts of an update fall to the two ranks
SPLITS = {
    "uneven": lambda i: i % 3 == 0,
    "one rank empty": lambda i: False,
}
RESUMED = [
    ("zero0",),
    ("zero1",),
    ("zero2",),
    ("zero3",),
    ("zero3_offload",),
    ("zero1", "student.dtype=bfloat16"),
    ("zero2", "student.dtype=bfloat16"),
    ("zero3", "student.dtype=bfloat16"),
]
TEACHERS = [("sharded", "zero2", ""), ("sharded", "zero3", "_untied"), ("host", "zero3", "")]
WEIGHTS = {"live": ("teacher.weights=live",), "ema": ("teacher.weights=ema", "teacher.decay=0.8")}
HALF = ("student.dtype=bfloat16", "teacher.dtype=bfloat16")
SELF_TAUGHT = [
    ("zero2", "ema"),
    ("zero2", "ema", *HALF),
    ("zero3", "live"),
    ("zero3", "ema"),
    ("zero3", "ema", *HALF),
    ("zero3_usual", "ema"),
    ("zero3_offload", "ema"),
]
SELF = (
    "teacher.mode=self",
    "teacher.path=null",
    'data.teacher_prompt={"template": "{answer}", "role": "user", "missing": "error", "max_tokens": 40}',
)
# every parameter is split, the smallest too
SPLIT_ALL = {"stage": 3, "stage3_param_persistence_threshold": 0}
FILES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": SPLIT_ALL,
    "zero3_usual": {"stage": 3},  # all parameters of these models are small enough to stay whole between two uses
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3_offload": SPLIT_ALL | {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
CASES = [
    *[(stage, rule, "uneven") for stage in ("zero0", "zero2", "zero3") for rule in RULES],
    *[(stage, "soft_or", "one rank empty") for stage in ("zero0", "zero2", "zero3")],
    *[(stage, "soft_or", "uneven") for stage in ("zero1", "zero2_offload", "zero3_offload")],
]


class NothingAtTimes:
    """Keeps no token at all in every third update."""

    needs = frozenset()

    def __call__(self, stats, generator):
        return TokenWeights(weights=torch.full((len(stats.position),), float(stats.step % 3 > 0)))


RULES["nothing at times"] = NothingAtTimes
CASES += [(stage, "nothing at times", "uneven") for stage in ("zero0", "zero2", "zero3")]


def rollouts_of(step, lm):
    return random_rollouts(lm, count=7, seed=step)


def updates(lm, engine, teacher, weighter, mine, steps):
    """Kept tokens of every update, in the update's own order."""
    kept = []
    for step in steps:
        pair, share = pair_of(engine.student, teacher), [r for r in rollouts_of(step, lm) if mine(r.sequence_id)]
        batches = make_micro_batches(share, 40, 0, "keep", pair.packed_row)
        result = train_step(
            pair,
            engine,
            batches,
            weighter,
            step=step,
            seed=0,
        )
        kept.append((result.loss, result.metrics["optim/grad_norm"], result.weights.weights))
    return kept


def engine_of(folder, config, model="student"):
    settings = read_deepspeed(config)
    section = replace(config.student, path=f"{folder}/{model}")
    return DeepSpeedEngine(load_student(section, torch.device("cpu"), settings), config, UPDATES, settings)


def write_files(folder):
    long = {"max_position_embeddings": 4096, "std": 0.05}
    for lm, name in (
        (random_lm(1, **long), "student_long"),
        (random_lm(2, hidden=48, layers=3, **long), "teacher_long"),
    ):
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
    for untied in (False, True):
        models = (
            random_lm(1, tie_word_embeddings=not untied),
            random_lm(2, hidden=48, layers=3, tie_word_embeddings=not untied),
        )
        for lm, name in zip(models, ("student", "teacher"), strict=True):
            lm.model.save_pretrained(folder / f"{name}{'_untied' * untied}")
            lm.tokenizer.save_pretrained(folder / f"{name}{'_untied' * untied}")
    for name, zero in FILES.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))


def config_of(folder, stage, *more):
    return tiny_config("engine.kind=deepspeed", f"engine.deepspeed={folder}/{stage}.json", *SETTINGS, *more)


def work(rank, port, folder, task):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    task(rank, folder)
    distributed.wait()
    os._exit(0)  # as opd.cli does


def in_two_processes(task, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(["tests", ".", *([before] if before else [])])
    try:
        processes = [context.Process(target=work, args=(rank, port, folder, task)) for rank in (0, 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            assert process.exitcode == 0
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def mine_of(rank):
    return lambda i: (i % 3 == 0) == (rank == 1)


def bytes_of(engine):
    return [
        {n: v.clone() for n, v in tensors.items()}
        for tensors in (engine.parameters_by_name(), engine.moments_by_name())
    ]


def resumed(rank, folder):
    """Three updates, a checkpoint, two more; and the two more from the checkpoint. Beside it a teacher that is
    split."""
    found, sent = {}, {}
    teacher = random_lm(2, hidden=48, layers=3, name="teacher")
    for stage, *more in RESUMED:
        config = config_of(folder, stage, *more)
        engine = engine_of(folder, config)
        updates(engine.student, engine, teacher, UniformWeighter(), mine_of(rank), range(1, 4))
        saved = checkpoint.save(folder / stage / "-".join(more), 3, engine.student, engine, {}, 1)
        updates(engine.student, engine, teacher, UniformWeighter(), mine_of(rank), range(4, 6))
        distributed.wait()
        again = engine_of(folder, config, saved.relative_to(folder))
        checkpoint.load_optimizer(saved, again)
        loaded = bytes_of(again)
        updates(again.student, again, teacher, UniformWeighter(), mine_of(rank), range(4, 6))
        found[stage, *more] = bytes_of(engine), bytes_of(again), loaded, saved
        usual, deepspeed_engine.GATHERED = deepspeed_engine.GATHERED, 3000  # many buckets
        sent[stage, *more] = {name: value.clone() for name, value in again.named_weights()}
        deepspeed_engine.GATHERED = usual
    torch.save((found, sent), f"{folder}/resumed_{rank}.pt")


def self_taught(rank, folder):
    """Updates of a student that teaches itself, and the average of its weights, by hand too."""
    found = {}
    for stage, weights, *more in SELF_TAUGHT:
        config = config_of(folder, stage, *SELF, *WEIGHTS[weights], *more)
        engine, average = self_taught_pair(folder, config)
        hand = {n: v.double().clone() for n, v in engine.parameters_by_name().items()}
        losses = []
        for step in range(1, 4):
            losses.append(taught(engine, average, mine_of(rank), step))
            for name, parameter in engine.parameters_by_name().items():
                hand[name] = 0.8 * hand[name] + 0.2 * parameter.double()
        held = average.state() if average else {}
        found[stage, weights, *more] = engine.parameters_by_name(), held, hand, losses
    torch.save(found, f"{folder}/self_{rank}.pt")


def self_taught_pair(folder, config, model="student"):
    """An engine, and the average of its student's weights; None with weights "live"."""
    engine = engine_of(folder, config, model)
    if config.teacher.weights == "live":
        return engine, None
    start = replace(config, student=replace(config.student, path=f"{folder}/student"))
    teacher = open_teacher(start, engine.student, torch.device("cpu"), read_deepspeed(config))
    return engine, Average(teacher, engine, 0.8)


def taught(engine, average, mine, step):
    """One update on privileged prompts, taught by the average if there is one, else by the student; returns the
    loss."""
    teacher = average.teacher if average else live(engine.student)
    rollouts = [r for r in with_privileged(rollouts_of(step, teacher)) if mine(r.sequence_id)]
    batches = make_micro_batches(rollouts, 60, 0, "keep", engine.student.packed_row)
    pair = pair_of(engine.student, teacher)
    loss = train_step(pair, engine, batches, UniformWeighter(), step=step, seed=0).loss
    if average:
        average.follow()
    return loss


def resumed_average(rank, folder):
    """Two updates, a checkpoint and one more; and the one more from the checkpoint."""
    found = {}
    for stage in ("zero3", "zero3_usual"):
        config = config_of(folder, stage, *SELF, *WEIGHTS["ema"])
        engine, average = self_taught_pair(folder, config)
        assert average.teacher.sharded and all(p.numel() == 0 for p in average.teacher.model.parameters())
        for step in (1, 2):
            taught(engine, average, mine_of(rank), step)
        memory = {"teacher": average.state()}
        saved = checkpoint.save(folder / f"average_{stage}", 2, engine.student, engine, memory, 1)
        distributed.wait()
        again, other = self_taught_pair(folder, config, saved.relative_to(folder))
        checkpoint.load_optimizer(saved, again)
        other.load_state(checkpoint.load_average(saved))
        losses = [taught(e, a, mine_of(rank), 3) for e, a in ((engine, average), (again, other))]
        found[stage] = [(*bytes_of(e), a.state()) for e, a in ((engine, average), (again, other))], losses, saved
    torch.save(found, f"{folder}/average_{rank}.pt")


def in_bfloat16(rank, folder):
    """Far down a long sequence, where rounded rotary frequencies would be radians off; and what DeepSpeed knows of the
    head."""
    found = {}
    ids = torch.randint(1, 35, (1, 3000), generator=torch.Generator().manual_seed(0))
    for stage in ("zero1", "zero2", "zero3"):
        config = config_of(
            folder,
            stage,
            "student.dtype=bfloat16",
            f"teacher.path={folder}/teacher_long",
            "teacher.dtype=bfloat16",
            "teacher.placement=sharded",
        )
        engine, teacher = (
            engine_of(folder, config, "student_long"),
            local_teacher.load_teacher(config, torch.device("cpu")),
        )
        kinds = {b.dtype for lm in (engine.student, teacher) for n, b in lm.model.named_buffers() if "inv_freq" in n}
        with torch.no_grad():
            states = [
                lm.run(lambda lm=lm: lm.model.base_model(ids, use_cache=False).last_hidden_state[0, 2000:])
                for lm in (engine.student, teacher)
            ]
        kept = updates(engine.student, engine, teacher, UniformWeighter(), mine_of(rank), range(1, 4))
        whole = engine.engine.module
        assert engine.student.head_scope is whole.head_scope  # the one whose calls gather the head
        external = [len(m._external_params) for m in whole.modules() if "_external_params" in vars(m)]
        found[stage] = kinds, states, [k[:2] for k in kept], engine.parameters_by_name(), sum(external)
    torch.save(found, f"{folder}/bfloat16_{rank}.pt")


def with_split_teacher(rank, folder):
    plain = local_teacher.zero3_settings
    local_teacher.zero3_settings = lambda teacher: (
        plain(teacher)
        | {"zero_optimization": plain(teacher)["zero_optimization"] | {"stage3_param_persistence_threshold": 0}}
    )
    found = {}
    for placement, stage, untied in TEACHERS:
        config = config_of(
            folder,
            stage,
            f"teacher.path={folder}/teacher{untied}",
            f"teacher.placement={placement}",
            "engine.gradient_checkpointing=true",
        )
        engine = engine_of(folder, config, f"student{untied}")
        teacher = local_teacher.load_teacher(config, torch.device("cpu"))
        assert all(p.numel() == 0 for p in teacher.model.parameters()), "the teacher is not split"
        weighter = RULES["soft_or"]()
        kept = updates(engine.student, engine, teacher, weighter, mine_of(rank), range(1, 4))
        # generation in step with the other rank, although the responses end elsewhere
        prompts = [r.prompt for r in rollouts_of(1, random_lm(1))][: 5 + rank]
        seeds = [(0, i) for i in range(len(prompts))]
        responses = TransformersSampler(teacher, 2).sample(prompts[:5], Decoding(1.0, 1.0, 9), 35, seeds[:5])
        found[placement, stage, untied] = kept, engine.parameters_by_name(), [r.response_ids for r in responses]
    torch.save(found, f"{folder}/teacher_{rank}.pt")


def broken_loss(engine, factor):
    scope = engine.student.head_scope
    states = engine.model.base_model(torch.zeros(1, 3, dtype=torch.long)).last_hidden_state
    return factor * scope(states, lambda states: states.sum() + scope.weight.sum())


def refuses_what_is_not_finite(rank, folder):
    for stage in ("zero0", "zero1", "zero2", "zero3", "zero3_offload"):
        engine = engine_of(folder, config_of(folder, stage))
        before = bytes_of(engine)
        engine.start(1)
        engine.backward(
            engine.student.run(partial(broken_loss, engine, math.nan if rank == 1 else 1.0))
        )  # one rank's alone
        with pytest.raises(FloatingPointError, match="norm of the gradient"):
            engine.finish(apply=True)
        for now, then in zip(bytes_of(engine), before, strict=True):
            assert now.keys() == then.keys() and all(torch.equal(now[n], then[n]) for n in now)


def all_cases(rank, folder):
    found = {}
    for stage, rule, split in CASES:
        config = config_of(folder, stage)
        engine = engine_of(folder, config)
        student, teacher = engine.student, random_lm(2, hidden=48, layers=3, name="teacher")
        mine = SPLITS[split]
        kept = updates(
            student, engine, teacher, RULES[rule](), lambda i, m=mine: m(i) == (rank == 1), range(1, UPDATES + 1)
        )
        found[stage, rule, split] = kept, engine.parameters_by_name(), engine.moments_by_name()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    write_files(folder)
    in_two_processes(all_cases, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def plain():
    """The same updates by the plain engine, in this process alone."""
    found = {}
    for rule in RULES:
        student, teacher = random_lm(1), random_lm(2, hidden=48, layers=3, name="teacher")
        engine = engine_for(student, *SETTINGS)
        kept = updates(student, engine, teacher, RULES[rule](), lambda i: True, range(1, UPDATES + 1))
        found[rule] = kept, engine.parameters_by_name(), engine.moments_by_name()
    return found


def flat(tensors):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.filterwarnings("ignore:.*no token has weight")
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_are_the_plain_engine(case, both, plain):
    expected, weights, moments = plain[case[1]]
    for rank in (0, 1):
        for (loss, norm, kept), (other_loss, other_norm, other_kept) in zip(expected, both[rank][case][0], strict=True):
            assert torch.equal(kept > 0, other_kept > 0)  # token for token
            torch.testing.assert_close(other_kept, kept, rtol=1e-5, atol=1e-6)
            assert (other_loss, other_norm) == pytest.approx((loss, norm), rel=1e-5)
    found = both[0][case]
    assert both[1][case][1:] == ({}, {})  # what is gathered is the first rank's
    assert relative(flat(found[1]), flat({n: weights[n] for n in found[1]})) < 1e-5
    assert found[2].keys() == moments.keys()
    for key in ("exp_avg.", "exp_avg_sq.", "step."):
        ours = {n: v for n, v in found[2].items() if n.startswith(key)}
        assert relative(flat(ours), flat({n: moments[n] for n in ours})) < 1e-4, key


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    write_files(folder)
    return folder


def same(one, other):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(one, other, strict=True)
    )


def test_a_checkpoint_continues_bit_for_bit_and_on_another_number_of_processes(files):
    in_two_processes(resumed, files)
    found, sent = torch.load(files / "resumed_0.pt", weights_only=False)
    _, sent_by_other = torch.load(files / "resumed_1.pt", weights_only=False)
    for case, (unbroken, continued, loaded, saved) in found.items():
        assert same(unbroken, continued), case
        written = load_file(saved / "model.safetensors"), load_file(saved / "trainer/optimizer.safetensors")
        loaded[0].pop("lm_head.weight", None)  # tied
        assert same(loaded, written), case  # what is read is what was written, float32 beneath bfloat16 too
        assert json.loads((saved / "config.json").read_text())["dtype"] == "float32"
        assert checkpoint.processes_of(saved) == 2
        if len(case) == 1:  # the plain engine, in one process, goes on from it
            lm = models.load(replace(tiny_config().student, path=str(saved)), torch.device("cpu"), "student")
            engine = engine_for(lm, *SETTINGS)
            checkpoint.load_optimizer(saved, engine)
            teacher = random_lm(2, hidden=48, layers=3, name="teacher")
            updates(lm, engine, teacher, UniformWeighter(), lambda i: True, range(4, 6))
            assert relative(flat({n: engine.parameters_by_name()[n] for n in unbroken[0]}), flat(unbroken[0])) < 1e-5, (
                case
            )
    names = random_lm(1).model.state_dict().keys()
    assert "lm_head.weight" in names  # tied, and by its own name
    for case, weights in sent.items():  # what vLLM gets, on every rank
        kind = torch.bfloat16 if len(case) > 1 else torch.float32
        trained = found[case][0][0] | {"lm_head.weight": found[case][0][0]["model.embed_tokens.weight"]}
        for of_rank in (weights, sent_by_other[case]):
            assert of_rank.keys() == names
            assert all(torch.equal(of_rank[n], trained[n].to(kind)) for n in names), case
    # a bfloat16 weight would not move at this rate; the float32 copy does
    moved = found["zero2", "student.dtype=bfloat16"][0][0]
    assert all(
        value.dtype == torch.float32 and not torch.equal(value, value.bfloat16().float()) for value in moved.values()
    )


def test_a_student_teaches_itself_as_on_the_plain_engine(files):
    in_two_processes(self_taught, files)
    (found, other) = (torch.load(files / f"self_{rank}.pt") for rank in (0, 1))
    for case, (parameters, average, hand, losses) in found.items():
        stage, weights, *more = case
        assert losses == other[case][3] and min(losses) > 0.01
        if stage.startswith("zero3"):
            assert other[case][1] == {}  # what is gathered is the first rank's
        else:
            assert all(torch.equal(average[name], other[case][1][name]) for name in average)  # the same on both
        if weights == "ema":
            assert average.keys() == hand.keys()
            assert all(relative(tensor, hand[name]) < 1e-6 for name, tensor in average.items())
        if more:  # bfloat16: the average is of the float32 weights beneath, as the line above says
            assert losses == pytest.approx(found["zero2", "ema", *HALF][3], rel=1e-3)
            continue
        engine = engine_for(random_lm(1), *SETTINGS)
        mean = Average(random_lm(1, name="teacher"), engine, 0.8) if weights == "ema" else None
        for step in range(1, 4):
            assert losses[step - 1] == pytest.approx(taught(engine, mean, lambda i: True, step), rel=1e-5)
        plain = dict(engine.student.model.named_parameters())
        assert relative(flat({name: parameters[name] for name in plain}), flat(plain)) < 1e-5, case


def test_a_split_average_continues_bit_for_bit_and_on_one_process(files):
    in_two_processes(resumed_average, files)
    for stage, (ends, losses, saved) in torch.load(files / "average_0.pt", weights_only=False).items():
        assert same(*ends) and losses[0] == losses[1] and ends[0][2], stage
        written = load_file(saved / "trainer/teacher.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in written.values())
        # the plain engine, in one process, goes on from it
        lm = models.load(replace(tiny_config().student, path=str(saved)), torch.device("cpu"), "student")
        engine = engine_for(lm, *SETTINGS)
        checkpoint.load_optimizer(saved, engine)
        average = Average(random_lm(3, name="teacher"), engine, 0.8)
        average.load_state(checkpoint.load_average(saved))
        assert taught(engine, average, lambda i: True, 3) == pytest.approx(losses[0], rel=1e-5)
        assert relative(flat(average.state()), flat(ends[0][2])) < 1e-5, stage


def test_a_split_teacher_scores_and_samples_as_a_whole_one(files):
    in_two_processes(with_split_teacher, files)
    found = [torch.load(files / f"teacher_{rank}.pt") for rank in (0, 1)]
    for case in TEACHERS:
        tied = case[2] == ""
        student, teacher = (
            random_lm(1, tie_word_embeddings=tied),
            random_lm(2, hidden=48, layers=3, tie_word_embeddings=tied),
        )
        engine = engine_for(student, *SETTINGS)
        expected = updates(student, engine, teacher, RULES["soft_or"](), lambda i: True, range(1, 4))
        prompts = [r.prompt for r in rollouts_of(1, student)][:5]
        responses = TransformersSampler(teacher, 5).sample(
            prompts, Decoding(1.0, 1.0, 9), 35, [(0, i) for i in range(5)]
        )
        for rank in (0, 1):
            kept, weights, ids = found[rank][case]
            assert all(torch.equal(a[2], b[2]) for a, b in zip(kept, expected, strict=True))
            assert ids == [r.response_ids for r in responses]
        weights = found[0][case][1]
        assert relative(flat(weights), flat({n: engine.parameters_by_name()[n] for n in weights})) < 1e-5, case


@pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ,
    reason="torch 2.13 mixes instruction sets in bfloat16 attention when one is forced",
)
def test_bfloat16_stages_agree_also_far_down_a_long_sequence(files):
    in_two_processes(in_bfloat16, files)
    found = torch.load(files / "bfloat16_0.pt")
    ids = torch.randint(1, 35, (1, 3000), generator=torch.Generator().manual_seed(0))
    for n, name in enumerate(("student", "teacher")):
        model = AutoModelForCausalLM.from_pretrained(files / f"{name}_long", dtype=torch.bfloat16)
        with torch.no_grad():
            whole = model.base_model(ids, use_cache=False).last_hidden_state[0, 2000:]
        for stage in found:  # bit for bit but for how DeepSpeed multiplies split weights
            assert relative(found[stage][1][n], whole) < 0.01, (name, stage)
    start = load_file(files / "student_long/model.safetensors")
    start = flat({n: start[n] for n in found["zero2"][3]})
    for stage in ("zero1", "zero3"):
        kinds, _, kept, weights, external = found[stage]
        assert kinds == {torch.float32} and external == 0
        assert [x for k in kept for x in k] == pytest.approx([x for k in found["zero2"][2] for x in k], rel=0.02)
        moved, expected = flat(weights) - start, flat(found["zero2"][3]) - start
        assert relative(moved, expected) < 0.2, stage  # AdamW's first steps are the signs of gradients


def test_a_gradient_that_is_not_finite_on_one_rank_is_applied_on_none(files):
    in_two_processes(refuses_what_is_not_finite, files)


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion"}}, [], "optimizer is decided by optim.lr"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, [], "fp16 is decided by student.dtype"),
        (
            {"zero_optimization": {"stage": 2}, "gradient_clipping": 3},
            [],
            "gradient_clipping is decided by optim.grad_clip",
        ),
        ({"zero_optimization": {"stage": 2}, "pipeline": {}}, [], "pipeline is not used here"),
        ({}, [], "zero_optimization is null, expected an object with a stage from 0 to 3"),
        *[
            ({"zero_optimization": {"stage": stage}}, [], "expected an object with a stage from 0 to 3")
            for stage in (7, "2", "auto", True)
        ],
        ({"zero_optimization": {"stage": 2, "overlap": True}}, [], "zero_optimization.overlap is not used here"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, [], "overlap_comm needs stage 2 or 3"),
        ({"zero_optimization": {"stage": 3, "overlap_comm": None}}, [], "overlap_comm is null, expected true or false"),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}},
            [],
            'is "auto", expected a whole number',
        ),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, [], "offload_optimizer by an old name"),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            [],
            "moments are gathered over all processes",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            [],
            "expected 'cpu'",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            [],
            "offload_optimizer.ratio is not used here",
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, [], "offload_param needs stage 3"),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            [],
            "offload_optimizer needs stage 1, 2 or 3",
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, [], "it rounds weights on their way"),
        ({"zero_optimization": {"stage": 0}}, ["student.dtype=bfloat16"], "adds gradients up in bfloat16"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(content, more, words, tmp_path):
    (tmp_path / "file.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=words) as caught:
        read_deepspeed(config_of(tmp_path, "file", *more))
    assert str(tmp_path / "file.json") in str(caught.value)


@pytest.mark.parametrize("path", sorted(Path("configs/deepspeed").glob("*.json")), ids=lambda p: p.stem)
def test_every_file_is_one(path):
    settings = read_deepspeed(tiny_config("engine.kind=deepspeed", f"engine.deepspeed={path.stem}"))
    assert settings["zero_optimization"] == json.loads(path.read_text())["zero_optimization"]
    assert settings["zero_optimization"]["stage"] == int(path.stem[4]) and settings["bf16"] == {"enabled": False}


def test_a_split_or_hosted_teacher_needs_deepspeed():
    with pytest.raises(InputError, match=r"teacher.placement is 'host' and engine.kind is 'torch'"):
        tiny_config("teacher.placement=host")
