"""The update phase on two processes against one: the same recorded rollouts, real DeepSpeed, medians of paired repeats.

    PYTHONPATH=. python tests/benchmarks/bench_processes.py [--stages zero0,zero2,zero3] [--repeats 5]

Each repeat starts one process and two processes, one thread each, in turn; a figure is the median over repeats of the
ratio of their `time/update` (itself the median over the updates of the process group). A Qwen3 of 26 M parameters,
V = 32,768, 64 rollouts of 32 prompt and 64 response tokens, all tokens kept.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

UPDATES = 3


def make(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from data.tiny import task

    for name, hidden in (("student", 384), ("teacher", 512)):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=32768,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
            eos_token_id=0,
            pad_token_id=0,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        task.tokenizer().save_pretrained(folder / name)


def work(folder: Path, stage: str) -> None:
    """One process of a group: trains on its share and, if it is the first, prints the seconds of every update phase."""
    from opd import distributed
    from opd.batch import make_micro_batches, share_of_rank
    from opd.build import load_student
    from opd.config import LossSection, load_config
    from opd.data import Prompt, Rollout
    from opd.device import pick_device
    from opd.engine.deepspeed import DeepSpeedEngine
    from opd.engine.zero_file import read_deepspeed
    from opd.hooks import UniformWeighter
    from opd.step import Pair, train_step
    from opd.teacher.local import LocalTeacher, load_teacher

    config, _ = load_config(
        "configs/tiny.json",
        [
            "engine.kind=deepspeed",
            f"engine.deepspeed={stage}",
            f"student.path={folder}/student",
            f"teacher.path={folder}/teacher",
            "optim.warmup_steps=0",
            "optim.micro_batch_tokens=1536",
        ],
    )
    device = pick_device(config.engine)
    distributed.start(device)
    settings = read_deepspeed(config)
    student, teacher = load_student(config.student, device, settings), load_teacher(config, device)
    engine = DeepSpeedEngine(student, config, UPDATES, settings)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 32768, (64, 96), generator=g).tolist()
    rollouts = [Rollout(i, Prompt(str(i), tuple(x[:32]), "0"), tuple(x[32:]), "length") for i, x in enumerate(ids)]
    mine = share_of_rank(rollouts, distributed.rank(), distributed.world_size())
    batches = make_micro_batches(mine, config.optim.micro_batch_tokens, 0, "keep")
    loss = LossSection(divergence="reverse_kl", jsd_beta=0.5, chunk_bytes=2**26)
    pair, seconds = Pair(engine.student, LocalTeacher(teacher), 32768, loss), []
    for step in range(1, UPDATES + 1):
        distributed.wait()
        result = train_step(
            pair,
            engine,
            batches,
            UniformWeighter(),
            step=step,
            seed=0,
        )
        seconds.append(result.metrics["time/update"])
    if distributed.is_first():
        print(json.dumps(seconds[1:]))  # the first one allocates


def measure(folder: Path, stage: str, processes: int) -> float:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        __file__,
        "--folder",
        str(folder),
        "--stages",
        stage,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return statistics.median(json.loads(result.stdout.strip().splitlines()[-1]))


def main() -> None:
    cli = argparse.ArgumentParser()
    cli.add_argument("--stages", default="zero0,zero2,zero3")
    cli.add_argument("--repeats", type=int, default=5)
    cli.add_argument("--folder", type=Path)
    options = cli.parse_args()
    if options.folder:
        work(options.folder, options.stages)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        for stage in options.stages.split(","):
            pairs = [(measure(folder, stage, 1), measure(folder, stage, 2)) for _ in range(options.repeats)]
            ratios = sorted(one / two for one, two in pairs)
            ones, twos = zip(*pairs, strict=True)
            print(
                f"{stage}: 1 process {statistics.median(ones):.2f} s, 2 processes {statistics.median(twos):.2f} s, "
                f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
