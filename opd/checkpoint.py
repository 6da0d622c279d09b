"""Checkpoints that are there whole or not at all.

`checkpoints/step_000020/` holds the student in Hugging Face format (safetensors, float32, tokenizer beside it), the
optimizer's moments and what a running weighter remembers (safetensors), trainer.json, and manifest.json with size and
SHA-256 of every file. It is written under a temporary name, flushed to disk, then renamed; `latest` names the newest
one. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.cli import RunError, say
from opd.engine import TorchEngine
from opd.metrics import write_whole
from opd.models import LanguageModel

MANIFEST = "manifest.json"


class CheckpointError(Exception):
    """A checkpoint is damaged or incomplete."""


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def save(
    run_dir: Path, step: int, student: LanguageModel, engine: TorchEngine, memory: dict[str, Tensor], keep: int
) -> Path:
    """Writes the checkpoint of update `step`, points `latest` at it, and removes all but the newest `keep`.

    `memory` is what the weighter remembers, if anything.

    Raises RunError, with the earlier checkpoints untouched, when there is no room or a write fails.
    """
    final = folder(run_dir, step)
    temporary = final.with_name(f".{final.name}.tmp")
    optimizer = {name: value.detach().cpu().contiguous() for name, value in engine.state().items()}
    needed = sum(v.nbytes for v in optimizer.values()) + sum(p.nbytes for p in student.model.parameters())
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".step_*"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover)
    free = shutil.disk_usage(final.parent).free
    if free < needed * 1.05:
        raise RunError(
            f"no room for the checkpoint of step {step}: it takes {needed / 2**30:.2f} GiB and {final.parent} has "
            f"{free / 2**30:.2f} GiB free. Earlier checkpoints are intact; make room and start the same command again."
        )
    try:
        student.model.save_pretrained(temporary)
        student.tokenizer.save_pretrained(temporary)
        save_file(optimizer, temporary / "optimizer.safetensors")
        if memory:
            save_file(memory, temporary / "weighter.safetensors")
        (temporary / "trainer.json").write_text(json.dumps({"step": step}) + "\n")
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*files, temporary / MANIFEST, temporary):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _flush(final.parent)
        write_whole(final.parent / "latest", final.name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"the checkpoint of step {step} could not be written ({error}). Earlier checkpoints are intact; "
            "mend the cause and start the same command again."
        ) from error
    for old in _all(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def remove_after(run_dir: Path, step: int) -> None:
    """Removes the checkpoints of later updates than `step`."""
    for later in _all(run_dir):
        if _number(later) > step:
            shutil.rmtree(later)


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is named on the console and the one before is tried."""
    for candidate in reversed(_all(run_dir)):
        try:
            verify(candidate)
            return candidate
        except CheckpointError as error:
            say(f"warning: {error}; trying the one before")
    return None


def verify(checkpoint: Path) -> int:
    """Checks every file against the manifest; returns the step. Raises CheckpointError naming what is damaged."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, recorded in manifest.items():
            path = checkpoint / name
            if path.stat().st_size != recorded["bytes"] or _sha256(path) != recorded["sha256"]:
                raise CheckpointError(f"checkpoint {checkpoint} is damaged: {name} is not what was written")
        return step_of(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} is incomplete ({error})") from error


def step_of(checkpoint: Path) -> int:
    """The number of the last update in it."""
    return json.loads((checkpoint / "trainer.json").read_text())["step"]


def load_optimizer(checkpoint: Path, engine: TorchEngine) -> None:
    """The moments; the student itself is loaded from the folder like any Hugging Face checkpoint."""
    engine.load_state(load_file(checkpoint / "optimizer.safetensors"))


def load_weighter(checkpoint: Path) -> dict[str, Tensor]:
    """What the weighter remembered; empty if it had learnt nothing."""
    path = checkpoint / "weighter.safetensors"
    return load_file(path) if path.exists() else {}


def _all(run_dir: Path) -> list[Path]:
    found = (p for p in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name))
    return sorted(found, key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
