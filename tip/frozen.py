"""The frozen pair: what the step-0 student and the teacher say about the tokens of every update (tip.frozen).

A selection moves because the student does. How far it has moved is told by scoring the same rollouts with the student
of step 0: the drift of an update is 1 - the Jaccard overlap of the tokens selected now with those that a rule would
select from the frozen pair. A rule that goes on selecting from the frozen pair is the control.

FrozenPair implements opd.scorer.Scorer, so that its columns reach a weighter beside the statistics of the update. Each
process holds both models whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opd import models
from opd.batch import make_micro_batches
from opd.config import Config, LossSection, ScorerSection, StudentSection, TeacherSection
from opd.data import Rollout
from opd.errors import InputError
from opd.step import Pair, stats_by_batch
from opd.teacher.local import LocalTeacher
from tip.config import TipConfig
from tip.weighter import TipWeighter, frozen_name


class FrozenPair:
    """Scores rollouts with a student and a teacher that never change.

    Args:
        student, teacher, loss: the keys of the sections of the same names.
        fields: of TokenStats, each (N,); a column is named after its field.
        micro_batch_tokens: as optim.micro_batch_tokens.
        on_gpu: whether the models lie on this process's GPU.
    """

    def __init__(
        self,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        loss: Mapping[str, Any],
        fields: Sequence[str],
        micro_batch_tokens: int,
        on_gpu: bool,
    ):
        self.sections = StudentSection(**student), TeacherSection(**teacher), LossSection(**loss)
        self.fields, self.micro_batch_tokens, self.on_gpu = tuple(fields), micro_batch_tokens, on_gpu
        self.names = frozenset(map(frozen_name, self.fields))

    @cached_property
    def pair(self) -> Pair:
        """Both models; they are loaded when the first rollouts come, because a dry run needs none."""
        gpu = self.on_gpu and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        student, teacher, loss = self.sections
        lm, of_teacher = models.load(student, device, "student"), models.load(teacher, device, "teacher")
        lm.model.requires_grad_(False)
        return Pair(lm, LocalTeacher(of_teacher), models.shared_vocabulary(lm, of_teacher), loss)

    def __call__(self, rollouts: Sequence[Rollout]) -> dict[str, list[Tensor]]:
        columns = {name: [torch.full((len(r.response_ids),), torch.nan) for r in rollouts] for name in self.names}
        numbered = [replace(rollout, sequence_id=i) for i, rollout in enumerate(rollouts)]
        pad_id, row = self.pair.student.eos_ids[0], self.pair.packed_row
        batches = make_micro_batches(numbered, self.micro_batch_tokens, pad_id, "keep", row)
        for batch, stats in zip(batches, stats_by_batch(self.pair, batches, frozenset(self.fields)), strict=True):
            for i in batch.sequence_id.unique().tolist():
                rows_N = batch.sequence_id == i
                for name, column_N in stats.items():
                    columns[frozen_name(name)][i][batch.position[rows_N]] = column_N[rows_N]
        return columns


def with_frozen_pair(config: Config, tip: TipConfig) -> Config:
    """The configuration with the scorer that tip.frozen asks for.

    Raises InputError where there is another scorer, or a teacher that is not whole on a device.
    """
    fields = TipWeighter(tip).frozen_fields
    if not fields:
        return config
    if config.rollout.scorer is not None:
        raise InputError(
            f"tip.frozen is {tip.frozen!r} and rollout.scorer is {config.rollout.scorer.name!r}: the frozen pair takes "
            "the place of a scorer. Leave one of them out."
        )
    if config.teacher.placement != "device":
        raise InputError(
            f"tip.frozen is {tip.frozen!r} and teacher.placement is {config.teacher.placement!r}: the frozen pair lies "
            "whole on the device of each process. Set teacher.placement=device, or tip.frozen=none."
        )
    settings = {
        **{name: asdict(section) for name, section in vars(config).items() if name in ("student", "teacher", "loss")},
        "fields": sorted(fields),
        "micro_batch_tokens": config.optim.micro_batch_tokens,
        "on_gpu": config.engine.device != "cpu",
    }
    scorer = ScorerSection(name="tip.frozen:FrozenPair", settings=settings)
    return replace(config, rollout=replace(config.rollout, scorer=scorer))
