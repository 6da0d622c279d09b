"""The process that holds a teacher for trainers on other devices or hosts (teacher.mode server).

    OPD_TEACHER_KEY=SECRET python -m opd.teacher_server --config configs/PAIR.json --listen 0.0.0.0:8600

It reads the teacher's model, the device and the largest micro-batch of a pair file, as a rule the trainer's own. It
answers token ids with the hidden states of the counted positions, and sends the head once. Any number of runs can use
it at the same time, and it goes on when they end. SIGTERM or Ctrl-C ends it.

It listens only to trainers that know the key, on every address, this machine's own too. Nothing is encrypted.
"""

import os
import signal
from dataclasses import replace
from typing import Any

import torch

from opd.arguments import address_of
from opd.cli import main, say
from opd.commands import COMMANDS
from opd.config import Config, load_config
from opd.device import pick_device
from opd.errors import InputError, Interrupted
from opd.teacher.facts import KEY
from opd.teacher.local import load_teacher
from opd.teacher.server import TeacherServer


def command(arguments: list[str]) -> None:
    """Loads the teacher and answers until it is stopped."""
    options = COMMANDS["teacher-server"].parser().parse_args(arguments)
    address, key = address_of(options.listen), os.environ.get(KEY, "")
    if not key:
        raise InputError(f"{KEY} is not set. Set it to a secret, the same one here and where the trainer runs.")
    config, _ = load_config(options.config, options.overrides, ignore_extensions=True)
    signal.signal(signal.SIGTERM, _stop)
    server = open_server(config)
    say(f"teacher server: {config.teacher.path} in {config.teacher.dtype} on {server.lm.device}, at {options.listen}")
    server.serve(address, key.encode())


def open_server(config: Config) -> TeacherServer:
    """The server of a pair file's teacher. Raises InputError for one that cannot be served."""
    teacher = config.teacher
    if teacher.mode == "self":
        raise InputError(
            "teacher.mode is 'self': the teacher is the student, which its run alone has. Nothing to serve."
        )
    if teacher.placement != "device":
        raise InputError(
            f"teacher.placement is {teacher.placement!r}, and a server holds its teacher on one device. Set "
            "teacher.placement=device, in the trainer's configuration too."
        )
    device = pick_device(config.engine)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as a run computes
    local = replace(config, teacher=replace(teacher, mode="local", servers=()))
    return TeacherServer(load_teacher(local, device), local)


def _stop(signum: int, _: Any) -> None:
    raise Interrupted(signum)


if __name__ == "__main__":
    main(command)
