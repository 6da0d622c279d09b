"""A teacher that is the student: self-distillation (teacher.mode self).

The two differ by what they read (opd.privileged), and by the weights of the teacher:

    initial     those before update 1. The model is loaded from student.path a second time, so a run that continues has
                the same teacher
    live        the present ones, without a gradient
    ema         their exponential moving average over the updates, in float32, which is part of every checkpoint

The update asks LocalTeacher for all three. With live, student and teacher are one model, whose weights stay as they are
until the update's last backward pass is done.

Where ZeRO-3 splits the student, it splits the average in the same way. Each process averages its own part, and so no
process ever holds the whole average; only the LM head is whole, as that of every split teacher.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd import models
from opd.config import Config
from opd.engine import Engine
from opd.engine.deepspeed import own_part, splits_parameters, whole_parameters, writable_part
from opd.models import LanguageModel
from opd.teacher.local import load_split, load_teacher, renew_head


def open_teacher(
    config: Config, student: LanguageModel, device: torch.device, settings: Mapping[str, Any] | None = None
) -> LanguageModel:
    """The teacher's model at the beginning of a run. Raises InputError as opd.models.load does.

    Args:
        student: the model that teaches with teacher.weights live; no other teacher uses it.
        settings: those of DeepSpeed, where it trains the student.
    """
    weights = config.teacher.weights
    if weights == "live":
        return live(student)
    if weights == "initial" or weights is None:
        return load_teacher(config, device)
    # The average is float32 and computes under autocast, as the student does.
    if splits_parameters(settings):
        lm = load_split(config.student, device, "student", _average_settings(settings))
    else:
        lm = models.load(config.student, device, "student")
        lm.model.requires_grad_(False)
    return replace(lm, name="teacher")


def _average_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings for an average: split and placed as the student is, in float32, without an optimizer."""
    zero = {key: value for key, value in settings["zero_optimization"].items() if key != "offload_optimizer"}
    return {**settings, "zero_optimization": zero, "bf16": {"enabled": False}}


def live(student: LanguageModel) -> LanguageModel:
    """The student under the name of the teacher."""
    return replace(student, name="teacher")


class Average:
    """The exponential moving average of a student's weights, which are those of its teacher.

    Args:
        teacher: takes the average, which begins as the student is in float32. DeepSpeed rounds a bfloat16 student once.
        decay: a = decay a + (1 - decay) student, after every update.
        content: reads a tensor that may wait in host memory while another phase runs (opd.phases).
    """

    def __init__(
        self,
        teacher: LanguageModel,
        engine: Engine,
        decay: float,
        content: Callable[[Tensor], Tensor] = Tensor.detach,
    ):
        self.teacher = teacher
        self.parameters = dict(teacher.model.named_parameters())  # tied ones once
        self.engine, self.decay, self.content = engine, decay, content
        self._take(1.0)

    def follow(self) -> None:
        """Takes the student's weights in, once after an update. Every process calls it."""
        self._take(1 - self.decay)

    @torch.no_grad()
    def _take(self, share: float) -> None:
        for name, weight in self.engine.float32_parts():
            average = self._held(self.parameters[name])
            average.lerp_(weight.to(average.device), share)
        self._renew_head()

    def _held(self, parameter: torch.nn.Parameter) -> Tensor:
        """What this process holds of a parameter: all of it, or its part of a split one."""
        return writable_part(parameter) if self.teacher.sharded else self.content(parameter)

    def _renew_head(self) -> None:
        if self.teacher.sharded:
            renew_head(self.teacher)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name, as CPU tensors; of a split one, on the first process alone."""
        if self.teacher.sharded:
            return whole_parameters(self.parameters)
        return {name: self.content(average).cpu().contiguous() for name, average in self.parameters.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned, which each process reads whole. Raises KeyError for a missing parameter."""
        for name, average in self.parameters.items():
            tensor = own_part(state[name], average) if self.teacher.sharded else state[name]
            self._held(average).copy_(tensor)
        self._renew_head()
