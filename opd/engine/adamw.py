"""AdamW on float32 weights, its learning-rate schedule, and its moments by parameter name. All engines share it."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from opd.config import Config


def learning_rate(step: int, total_steps: int, lr: float, schedule: str, warmup_steps: int) -> float:
    """Rate of update `step` (from 1): linear warm-up to `lr`, then constant, or a cosine that reaches 0 after the last.

    A function of the step alone, so resuming needs no scheduler state.
    """
    if step <= warmup_steps:
        return lr * step / warmup_steps
    if schedule == "constant":
        return lr
    progress = (step - 1 - warmup_steps) / (total_steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_adamw(
    parameters: Collection[Tensor], config: Config, sharded: bool = False, fused: bool | None = None
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone. What ZeRO-3 has split keeps its dimensions in ds_shape."""
    dimensions = {p: len(p.ds_shape) if sharded else p.ndim for p in parameters}
    matrices = [p for p in parameters if dimensions[p] >= 2]
    vectors = [p for p in parameters if dimensions[p] < 2]  # norms and biases
    groups = [
        {"params": matrices, "weight_decay": config.optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=fused)


def set_rate(optimizer: torch.optim.AdamW, config: Config, step: int, total_steps: int) -> float:
    optim = config.optim
    rate = learning_rate(step, total_steps, optim.lr, optim.schedule, optim.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def moments_by_name(optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_moments(optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if moments:  # a run that never stepped has none
            optimizer.state[parameter] = {
                key: moments[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
