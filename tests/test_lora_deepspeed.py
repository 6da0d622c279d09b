"""Real DeepSpeed on two CPU processes teaches adapters what the plain engine teaches them, in stages 0, 1 and 2."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import engine_for, random_lm, relative, tiny_config
from safetensors.torch import load_file
from test_deepspeed import SETTINGS, bytes_of, config_of, flat, in_two_processes, mine_of, same, updates, write_files

from opd import adapters, distributed, models
from opd.config import LoraSection
from opd.engine.deepspeed import DeepSpeedEngine
from opd.engine.zero_file import read_deepspeed
from opd.record import checkpoint
from tip.config import TipConfig
from tip.weighter import TipWeighter

CASES = [("zero0",), ("zero1",), ("zero2",), ("zero2_offload",)]
CASES += [(stage, "student.dtype=bfloat16") for stage in ("zero1", "zero2")]
LORA = LoraSection(4, 8.0, "all-linear")
UPDATES = 4
RATE = "optim.lr=1e-2"  # adapters have to move far, or rounding would be seen in what their own base teaches


def engine_of(folder, config, saved=None):
    """The engine of a fresh student with adapters, or of a checkpoint of one."""
    section, settings = replace(config.student, path=f"{folder}/student", lora=LORA), read_deepspeed(config)
    lm = models.load(replace(section, path=str(saved or section.path)), torch.device("cpu"), "student")
    if saved is None:
        adapters.add(lm.model, section, 5)
    return DeepSpeedEngine(lm, config, UPDATES, settings)


def learn(engine, mine, step):
    """An update by a larger teacher, and one by the model beneath the adapters."""
    weighter, larger = TipWeighter(TipConfig(rule="soft_or", retention=0.4)), random_lm(2, hidden=48, layers=3)
    beneath = replace(engine.student, name="teacher", scope=partial(adapters.without, engine.student.model))
    return [
        done
        for which, teacher in enumerate((larger, beneath))
        for done in updates(engine.student, engine, teacher, weighter, mine, [step + which])
    ]


def all_cases(rank, folder):
    """Two updates, a checkpoint and two more; and the two more from the checkpoint."""
    found = {}
    for stage, *more in CASES:
        config = config_of(folder, stage, *more, RATE)
        engine = engine_of(folder, config)
        kept = learn(engine, mine_of(rank), 1)
        saved = checkpoint.save(folder / "-".join((stage, *more)), 2, engine.student, engine, {}, 1)
        kept += learn(engine, mine_of(rank), 3)
        distributed.wait()
        again = engine_of(folder, config, saved)
        checkpoint.load_optimizer(saved, again)
        loaded = bytes_of(again)
        learn(again, mine_of(rank), 3)
        sent = {name: tensor.float().clone() for name, tensor in engine.named_weights()}
        found[stage, *more] = kept, bytes_of(engine), bytes_of(again), loaded, saved, sent
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_files(folder)
    in_two_processes(all_cases, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def plain():
    """The same updates by the plain engine, in this process alone."""
    lm = random_lm(1)
    adapters.add(lm.model, replace(tiny_config().student, lora=LORA), 5)
    engine = engine_for(lm, *SETTINGS, RATE)
    engine.total_steps = UPDATES
    kept = learn(engine, lambda i: True, 1) + learn(engine, lambda i: True, 3)
    return kept, bytes_of(engine), dict(engine.named_weights())


@pytest.mark.parametrize("case", [case for case in CASES if len(case) == 1], ids="-".join)
def test_two_processes_are_the_plain_engine(case, found, plain):
    kept, (parameters, moments), sent = plain
    for of_rank in found:
        for (loss, norm, weights), (other_loss, other_norm, others) in zip(kept, of_rank[case][0], strict=True):
            assert torch.equal(weights > 0, others > 0)  # token for token
            assert (other_loss, other_norm) == pytest.approx((loss, norm), rel=1e-4)
        assert of_rank[case][5].keys() == sent.keys()  # a sampler on every rank gets the whole merged model
        assert relative(flat(of_rank[case][5]), flat(sent)) < 1e-5
    ours = found[0][case][1]
    assert ours[0].keys() == parameters.keys() and ours[1].keys() == moments.keys()
    assert relative(flat(ours[0]), flat(parameters)) < 1e-4
    assert relative(flat(ours[1]), flat(moments)) < 1e-4
    assert found[1][case][1] == [{}, {}]  # what is gathered is the first rank's


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_checkpoint_continues_bit_for_bit(case, found):
    _, unbroken, continued, loaded, saved, _ = found[0][case]
    assert same(unbroken, continued)
    in_file = {name.replace(".default.", "."): tensor for name, tensor in loaded[0].items()}
    written = load_file(saved / adapters.WEIGHTS)
    assert {name.removeprefix("base_model.model.") for name in written} == in_file.keys()
    for name, tensor in written.items():  # float32, also where DeepSpeed computes with bfloat16 adapters
        assert tensor.dtype == torch.float32 and torch.equal(tensor, in_file[name.removeprefix("base_model.model.")])
    moved = [tensor for name, tensor in unbroken[0].items() if ".lora_B." in name]
    assert all(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in moved)
    assert not any((saved / "model.safetensors").parent.glob("model*.safetensors"))
