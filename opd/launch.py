"""Starts a command on all GPUs.

    python -m opd.launch opd.train --config configs/qwen3_8b_to_4b.json [...]

With engine.kind "deepspeed" it starts one process per GPU of this machine. With another engine, or with one GPU, it
becomes `python -m opd.train ...` itself. NUM_GPUS sets the number of processes, on a machine without GPUs too. On
several machines the same command runs on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT. `torchrun` and
`deepspeed --no_local_rank` work as well; this launcher also picks the numbers, keeps the exit code, and says in one
line which process failed.
"""

import os
import signal
import sys
from argparse import ArgumentTypeError

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from opd.arguments import number_argument
from opd.cli import main
from opd.commands import COMMANDS
from opd.config import EngineSection, load_config
from opd.errors import InputError, Interrupted, RunError

MASTER_PORT = 29500
PATIENCE = 3600  # seconds that processes have after a signal to finish their update and write a checkpoint


def processes(engine: EngineSection) -> tuple[int, int]:
    """(processes on this machine, machines) of a run. Raises InputError for a variable that is no number."""
    if engine.kind == "torch":
        return 1, 1
    gpus = torch.cuda.device_count() if engine.device != "cpu" else 0
    here, machines = _number("NUM_GPUS", gpus or 1), _number("NNODES", 1)
    if gpus and here > gpus:
        raise InputError(f"NUM_GPUS is {here} and torch sees {gpus} GPUs. Lower NUM_GPUS, or unset it to use all.")
    return here, machines


def machine() -> int:
    """The number of this machine, from 0. Raises InputError when it is missing or too large."""
    machines, number = _number("NNODES", 1), _number("NODE_RANK", 0, least=0)
    if machines > 1 and ("NODE_RANK" not in os.environ or number >= machines):
        got = os.environ.get("NODE_RANK", "not set")
        raise InputError(
            f"NNODES is {machines} and NODE_RANK is {got}: give every machine its number, 0 to {machines - 1}."
        )
    return number


def pick_device(engine: EngineSection) -> torch.device:
    """The device of this process, as the config section `engine` says. It also sets the number of CPU threads.

    Raises InputError when the configured GPU is missing, or when the processes do not fit the GPUs.
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
    if engine.device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on import that it guesses the device
        return torch.device("cpu")
    if engine.kind == "torch":
        return torch.device("cuda")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        raise InputError(
            f"{here} processes on this machine, and torch sees {gpus} GPUs. Start as many processes as there are GPUs "
            "(NUM_GPUS)."
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _number(name: str, default: int, least: int = 1) -> int:
    """The whole number in an environment variable. Raises InputError for another value."""
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
    options, _ = COMMANDS["launch"].parser().parse_known_args(rest)
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
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}  # on one machine, at any free port
    if machines > 1:
        meeting = {
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{os.environ['MASTER_ADDR']}:{port}",
            "rdzv_configs": {"rank": machine(), "timeout": 900},
        }
    settings = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=here,
        run_id="opd",
        max_restarts=0,
        shutdown_timeout=PATIENCE,
        **meeting,
    )
    try:
        elastic_launch(settings, sys.executable)("-u", "-m", module, *rest)
    except SignalException as stop:
        raise Interrupted(int(stop.sigval)) from None
    except ChildFailedError as error:
        raise _explained(error) from None


def _explained(error: ChildFailedError) -> RunError | SystemExit:
    """The error that ends this process after one of its children failed."""
    # A process that was killed explains why the others lost their connections, so it goes first.
    killed = [
        r for r, failure in error.failures.items() if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
    ]
    rank = killed[0] if killed else error.get_first_failure()[0]
    pid, code = error.failures[rank].pid, error.failures[rank].exitcode
    if code == 2:
        return SystemExit(2)  # the process itself has said what is wrong with the input
    end = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return RunError(
        f"process {rank} (pid {pid}) {end}, so the others were stopped. Checkpoints are intact; the same command "
        "continues from the newest."
    )


if __name__ == "__main__":
    main(command)
