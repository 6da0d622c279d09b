"""A teacher in the student's processes: a frozen model on this device, or split over all processes by ZeRO-3."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd import models
from opd.batch import MicroBatch
from opd.config import Config, StudentSection, TeacherSection
from opd.engine.deepspeed import WholeModel, initialize, sharding
from opd.loss import Head
from opd.models import LanguageModel
from opd.teacher.cache import Cache


class LocalTeacher:
    """Implements opd.teacher.Teacher. Without a `cache` the hidden states wait in host memory, without a limit."""

    def __init__(self, lm: LanguageModel, cache: Cache | None = None):
        self.lm, self.cache = lm, Cache() if cache is None else cache

    @torch.no_grad()
    def hidden_states(
        self, batches: Sequence[MicroBatch], advance: Callable[[int, int], None] = lambda batches, tokens: None
    ) -> Cache:
        """As Teacher.hidden_states, in the teacher's dtype. Raises RunError as Cache.add does."""
        self.cache.clear()
        for batch in batches:
            every_token = torch.arange(len(batch.token_ids))
            self.cache.add(self.lm.run(partial(self.lm.hidden_states, batch.for_teacher, every_token)))
            advance(1, len(batch.token_ids))
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)  # copies into pinned memory do not wait by themselves
        return self.cache

    def head(self, vocab_size: int) -> Head:
        return self.lm.head(vocab_size)

    @property
    def packed_row(self) -> int:
        return self.lm.packed_row

    def in_memory(self) -> "LocalTeacher":
        """As Teacher.in_memory."""
        return LocalTeacher(self.lm)

    def close(self) -> None:
        """As Teacher.close."""
        self.cache.clear()


def load_teacher(config: Config, device: torch.device, name: str = "teacher") -> LanguageModel:
    """The teacher's model, placed as teacher.placement says. Raises InputError as opd.models.load does."""
    if config.teacher.placement == "device":
        return models.load(config.teacher_model, device, name)
    return load_split(config.teacher_model, device, name, zero3_settings(config.teacher))


def load_split(
    section: StudentSection | TeacherSection, device: torch.device, name: str, settings: dict[str, Any]
) -> LanguageModel:
    """A frozen model that ZeRO-3 splits, with a whole copy of its head. Raises InputError as opd.models.load does."""
    lm = models.load(section, device, name, sharding(settings))
    lm.model.requires_grad_(False)
    engine = initialize(model=WholeModel(lm), config=settings)
    lm.model.eval()
    lm = replace(lm, run=engine, sharded=True)
    return models.tried(replace(lm, whole_head=_copy_head(lm)))


def renew_head(lm: LanguageModel) -> None:
    """Copies the head of a split model again, after its parameters changed. Every process calls it."""
    fresh = _copy_head(lm)
    lm.whole_head.weight.copy_(fresh.weight)
    if fresh.bias is not None:
        lm.whole_head.bias.copy_(fresh.bias)


@torch.no_grad()
def _copy_head(lm: LanguageModel) -> Head:
    """The whole head of a split model. The loss needs it at every micro-batch, and each gathering is a collective."""

    def copy(_: Tensor) -> Head:
        head = models.head_of(lm.model, lm.model.get_output_embeddings().out_features)
        return replace(head, weight=head.weight.detach().clone(), bias=None if head.bias is None else head.bias.clone())

    return lm.run(lambda: lm.head_scope(torch.zeros(1, device=lm.device), copy))


def zero3_settings(teacher: TeacherSection) -> dict[str, Any]:
    """DeepSpeed's settings for a teacher that is split over the processes; placement host keeps it in host memory."""
    offload = {"offload_param": {"device": "cpu", "pin_memory": True}} if teacher.placement == "host" else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **offload},
        "bf16": {"enabled": teacher.dtype == "bfloat16"},
        "steps_per_print": 2**62,
    }
