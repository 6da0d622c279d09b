"""Engines: an engine holds the student's parameters and their optimizer, and applies an update.

`plain.py` is torch on one device. `deepspeed.py` is DeepSpeed's ZeRO on many devices, with the settings of
`zero_file.py`. Both run AdamW on float32 parameters with one learning-rate schedule and one clipping (`adamw.py`). Both
hand over parameters and moments by parameter name, so a checkpoint of one process continues on eight, and back.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from opd.models import LanguageModel


class Engine(Protocol):
    """What the update and the run ask of an engine. Every process of a run calls every method."""

    student: LanguageModel  # its forward passes go through this engine
    lockstep: bool  # True: the processes must make equally many backward passes, with or without kept tokens

    def start(self, step: int) -> float:
        """Prepares the backward passes of update `step`: training mode, no gradients. Returns its learning rate."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss, which is this process's part of a sum over all processes."""
        ...

    def finish(self, apply: bool) -> float:
        """Clips the gradient, steps, and returns the norm of the whole gradient before clipping.

        With `apply` False it drops the gradient, changes neither parameters nor moments, and returns 0.

        Raises:
            FloatingPointError: the norm is not finite; parameters and moments are unchanged.
        """
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter under every name that it has, for a sampler. A tied LM head comes under two names."""
        ...

    def float32_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the student once, in float32. Every process asks for all.

        They are whole on every process. Where the parameters are split, each process gets its own part, which is flat.
        """
        ...

    def parameters_by_name(self) -> dict[str, Tensor]:
        """The float32 parameters, as save_pretrained takes them; empty on all processes but the first."""
        ...

    def moments_by_name(self) -> dict[str, Tensor]:
        """AdamW's moments by `<moment>.<parameter name>`.

        It is empty before the first step, and on all processes but the first.
        """
        ...

    def load(self, moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Restores what the two methods above returned. Raises KeyError when a moment is missing."""
        ...
