"""The teacher that a configuration names (teacher.mode)."""

import torch

from opd import models
from opd.config import Config
from opd.models import LanguageModel
from opd.teacher import Teacher
from opd.teacher.cache import Cache
from opd.teacher.local import LocalTeacher, load_teacher
from opd.teacher.self import averaged, live
from opd.teacher.served import open_served


def open_teacher(config: Config, student: LanguageModel, device: torch.device) -> LanguageModel:
    """The teacher's model at the beginning of a run; that of servers has no weights here.

    Raises InputError as opd.models.load does.

    Args:
        student: the model that teaches with teacher.weights live; no other teacher uses it.
    """
    if config.teacher.mode == "server":
        return models.outline(config.teacher, "teacher")
    if config.teacher.weights == "live":
        return live(student)
    if config.teacher.weights == "ema":
        return averaged(config, device)
    return load_teacher(config, device)


def scoring_teacher(
    config: Config, teacher: LanguageModel, device: torch.device, cache: Cache | None = None
) -> Teacher:
    """What scores tokens with the model of `open_teacher`. Raises InputError where a server cannot be used."""
    if config.teacher.mode == "server":
        return open_served(config, teacher, device, cache)
    return LocalTeacher(teacher, cache)
