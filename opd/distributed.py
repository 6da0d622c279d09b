"""What a process of a run exchanges with the others. In a single process every function returns what it was given.

The statistics of all tokens meet on every rank, so that every rank makes the same selection. Gradients are *summed*,
because every rank already divides by the global sum of weights. Every rank calls every function, whatever it kept. Only
tensors travel, and nothing from another process is unpickled.
"""

import datetime
import os
import socket
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

# A rank may wait long for the responses of the slowest one. The launcher, or gloo's closed connection, ends a run whose
# process has died, so this limit only matters when a machine vanishes without a word.
PATIENCE = datetime.timedelta(hours=6)


def start(device: torch.device) -> None:
    """Joins the processes that a launcher started, which set RANK, WORLD_SIZE and so on; else makes a group of one."""
    if dist.is_initialized():
        return
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # statistics are gathered on the CPU
    dist.init_process_group(backend, timeout=PATIENCE)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files, grades evaluations and prints."""
    return rank() == 0


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has ended."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def wait() -> None:
    """Waits until every rank has called this."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # a barrier would need a GPU where there is one


def gather_rows(columns: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], slice]:
    """Concatenates the rows of all ranks, in the order of ranks.

    Args:
        columns: name -> (n, ...) CPU tensor, with n rows of this rank. Names, dtypes and widths are the same on every
            rank.
    Returns:
        name -> (N, ...) tensor with the rows of all ranks, and the slice that holds the rows of this rank.
    """
    count = len(next(iter(columns.values())))
    if world_size() == 1:
        return dict(columns), slice(0, count)
    counts = [torch.zeros(1, dtype=torch.long) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([count]))
    sizes = [int(size) for size in counts]
    joined = {}
    for name in sorted(columns):  # every rank gathers in the same order
        padded = columns[name].new_zeros((max(sizes), *columns[name].shape[1:]))
        padded[:count] = columns[name]
        parts = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        joined[name] = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    before = sum(sizes[: rank()])
    return joined, slice(before, before + count)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces every gradient by its sum over all ranks; a parameter without a gradient counts as zeros."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def sum_number(number: float) -> float:
    """The sum over all ranks, in float64."""
    return _reduced(number, dist.ReduceOp.SUM)


def largest(number: float) -> float:
    """The largest number of all ranks."""
    return _reduced(number, dist.ReduceOp.MAX)


def _reduced(number: float, operation: dist.ReduceOp) -> float:
    if world_size() == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(total, op=operation)
    return total.item()


def from_first(text: str) -> str:
    """The text of the first rank, on every rank."""
    if world_size() == 1:
        return text
    joined, _ = gather_rows({"text": _bytes_of(text if is_first() else "")})
    return joined["text"].numpy().tobytes().decode()


def from_first_of_machine(path: str) -> str:
    """The path of the first process of this machine, on every process of it; at most 4,095 bytes."""
    if world_size() == 1:
        return path
    encoded, row = _bytes_of(path), torch.zeros(1, 4096, dtype=torch.uint8)
    row[0, : len(encoded)] = encoded
    joined, _ = gather_rows({"path": row})
    first = rank() - int(os.environ.get("LOCAL_RANK", "0"))
    return joined["path"][first].numpy().tobytes().rstrip(b"\0").decode()


def _bytes_of(text: str) -> Tensor:
    """The UTF-8 bytes of a text as uint8; torch.frombuffer refuses an empty buffer."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
