"""Two phases on one GPU: which models lie on the device in each part of an update, while the others wait.

A student of P parameters trains in 16 P bytes, its gradients included. A bfloat16 teacher needs 2 bytes a parameter,
and vLLM takes the rest for its cache. They seldom fit together. But an update never needs all of them at once, so with
engine.phases = 2 the others wait in host memory:

    rollout     vLLM with its weights and cache; without vLLM, the student's weights
    teacher     the teacher; its hidden states go to host memory (opd.teacher.cache)
    update      student, gradients and optimizer; and the teacher's LM head, which projects the hidden states

With engine.phases = 1 the models stay on the device, and only vLLM sleeps while the student learns. On a CPU the same
code copies a tensor to another buffer and releases the original, so that its use in a wrong phase fails.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from opd.rollout import Sampler

RESIDENTS = {  # phase -> whose tensors are on the device; vLLM has parameters of its own
    "rollout": {"student"},
    "rollout on vLLM": set(),
    "teacher": {"teacher", "teacher head"},
    "teacher that is the student": {"student"},
    "update": {"student", "optimizer", "teacher head"},
}


class Phases:
    """Moves student, optimizer and teacher to the device and back, and lets the sampler sleep.

    Args:
        device: the device that they compute on.
        two: whether engine.phases is 2; if not, tensors stay where they are.
        vllm: whether rollout.engine is "vllm".
        shared: whether student and teacher are one model.
    """

    def __init__(self, device: torch.device, two: bool, vllm: bool, shared: bool = False):
        self.device, self.two, self.vllm, self.shared = device, two, vllm, shared
        self.tensors: dict[str, Callable[[], Iterable[Tensor]]] = {}  # resident -> its tensors
        self.host: dict[Tensor, Tensor] = {}  # tensor on the device -> its buffer in host memory, which is made once
        self.away: set[str] = set()  # residents in host memory
        self.frozen: set[str] = set()  # residents whose buffers stay right
        self.sampler: Sampler | None = None  # it sleeps outside of the rollout phase

    def add(self, resident: str, tensors: Callable[[], Iterable[Tensor]], frozen: bool = False) -> None:
        """Takes charge of the tensors of "student", "optimizer", "teacher" or "teacher head".

        With two phases they go to host memory at once. `frozen` ones never change, and are copied there once.
        """
        self.tensors[resident] = tensors
        self.frozen |= {resident} if frozen else set()
        if self.two:
            self._put_away(resident)

    def enter(self, phase: str) -> None:
        """Prepares the device for "rollout", "teacher" or "update": tensors leave it first, and then others come.

        The sampler wakes by itself when it gets parameters or is asked for responses.
        """
        names = {"rollout": "rollout on vLLM"} if self.vllm else {}
        names |= {"teacher": "teacher that is the student"} if self.shared else {}
        wanted = RESIDENTS[names.get(phase, phase)]
        if self.sampler is not None and phase != "rollout":
            self.sampler.sleep()
        if self.two:
            for resident in self.tensors.keys() - self.away - wanted:
                self._put_away(resident)
            for resident in self.away & wanted:
                self._bring(resident)
        if self.vllm and phase == "rollout" and self.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM is another process and cannot use the memory that torch holds back

    def _put_away(self, resident: str) -> None:
        for tensor in self.tensors[resident]():
            is_new = tensor not in self.host
            if is_new:
                self.host[tensor] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            if is_new or resident not in self.frozen:
                self.host[tensor].copy_(tensor, non_blocking=True)
            tensor.data = tensor.new_empty((0,) * tensor.ndim)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the copies must be complete before the CPU reads the buffers
        self.away.add(resident)

    def _bring(self, resident: str) -> None:
        for tensor in self.tensors[resident]():
            buffer = self.host[tensor]
            tensor.data = torch.empty_like(buffer, device=tensor.device).copy_(buffer, non_blocking=True)
        self.away.remove(resident)

    def content(self, tensor: Tensor) -> Tensor:
        """The tensor, or its buffer in host memory while it is put away."""
        return self.host[tensor] if tensor in self.host and tensor.numel() == 0 else tensor.detach()
