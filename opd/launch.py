"""Starts a command on all GPUs.

    python -m opd.launch opd.train --config configs/qwen3_8b_to_4b.json [...]

With engine.kind "deepspeed" that is one process per GPU of this machine; else, or where there is one GPU, it is
`python -m opd.train ...` itself. NUM_GPUS sets the number (without GPUs: of CPU processes). On several machines the
same command runs on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT. `torchrun` and `deepspeed
--no_local_rank` do as well; this one picks the numbers, keeps the exit code, and says in one line which process failed.
"""

import os
import signal
import sys
from argparse import ArgumentTypeError

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from opd.cli import main, number_argument, parser
from opd.config import EngineSection, load_config
from opd.errors import InputError, Interrupted, RunError

MASTER_PORT = 29500
PATIENCE = 3600  # seconds after a signal in which processes may finish their update and write a checkpoint


def processes(engine: EngineSection) -> tuple[int, int]:
    """(processes on this machine, machines) of a run. Raises InputError for what is no number."""
    if engine.kind == "torch":
        return 1, 1
    gpus = torch.cuda.device_count() if engine.device != "cpu" else 0
    here, machines = _number("NUM_GPUS", gpus or 1), _number("NNODES", 1)
    if gpus and here > gpus:
        raise InputError(f"NUM_GPUS is {here} and torch sees {gpus} GPUs. Lower NUM_GPUS, or unset it to use all.")
    return here, machines


def machine() -> int:
    """Which of the machines this is, from 0; the first one writes tables. Raises InputError for none of them."""
    machines, which = _number("NNODES", 1), _number("NODE_RANK", 0, least=0)
    if machines > 1 and ("NODE_RANK" not in os.environ or which >= machines):
        got = os.environ.get("NODE_RANK", "not set")
        raise InputError(
            f"NNODES is {machines} and NODE_RANK is {got}: give every machine its number, 0 to {machines - 1}."
        )
    return which


def pick_device(engine: EngineSection) -> torch.device:
    """The device of this process, by the config section engine; also sets the number of CPU threads.

    Raises InputError when a GPU is asked for and missing, or when the processes do not fit the GPUs.
    """
    if engine.kind == "torch" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "engine.kind 'torch' trains in one process, and WORLD_SIZE says there are more. Start it plainly, or set "
            "engine.kind=deepspeed and engine.deepspeed=zero2."
        )
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise InputError("engine.device is 'cuda' and torch sees no GPU. Set engine.device to 'auto' or 'cpu'.")
    if engine.cpu_threads is not None:
        torch.set_num_threads(engine.cpu_threads)
    if engine.device != "cpu" and torch.cuda.is_available():
        if engine.kind == "deepspeed":
            local, here = (int(os.environ.get(f"LOCAL_{name}", n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
            if here > torch.cuda.device_count():
                raise InputError(
                    f"{here} processes on this machine, and torch sees {torch.cuda.device_count()} GPUs. Start as many "
                    "processes as there are GPUs (NUM_GPUS)."
                )
            torch.cuda.set_device(local)
            return torch.device("cuda", local)
        return torch.device("cuda")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, warns that it guessed
    return torch.device("cpu")


def _number(name: str, default: int, least: int = 1) -> int:
    text = os.environ.get(name, str(default))
    try:
        return number_argument(least)(text)
    except ArgumentTypeError:
        raise InputError(f"{name} is {text[:80]!r}, expected a whole number from {least}.") from None


def command(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        raise InputError(
            "no module named. Usage: python -m opd.launch MODULE --config FILE [...], for example opd.train."
        )
    module, rest = arguments[0], arguments[1:]
    options, _ = parser("python -m opd.launch", "Starts a command on all GPUs.").parse_known_args(rest)
    config, _ = load_config(options.config, options.overrides, ignore_extensions=True)
    here, machines = processes(config.engine)
    if here * machines == 1 or "--dry-run" in rest:
        os.execv(sys.executable, [sys.executable, "-m", module, *rest])
    if machines > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"NNODES is {machines} and MASTER_ADDR is not set. Set it to the first machine's address, on all."
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here)))
    port = _number("MASTER_PORT", MASTER_PORT)
    where = (
        {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}  # any free port
        if machines == 1
        else {
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{os.environ['MASTER_ADDR']}:{port}",
            "rdzv_configs": {"rank": machine(), "timeout": 900},
        }
    )
    settings = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=here,
        run_id="opd",
        max_restarts=0,
        shutdown_timeout=PATIENCE,
        **where,
    )
    try:
        elastic_launch(settings, sys.executable)("-u", "-m", module, *rest)
    except SignalException as stop:
        raise Interrupted(int(stop.sigval)) from None
    except ChildFailedError as error:
        # who was killed explains the others, which only lost the connection
        killed = [r for r, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
        rank = killed[0] if killed else error.get_first_failure()[0]
        failure = error.failures[rank]
        if failure.exitcode == 2:
            sys.exit(2)  # it has said what is wrong with the input
        how = (
            f"was killed by signal {-failure.exitcode}"
            if failure.exitcode < 0
            else f"ended with code {failure.exitcode}"
        )
        raise RunError(
            f"process {rank} (pid {failure.pid}) {how}, so the others were stopped. Checkpoints are intact; the same "
            "command continues from the newest."
        ) from None


if __name__ == "__main__":
    main(command)
