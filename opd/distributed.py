"""What the training step needs from the other processes; in a single process each of these is the identity.

Statistics of all tokens meet on every rank, so that selection over the update is the same everywhere; gradients are
*summed*, because every rank already divides by the global sum of weights. Every rank calls these, whatever it kept.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


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
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()
