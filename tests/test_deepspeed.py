"""Real DeepSpeed on two CPU processes gives the plain engine's student: every ZeRO stage, uneven and empty ranks."""

import json
import multiprocessing
import os
import socket
from dataclasses import replace

import pytest
import torch
from helpers import LOSS, engine_for, random_lm, random_rollouts, relative, tiny_config

from opd import distributed
from opd.batch import make_micro_batches
from opd.engine import DeepSpeedEngine, load_student, read_deepspeed
from opd.hooks import TokenWeights, UniformWeighter
from opd.step import train_step
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
# every parameter is split, the smallest too
SPLIT_ALL = {"stage": 3, "stage3_param_persistence_threshold": 0}
FILES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": SPLIT_ALL,
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
        batches = make_micro_batches([r for r in rollouts_of(step, lm) if mine(r.sequence_id)], 40, 0, "keep")
        result = train_step(student=engine.student, teacher=teacher, engine=engine, micro_batches=batches, weighter=weighter,
                            loss=LOSS, vocab_size=35, step=step, seed=0)  # fmt: skip
        kept.append((result.loss, result.metrics["optim/grad_norm"], result.weights.weights))
    return kept


def engine_of(folder, config, model="student"):
    settings = read_deepspeed(config)
    section = replace(config.student, path=f"{folder}/{model}")
    return DeepSpeedEngine(load_student(section, torch.device("cpu"), settings), config, UPDATES, settings)


def write_files(folder):
    student = random_lm(1)
    student.model.save_pretrained(folder / "student")
    student.tokenizer.save_pretrained(folder / "student")
    for name, zero in FILES.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))


def config_of(folder, stage, *more):
    return tiny_config("engine.kind=deepspeed", f"engine.deepspeed={folder}/{stage}.json", *SETTINGS, *more)


def work(rank, port, folder, task):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      DS_ACCELERATOR="cpu")  # fmt: skip
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    task(rank, folder)
    distributed.wait()


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
        found[stage, rule, split] = kept, engine.weights(), engine.state()
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
        found[rule] = kept, engine.weights(), engine.state()
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
