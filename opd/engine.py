"""Plain torch on one device: float32 weights, AdamW, learning-rate schedule, clipping, gradient checkpointing."""

import math
import os

import torch
from torch import Tensor

from opd import distributed
from opd.cli import InputError
from opd.config import Config, Engine
from opd.models import LanguageModel


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


def pick_device(engine: Engine) -> torch.device:
    """The device of config section engine; sets the CPU threads. Raises InputError when cuda is asked for and missing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "engine.kind 'torch' trains in one process, and WORLD_SIZE says there are more. Start it plainly."
        )
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise InputError("engine.device is 'cuda' and torch sees no GPU. Set engine.device to 'auto' or 'cpu'.")
    if engine.cpu_threads is not None:
        torch.set_num_threads(engine.cpu_threads)
    if engine.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, warns that it guessed
    return torch.device("cpu")


class TorchEngine:
    """Owns the student's optimizer. The student's parameters are float32; autocast gives the compute dtype."""

    def __init__(self, student: LanguageModel, config: Config, total_steps: int):
        self.student = student
        self.config = config
        self.total_steps = total_steps
        model = student.model
        if config.engine.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.named_parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.named_parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.named_parameters.values() if p.ndim < 2]  # norms and biases: no decay
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.optim.lr,
            betas=config.optim.betas,
        )

    def start(self, step: int) -> float:
        """Before the backward passes of update `step`: training mode, no gradients, this update's learning rate."""
        self.student.model.train()  # checkpointing asks for it; there is no dropout
        self.optimizer.zero_grad(set_to_none=True)
        optim = self.config.optim
        rate = learning_rate(step, self.total_steps, optim.lr, optim.schedule, optim.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def finish(self, apply: bool, divisor: float = 1.0) -> float:
        """Divides the gradient, clips and steps; returns the norm of the whole gradient before clipping.

        `apply` False changes nothing.

        Raises FloatingPointError, with weights and moments unchanged, when the norm is not finite.
        """
        norm = 0.0
        if apply:
            distributed.sum_gradients(self.named_parameters.values())
            if divisor != 1:
                torch._foreach_div_([p.grad for p in self.named_parameters.values() if p.grad is not None], divisor)
            norm = torch.nn.utils.clip_grad_norm_(self.named_parameters.values(), self.config.optim.grad_clip).item()
            if not math.isfinite(norm):
                raise FloatingPointError(f"the norm of the gradient is {norm}")
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.model.eval()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Optimizer moments by `<moment>.<parameter name>`."""
        return {
            f"{key}.{name}": value
            for name, parameter in self.named_parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned. Raises KeyError when a moment is missing (a run that never stepped has none)."""
        for name, parameter in self.named_parameters.items():
            if state:
                self.optimizer.state[parameter] = {
                    key: state[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
