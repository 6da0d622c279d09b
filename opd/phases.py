"""Two phases on one GPU: what lies on the device in each part of an update, while the rest waits in host memory.

A student of P parameters trains in 16 P bytes and gradients among them, its teacher needs 2 bytes a parameter, and vLLM
takes what is left for its cache: together they seldom fit. But they are never needed together (engine.phases = 2):

    rollout     vLLM with its weights and cache; without vLLM, the student's weights
    teacher     the teacher; its hidden states go to host memory (opd.teacher.Cache)
    update      student, gradients and optimizer; of the teacher its LM head, which projects the hidden states

With engine.phases = 1 everything stays on the device, and only vLLM sleeps while the student learns. On a CPU the same
code runs: what is put away is copied to another buffer and its own is released, so whoever uses it in the wrong phase
fails.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from opd.vllm_engine import VllmEngine

TENSORS = {  # phase -> whose tensors are on the device; "rollout" is with vLLM awake, which has weights of its own
    "rollout": {"student"},
    "rollout on vLLM": set(),
    "teacher": {"teacher", "teacher head"},
    "update": {"student", "optimizer", "teacher head"},
}


class Phases:
    """Moves student, optimizer, teacher and vLLM in and out.

    Args:
        device: where they compute.
        two: engine.phases is 2; else tensors stay where they are.
        vllm: rollout.engine is "vllm".
    """

    def __init__(self, device: torch.device, two: bool, vllm: bool):
        self.device, self.two, self.vllm = device, two, vllm
        self.tensors: dict[str, Callable[[], Iterable[Tensor]]] = {}  # who -> its tensors
        self.host: dict[Tensor, Tensor] = {}  # tensor on the device -> its buffer in host memory, made once
        self.away: set[str] = set()
        self.sampler: VllmEngine | None = None  # once it is started
        self.weights: Callable[[], Iterable[tuple[str, Tensor]]] = dict[str, Tensor]().items  # for vLLM, by name
        self.changed = True  # since vLLM got them: whoever trains says so

    def add(self, who: str, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Takes over the tensors of "student", "optimizer", "teacher" or "teacher head", and puts them away."""
        self.tensors[who] = tensors
        if self.two:
            self._put_away(who)

    def enter(self, phase: str) -> None:
        """Before a part of an update or of an evaluation: "rollout", "teacher" or "update". First out, then in."""
        wanted = TENSORS["rollout on vLLM" if phase == "rollout" and self.vllm else phase]
        if self.sampler and phase != "rollout":
            self.sampler.sleep()
        if self.two:
            for who in self.tensors.keys() - self.away - wanted:
                self._put_away(who)
            for who in self.away & wanted:
                self._bring(who)
        if self.vllm and phase == "rollout" and self.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM is another process: what torch keeps for later it cannot have
        if self.sampler and phase == "rollout":
            if self.changed:
                self.sampler.sync(self.weights())
            else:
                self.sampler.wake()
            self.changed = False

    def _put_away(self, who: str) -> None:
        for tensor in self.tensors[who]():
            known = tensor in self.host
            if not known:
                self.host[tensor] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            if not known or not who.startswith("teacher"):  # which is frozen: its buffer still holds it
                self.host[tensor].copy_(tensor, non_blocking=True)
            tensor.data = tensor.new_empty((0,) * tensor.ndim)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # who reads the buffers next is the CPU
        self.away.add(who)

    def _bring(self, who: str) -> None:
        for tensor in self.tensors[who]():
            tensor.data = torch.empty_like(self.host[tensor], device=tensor.device).copy_(
                self.host[tensor], non_blocking=True
            )
        self.away.remove(who)

    def value(self, tensor: Tensor) -> Tensor:
        """The tensor, or its buffer in host memory while it is put away."""
        return self.host[tensor] if tensor in self.host and tensor.numel() == 0 else tensor.detach()
