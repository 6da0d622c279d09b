"""The plain engine: torch in one process, on one device."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from opd import distributed
from opd.config import Config
from opd.engine.adamw import clip, load_moments, make_adamw, named_moments, prepare_model, set_rate
from opd.models import LanguageModel


class TorchEngine:
    """Implements opd.engine.Engine. The parameters are float32, and autocast gives the compute dtype.

    Args:
        content: reads a tensor that may wait in host memory while another phase runs (opd.phases).
    """

    lockstep = False  # it skips a micro-batch without kept tokens

    def __init__(
        self,
        student: LanguageModel,
        config: Config,
        total_steps: int,
        content: Callable[[Tensor], Tensor] = Tensor.detach,
    ):
        self.student, self.config, self.total_steps, self.content = student, config, total_steps, content
        self.named_parameters = prepare_model(student, config)
        self.optimizer = make_adamw(self.named_parameters.values(), config)

    def start(self, step: int) -> float:
        self.student.model.train()  # gradient checkpointing asks for this mode; there is no dropout
        self.optimizer.zero_grad(set_to_none=True)
        return set_rate(self.optimizer, self.config, step, self.total_steps)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def finish(self, apply: bool) -> float:
        norm = 0.0
        if apply:
            distributed.sum_gradients(self.named_parameters.values())
            norm = clip(self.named_parameters.values(), self.config)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.model.eval()
        return norm

    def parameters_by_name(self) -> dict[str, Tensor]:
        return dict(self.named_weights())

    def float32_parts(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.named_parameters.items():
            yield name, self.content(parameter)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.student.model.state_dict(keep_vars=True).items():
            yield name, self.content(tensor)

    def moments_by_name(self) -> dict[str, Tensor]:
        moments = named_moments(self.optimizer, self.named_parameters)
        return {name: self.content(moment) for name, moment in moments.items()}

    def moments(self) -> list[Tensor]:
        """AdamW's moments. Its step counts are single numbers, which need no other place, so they are left out."""
        return [m for moments in self.optimizer.state.values() for name, m in moments.items() if name != "step"]

    def load(self, moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        load_moments(self.optimizer, self.named_parameters, moments)
