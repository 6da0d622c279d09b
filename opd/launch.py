"""Starts a command on all GPUs.

    python -m opd.launch opd.train --config configs/qwen3_8b_to_4b.json [...]

With engine.kind "deepspeed" it starts one process per GPU of this machine. With another engine, or with one GPU, it
becomes `python -m opd.train ...` itself. NUM_GPUS sets the number of processes, on a machine without GPUs too. On
several machines the same command runs on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT. `torchrun` and
`deepspeed --no_local_rank` work as well; this launcher also picks the numbers, keeps the exit code, and says in one
line which process failed.
"""

import os
import sys
from argparse import ArgumentTypeError

from opd.arguments import number_argument
from opd.cli import main
from opd.commands import COMMANDS
from opd.config import EngineSection, load_config
from opd.errors import InputError

MASTER_PORT = 29500


def processes(engine: EngineSection) -> tuple[int, int]:
    """(processes on this machine, machines) of a run. Raises InputError for a variable that is no number."""
    if engine.kind == "torch":
        return 1, 1
    gpus = 0
    if engine.device != "cpu":
        import torch  # slow to import, and a run of one process does not need it here

        gpus = torch.cuda.device_count()
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
    from opd import group  # slow to import, and a run of one process does not need it

    group.run([module, *rest], machines, here, meeting)


if __name__ == "__main__":
    main(command)
