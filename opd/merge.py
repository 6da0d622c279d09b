"""Merges the adapters of a student into its weights: `python -m opd.merge RUN --out DIR`

The result is a plain float32 checkpoint, which needs no peft. Its logits are those of the adapted model to the rounding
of float32: W + scale B A is one matrix, where the adapted layer adds two products.
"""

import os
import shutil
from pathlib import Path

import torch

from opd import adapters, models
from opd.cli import main, say
from opd.commands import COMMANDS
from opd.config import StudentSection
from opd.errors import InputError, RunError
from opd.files import lock
from opd.record import checkpoint


def command(arguments: list[str]) -> None:
    options = COMMANDS["merge"].parser().parse_args(arguments)
    folder = adapter_of(options.run)
    out = options.out
    with lock(out, "--out"):
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} is not empty. Give a new folder: --out DIR.")
        merge(folder, out)
    say(f"{folder} is merged")
    print(out)


def adapter_of(path: Path) -> Path:
    """The folder with adapters that a run or a checkpoint stands for. Raises InputError where there is none."""
    folder = path
    if (path / "checkpoints").is_dir():
        folder = checkpoint.newest(path) or path
    if not (folder / adapters.SETTINGS).is_file():
        raise InputError(
            f"{path} holds no adapters ({adapters.SETTINGS}). Expected a run with student.lora, or a checkpoint of "
            "one; any other checkpoint is a plain one already."
        )
    return folder


def merge(folder: Path, out: Path) -> None:
    """Writes the merged model and its tokenizer as `out`, whole or not at all. Raises RunError where it cannot."""
    section = StudentSection(str(folder), None, "float32", "eager")  # every architecture computes with eager
    lm = models.load(section, torch.device("cpu"), "student")
    adapters.remove(lm.model)
    temporary = out.with_name(f".{out.name}.merging")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        lm.model.save_pretrained(temporary)
        lm.tokenizer.save_pretrained(temporary)
        os.replace(temporary, out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{out} could not be written ({error}). Make room and give the command again.") from None


if __name__ == "__main__":
    main(command)
