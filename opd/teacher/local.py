"""A teacher beside the student: a frozen model on this device, or split over the processes by ZeRO-3."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd import models
from opd.batch import MicroBatch
from opd.config import Config, TeacherSection
from opd.engine.deepspeed import WholeModel, initialize, sharding
from opd.loss import Head
from opd.models import LanguageModel
from opd.teacher.cache import Cache


class LocalTeacher:
    """A teacher that runs in this process.

    Args:
        cache: where its hidden states wait; None: in host memory without a limit.
    """

    def __init__(self, lm: LanguageModel, cache: Cache | None = None):
        self.lm = lm
        self.cache = Cache() if cache is None else cache

    @torch.no_grad()
    def hidden_states(
        self, batches: Sequence[MicroBatch], advance: Callable[[int, int], None] = lambda batches, tokens: None
    ) -> Cache:
        """As Teacher.hidden_states, in the teacher's dtype. Raises RunError as Cache.add."""
        self.cache.clear()
        for batch in batches:
            every_token = torch.arange(len(batch.token_ids))
            self.cache.add(self.lm.run(partial(self.lm.hidden_states, batch, every_token)))
            advance(1, len(batch.token_ids))
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)  # copies into pinned memory are asynchronous
        return self.cache

    def head(self, vocab_size: int) -> Head:
        return self.lm.head(vocab_size)


def load_teacher(config: Config, device: torch.device, name: str = "teacher") -> LanguageModel:
    """The teacher's model where teacher.placement says. Raises InputError as opd.models.load."""
    if config.teacher.placement == "device":
        return models.load(config.teacher, device, name)
    settings = zero3_settings(config.teacher)
    lm = models.load(config.teacher, device, name, sharding(settings))
    engine = initialize(model=WholeModel(lm), config=settings)
    lm.model.eval()
    lm = replace(lm, run=engine, sharded=True)
    lm = replace(lm, whole_head=_copy_of_head(lm))
    models.check_head(lm)
    return lm


@torch.no_grad()
def _copy_of_head(lm: LanguageModel) -> Head:
    """The whole head of a split model: the loss needs it at every micro-batch, and gathering it costs a collective."""

    def copied(_: Tensor) -> Head:
        head = models.head_of(lm.model, lm.model.get_output_embeddings().out_features)
        return replace(head, weight=head.weight.detach().clone(), bias=None if head.bias is None else head.bias.clone())

    return lm.run(lambda: lm.head_scope(torch.zeros(1, device=lm.device), copied))


def zero3_settings(teacher: TeacherSection) -> dict[str, Any]:
    """DeepSpeed's settings of a teacher that is split over the processes, and with placement host waits there."""
    zero: dict[str, Any] = {"stage": 3}
    if teacher.placement == "host":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": teacher.dtype == "bfloat16"},
        "steps_per_print": 2**62,
    }
