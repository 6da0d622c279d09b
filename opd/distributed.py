"""What a run needs from its other processes; in a single process each of these is the identity.

Statistics of all tokens meet on every rank, so that selection over the update is the same everywhere; gradients are
*summed*, because every rank already divides by the global sum of weights. Every rank calls these, whatever it kept.
What travels are tensors: nothing that comes from another process is unpickled.
"""

import datetime
import os
import socket
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

# A rank that waits for the slowest one's responses is not stuck. What ends a run whose process died is the launcher,
# and gloo's closed connection; this is left for a machine that vanished without a word.
PATIENCE = datetime.timedelta(hours=6)


def start(device: torch.device) -> None:
    """Joins the processes that a launcher started (RANK, WORLD_SIZE, ...); without a launcher, a group of one."""
    if dist.is_initialized():
        return
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # statistics meet on the CPU
    dist.init_process_group(backend, timeout=PATIENCE)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """The one process that writes files, evaluations' grades and the console."""
    return rank() == 0


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def wait() -> None:
    """Until every rank is here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU; a barrier would ask for a GPU


def gather_rows(columns: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], slice]:
    """Concatenates the rows of all ranks, in rank order.

    Args:
        columns: name -> (n, ...) CPU tensors, n of this rank's own; the same names, dtypes and widths on every rank.
    Returns:
        name -> (N, ...) of all ranks, and where this rank's rows stand in them.
    """
    if world_size() == 1:
        rows = len(next(iter(columns.values())))
        return dict(columns), slice(0, rows)
    mine = torch.tensor([len(next(iter(columns.values())))])
    counts = [torch.zeros_like(mine) for _ in range(world_size())]
    dist.all_gather(counts, mine)
    sizes = [int(count) for count in counts]
    joined = {}
    for name in sorted(columns):  # the same order everywhere
        column = columns[name]
        padded = column.new_zeros((max(sizes), *column.shape[1:]))
        padded[: len(column)] = column
        parts = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        joined[name] = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    start = sum(sizes[: rank()])
    return joined, slice(start, start + sizes[rank()])


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Adds the gradients of all ranks; a parameter without one counts as zeros."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def sum_number(value: float) -> float:
    return _reduced(value, dist.ReduceOp.SUM)


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    return _reduced(value, dist.ReduceOp.MAX)


def _reduced(value: float, operation: dist.ReduceOp) -> float:
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, op=operation)
    return total.item()


def from_first(text: str) -> str:
    """The first rank's text, everywhere."""
    if world_size() == 1:
        return text
    raw = text.encode() if is_first() else b""
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)
    joined, _ = gather_rows({"text": data})
    return joined["text"].numpy().tobytes().decode()


def from_first_of_machine(path: str) -> str:
    """The path, of up to 4,095 bytes, that the first process of this machine gives; all processes call it."""
    if world_size() == 1:
        return path
    raw = torch.zeros(1, 4096, dtype=torch.uint8)
    raw[0, : len(path.encode())] = torch.frombuffer(bytearray(path.encode()), dtype=torch.uint8) if path else 0
    joined, _ = gather_rows({"path": raw})
    first = rank() - int(os.environ.get("LOCAL_RANK", "0"))
    return joined["path"][first].numpy().tobytes().rstrip(b"\0").decode()
