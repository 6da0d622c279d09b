"""The plain engine: torch on one device."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from opd import distributed
from opd.config import Config
from opd.engine.adamw import load_moments, make_adamw, moments_by_name, set_rate
from opd.models import LanguageModel


class TorchEngine:
    """The engine of one device. The student's parameters are float32; autocast gives the compute dtype.

    Args:
        value: gives a tensor's content where the tensor itself may be put away in host memory (opd.phases).
    """

    lockstep = False  # a micro-batch without kept tokens need not be run

    def __init__(
        self,
        student: LanguageModel,
        config: Config,
        total_steps: int,
        value: Callable[[Tensor], Tensor] = Tensor.detach,
    ):
        self.student = student
        self.value = value
        self.config = config
        self.total_steps = total_steps
        model = student.model
        if config.engine.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.named_parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_adamw(self.named_parameters.values(), config)

    def start(self, step: int) -> float:
        self.student.model.train()  # checkpointing asks for it; there is no dropout
        self.optimizer.zero_grad(set_to_none=True)
        return set_rate(self.optimizer, self.config, step, self.total_steps)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def finish(self, apply: bool) -> float:
        norm = 0.0
        if apply:
            distributed.sum_gradients(self.named_parameters.values())
            norm = torch.nn.utils.clip_grad_norm_(self.named_parameters.values(), self.config.optim.grad_clip).item()
            if not math.isfinite(norm):
                raise FloatingPointError(f"the norm of the gradient is {norm}")
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.model.eval()
        return norm

    def weights(self) -> dict[str, Tensor]:
        return dict(self.named_weights())

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.student.model.state_dict(keep_vars=True).items():
            yield name, self.value(tensor)

    def state(self) -> dict[str, Tensor]:
        moments = moments_by_name(self.optimizer, self.named_parameters)
        return {name: self.value(moment) for name, moment in moments.items()}

    def moments(self) -> list[Tensor]:
        """AdamW's moments as they lie on the device; its step counts always lie in host memory."""
        return [m for state in self.optimizer.state.values() for key, m in state.items() if key != "step"]

    def load(self, moments: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        load_moments(self.optimizer, self.named_parameters, moments)
