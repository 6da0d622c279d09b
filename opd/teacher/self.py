"""A teacher that is the student: self-distillation (teacher.mode self).

The two differ by what they read (opd.privileged), and by the weights of the teacher:

    initial     those before update 1. The model is loaded from student.path a second time, so a run that continues has
                the same teacher
    live        the present ones, without a gradient
    ema         their exponential moving average over the updates, in float32, which is part of every checkpoint

The update asks LocalTeacher for all three. With live, student and teacher are one model, whose weights stay as they are
until the update's last backward pass is done.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from opd import models
from opd.config import Config
from opd.engine import Engine
from opd.models import LanguageModel


def averaged(config: Config, device: torch.device) -> LanguageModel:
    """A second student, which takes the average of its weights. Raises InputError as opd.models.load does."""
    lm = models.load(config.student, device, "student")  # float32 under autocast, as the student computes
    lm.model.requires_grad_(False)
    return replace(lm, name="teacher")


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
        for name, weight in self.engine.float32_weights():
            average = self.content(self.parameters[name])
            average.lerp_(weight.to(average.device), share)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter name, as CPU tensors."""
        return {name: self.content(average).cpu().contiguous() for name, average in self.parameters.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned. Raises KeyError when a parameter is missing."""
        for name, average in self.parameters.items():
            self.content(average).copy_(state[name])
