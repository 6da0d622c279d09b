"""The teacher that a configuration names (teacher.mode)."""

from collections.abc import Mapping
from typing import Any

import torch

from opd import models
from opd.config import Config
from opd.models import LanguageModel
from opd.teacher import Teacher
from opd.teacher import self as self_teacher
from opd.teacher.cache import Cache
from opd.teacher.local import LocalTeacher
from opd.teacher.served import open_served


def open_teacher(
    config: Config, student: LanguageModel, device: torch.device, settings: Mapping[str, Any] | None = None
) -> LanguageModel:
    """As opd.teacher.self.open_teacher. The model of teacher servers has no weights here."""
    if config.teacher.mode == "server":
        return models.outline(config.teacher, "teacher")
    return self_teacher.open_teacher(config, student, device, settings)


def scoring_teacher(
    config: Config, teacher: LanguageModel, device: torch.device, cache: Cache | None = None
) -> Teacher:
    """What scores tokens with the model of `open_teacher`. Raises InputError where a server cannot be used."""
    if config.teacher.mode == "server":
        return open_served(config, teacher, device, cache)
    return LocalTeacher(teacher, cache)
