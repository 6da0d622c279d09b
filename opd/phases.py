"""Two phases on one GPU: what lies on the device in each part of an update, while the rest waits in host memory.

A student of P parameters trains in 16 P bytes, gradients among them; its teacher needs 2 bytes a parameter, and vLLM
takes what is left for its cache. Together they seldom fit. But they are never needed together (engine.phases = 2):

    rollout     vLLM with its weights and cache; without vLLM, the student's weights
    teacher     the teacher; its hidden states go to host memory (opd.teacher.cache)
    update      student, gradients and optimizer; of the teacher its LM head, which projects the hidden states

With engine.phases = 1 the models stay on the device, and only vLLM sleeps while the student learns. On a CPU the same
code runs: it copies a tensor to another buffer and releases its own, so that a use in the wrong phase fails.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from opd.rollout import Sampler

RESIDENTS = {  # phase -> whose tensors are on the device; vLLM has weights of its own
    "rollout": {"student"},
    "rollout on vLLM": set(),
    "teacher": {"teacher", "teacher head"},
    "update": {"student", "optimizer", "teacher head"},
}


class Phases:
    """Moves student, optimizer and teacher in and out, and lets the sampler sleep.

    Args:
        device: where they compute.
        two: engine.phases is 2; else tensors stay where they are.
        vllm: rollout.engine is "vllm".
    """

    def __init__(self, device: torch.device, two: bool, vllm: bool):
        self.device, self.two, self.vllm = device, two, vllm
        self.tensors: dict[str, Callable[[], Iterable[Tensor]]] = {}  # resident -> its tensors
        self.host: dict[Tensor, Tensor] = {}  # tensor on the device -> its buffer in host memory, made once
        self.away: set[str] = set()
        self.sampler: Sampler | None = None  # what sleeps outside of the rollout phase

    def add(self, resident: str, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Takes over the tensors of "student", "optimizer", "teacher" or "teacher head", and puts them away."""
        self.tensors[resident] = tensors
        if self.two:
            self._put_away(resident)

    def enter(self, phase: str) -> None:
        """Before a part of an update or of an evaluation: "rollout", "teacher" or "update". First out, then in.

        The sampler wakes by itself, when it takes weights or is asked for responses.
        """
        wanted = RESIDENTS["rollout on vLLM" if phase == "rollout" and self.vllm else phase]
        if self.sampler is not None and phase != "rollout":
            self.sampler.sleep()
        if self.two:
            for resident in self.tensors.keys() - self.away - wanted:
                self._put_away(resident)
            for resident in self.away & wanted:
                self._bring(resident)
        if self.vllm and phase == "rollout" and self.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM is another process and cannot have what torch keeps for later

    def _put_away(self, resident: str) -> None:
        for tensor in self.tensors[resident]():
            known = tensor in self.host
            if not known:
                self.host[tensor] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            if not known or not resident.startswith("teacher"):  # the teacher is frozen: its buffer still holds it
                self.host[tensor].copy_(tensor, non_blocking=True)
            tensor.data = tensor.new_empty((0,) * tensor.ndim)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the CPU reads the buffers next
        self.away.add(resident)

    def _bring(self, resident: str) -> None:
        for tensor in self.tensors[resident]():
            tensor.data = torch.empty_like(self.host[tensor], device=tensor.device).copy_(
                self.host[tensor], non_blocking=True
            )
        self.away.remove(resident)

    def content(self, tensor: Tensor) -> Tensor:
        """The tensor, or its buffer in host memory while it is put away."""
        return self.host[tensor] if tensor in self.host and tensor.numel() == 0 else tensor.detach()
