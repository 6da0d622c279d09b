"""What all engines share: AdamW on float32 parameters, its learning-rate schedule, and its moments by name."""

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from opd import adapters
from opd.config import Config
from opd.models import LanguageModel


def learning_rate(step: int, total_steps: int, lr: float, schedule: str, warmup_steps: int) -> float:
    """The rate of update `step`, which counts from 1: linear warm-up to `lr`, then constant or cosine.

    The cosine reaches 0 one update after the last. The rate depends on the step alone, so a run resumes without a saved
    schedule.
    """
    if step <= warmup_steps:
        return lr * step / warmup_steps
    if schedule == "constant":
        return lr
    progress = (step - 1 - warmup_steps) / (total_steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def prepare_model(student: LanguageModel, config: Config) -> dict[str, torch.nn.Parameter]:
    """Switches gradient checkpointing on where it is configured. Returns the trainable parameters by name."""
    if config.engine.gradient_checkpointing:
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapters.trained(student.model)


def make_adamw(parameters: Collection[Tensor], config: Config, sharded: bool = False) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, and none on norms and biases.

    torch's fused kernel needs a quarter of the time of its default on a CPU, and no memory beside the moments. With
    `sharded` the parameters are split by ZeRO-3, which keeps their shape in ds_shape.
    """
    dimensions = {p: len(p.ds_shape) if sharded else p.ndim for p in parameters}
    groups = [
        {"params": [p for p in parameters if dimensions[p] >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in parameters if dimensions[p] < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # DeepSpeed takes no empty one; adapters are matrices alone
    return torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=True)


def set_rate(optimizer: torch.optim.AdamW, config: Config, step: int, total_steps: int) -> float:
    """Gives the optimizer the learning rate of update `step`, and returns it."""
    optim = config.optim
    rate = learning_rate(step, total_steps, optim.lr, optim.schedule, optim.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def clip(parameters: Iterable[Tensor], config: Config) -> float:
    """Clips the gradient, and returns its norm before that. Raises FloatingPointError where it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.grad_clip).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the norm of the gradient is {norm}")
    return norm


def named_moments(optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments by `<moment>.<parameter name>`; the step counts are among them, as `step`."""
    return {
        f"{moment}.{name}": tensor
        for name, parameter in parameters.items()
        for moment, tensor in optimizer.state[parameter].items()
    }


def load_moments(optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
    """Restores what `named_moments` returned; a run that never stepped has none."""
    for name, parameter in parameters.items() if moments else ():
        optimizer.state[parameter] = {
            moment: moments[f"{moment}.{name}"].to(parameter.device) for moment in ("step", "exp_avg", "exp_avg_sq")
        }
