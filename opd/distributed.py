"""Communication between the processes of a run. In a single process each function returns its argument.

The statistics of all tokens meet on every process, so that the selection over an update is the same everywhere.
Gradients are *summed*, because every process already divides by the global sum of weights. Every process calls each of
these functions, even one that kept no token. Only tensors travel, so nothing from another process is unpickled.
"""

import datetime
import os
import socket
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

# This time limit is for a machine that vanishes silently, and it is long because a process that waits for the slowest
# one's responses is not stuck. When a process dies, the launcher or gloo's closed connection ends the run at once.
PATIENCE = datetime.timedelta(hours=6)


def start(device: torch.device) -> None:
    """Joins the group of the processes that a launcher started. Without a launcher it makes a group of one.

    A launcher sets the environment variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    if dist.is_initialized():
        return
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # statistics meet on the CPU
    dist.init_process_group(backend, timeout=PATIENCE)


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this is the one process that writes files, grades evaluations and speaks on the console."""
    return rank() == 0


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process is gone."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def wait() -> None:
    """Waits until every process is here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, where dist.barrier would ask for a GPU


def gather_rows(columns: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], slice]:
    """Concatenates the rows of all processes, in the order of their ranks.

    Args:
        columns: name -> (n, ...) CPU tensor, with as many rows as this process has. The names, dtypes and widths are
            the same on every process.
    Returns:
        name -> (N, ...) tensor of all processes, and the place of this process's rows in it.
    """
    rows = len(next(iter(columns.values())))
    if world_size() == 1:
        return dict(columns), slice(0, rows)
    counts = [torch.zeros(1, dtype=torch.long) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([rows]))
    sizes = [int(count) for count in counts]
    joined = {}
    for name, column in sorted(columns.items()):  # in the same order on every process
        padded = column.new_zeros((max(sizes), *column.shape[1:]))
        padded[: len(column)] = column
        parts = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        joined[name] = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    before = sum(sizes[: rank()])
    return joined, slice(before, before + rows)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Adds up the gradients of all processes. A parameter without a gradient counts as zeros."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def sum_number(number: float) -> float:
    """The sum of the numbers of all processes, added in float64."""
    return _reduced(number, dist.ReduceOp.SUM)


def largest(number: float) -> float:
    """The largest of the numbers of all processes."""
    return _reduced(number, dist.ReduceOp.MAX)


def _reduced(number: float, operation: dist.ReduceOp) -> float:
    if world_size() == 1:
        return number
    result = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(result, op=operation)
    return result.item()


def from_first(text: str) -> str:
    """The text of the first process, on every process."""
    return _texts(text)[0]


def from_first_of_machine(text: str) -> str:
    """The text of the first process of this machine, on all processes of the machine."""
    return _texts(text)[rank() - int(os.environ.get("LOCAL_RANK", "0"))]


def _texts(text: str) -> list[str]:
    """The texts of all processes, by rank. None of them holds a null character, which ends each on the way."""
    if world_size() == 1:
        return [text]
    joined, _ = gather_rows({"text": torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)})
    return joined["text"].numpy().tobytes().decode().split("\0")
