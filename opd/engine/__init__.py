"""Engines: what holds the student's weights and its optimizer, and applies an update.

`plain.py` is torch on one device, `deepspeed.py` is DeepSpeed's ZeRO on many. `zero_file.py` reads its settings.
Both are AdamW on float32 weights with one learning-rate schedule and one clipping (`adamw.py`), and both keep their
state by parameter name. So a checkpoint that one process wrote continues on eight, and the other way round.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from opd.models import LanguageModel


class Engine(Protocol):
    """What the update and the run ask of an engine. Every process of a run calls every method."""

    student: LanguageModel  # the student whose forward passes go through this engine
    lockstep: bool  # True: the processes must make equally many backward passes, with or without kept tokens

    def start(self, step: int) -> float:
        """Prepares the backward passes of update `step`: training mode, no gradients. Returns its learning rate."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss, which is this process's part of a sum over all processes."""
        ...

    def finish(self, apply: bool) -> float:
        """Clips the gradient and steps; returns the norm of the whole gradient before clipping.

        With `apply` False it drops the gradient: weights and moments stay as they are, and the norm is 0.

        Raises FloatingPointError, with weights and moments unchanged, when the norm is not finite.
        """
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under every name it has: a tied LM head comes under its own name too. For a sampler."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The float32 weights by name, as save_pretrained takes them; on the first process, elsewhere empty."""
        ...

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments by `<moment>.<parameter name>`, on the first process; empty before the first step."""
        ...

    def load(self, moments: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Restores what `state` and `weights` returned. Raises KeyError when a moment is missing."""
        ...
