"""Checkpoints that are on disk whole or not at all.

`checkpoints/step_000020/` holds the student in Hugging Face format, as float32 safetensors with its tokenizer, or its
adapters in the format of peft. Beside them are trainer.json and the folder trainer/ with the optimizer's moments, the
memory of the weighter, and the average of the student's weights where that is the teacher. vLLM would take safetensors
beside the model for parts of it.

A checkpoint is written under a temporary name, flushed to disk, and renamed; then `latest` names it. manifest.json
lists size and SHA-256 of every file. Nothing is ever unpickled. The files do not depend on the number of processes, so
any number continues from them.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd import adapters, distributed
from opd.cli import say
from opd.engine import Engine
from opd.errors import RunError
from opd.files import amount, flush, sha256, step_number, write_whole
from opd.models import LanguageModel

MANIFEST = "manifest.json"
ESSENTIAL = ("config.json", "trainer.json", "trainer/optimizer.safetensors")  # a run cannot continue without them


class CheckpointError(Exception):
    """A checkpoint is damaged or incomplete."""


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def save(
    run_dir: Path,
    step: int,
    student: LanguageModel,
    engine: Engine,
    memory: Mapping[str, dict[str, Tensor]],
    keep: int,
) -> Path:
    """Writes the checkpoint of update `step`, points `latest` at it, and removes all but the newest `keep`.

    All processes call it and the first one writes.

    Args:
        memory: what else the run remembers of earlier updates: "weighter" -> its memory, and "teacher" -> the average
            of the student's weights, where that is the teacher.
    Raises:
        RunError: there is no room or a write failed; earlier checkpoints are untouched.
    """
    final = folder(run_dir, step)
    parameters, moments = engine.parameters_by_name(), engine.moments_by_name()
    if not distributed.is_first():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".step_*"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover)
    needed = sum(tensor.nbytes for tensors in (parameters, moments, *memory.values()) for tensor in tensors.values())
    free = shutil.disk_usage(final.parent).free
    if free < needed * 1.05:
        raise RunError(
            f"no room for the checkpoint of step {step}: it takes {amount(needed)} and {final.parent} has "
            f"{amount(free)} free. Earlier checkpoints are intact; make room and start the same command again."
        )
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        if adapters.is_adapted(student.model):
            adapters.save(student.model, parameters, temporary)
        else:
            student.model.save_pretrained(temporary, state_dict=parameters)
            _record_float32(temporary / "config.json")
        student.tokenizer.save_pretrained(temporary)
        _write_trainer(temporary, step, moments, memory)
        _write_manifest(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        flush(final.parent)
        point(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"the checkpoint of step {step} could not be written ({error}). Earlier checkpoints are intact; "
            "mend the cause and start the same command again."
        ) from error
    for old in _all(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def _record_float32(config: Path) -> None:
    """Writes the dtype of the saved parameters down: under DeepSpeed the model that transformers sees is bfloat16."""
    content = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_trainer(
    checkpoint: Path, step: int, moments: dict[str, Tensor], memory: Mapping[str, dict[str, Tensor]]
) -> None:
    (checkpoint / "trainer").mkdir()
    optimizer = {name: moment.detach().cpu().contiguous() for name, moment in moments.items()}
    save_file(optimizer, checkpoint / "trainer" / "optimizer.safetensors")
    for name, tensors in memory.items():
        if tensors:
            save_file(tensors, checkpoint / "trainer" / f"{name}.safetensors")
    trainer = {"step": step, "processes": distributed.world_size()}
    (checkpoint / "trainer.json").write_text(json.dumps(trainer) + "\n")


def _write_manifest(checkpoint: Path) -> None:
    """Lists all files with size and SHA-256, and flushes everything to disk."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    manifest = {str(p.relative_to(checkpoint)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*files, checkpoint / MANIFEST, checkpoint / "trainer", checkpoint):
        flush(path)


def point(checkpoint: Path) -> None:
    """Makes `latest` name a checkpoint."""
    write_whole(checkpoint.parent / "latest", checkpoint.name + "\n")


def remove_after(run_dir: Path, step: int) -> None:
    """Removes the checkpoints of updates after `step`."""
    for later in _all(run_dir):
        if step_number(later) > step:
            shutil.rmtree(later)


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, or None. A damaged one is named on the console and passed over."""
    for candidate in reversed(_all(run_dir)):
        try:
            verify(candidate)
            return candidate
        except CheckpointError as error:
            say(f"warning: {error}; trying the one before")
    return None


def verify(checkpoint: Path) -> int:
    """Checks every file against the manifest, and returns the step. Raises CheckpointError naming what is damaged."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if missing := [name for name in ESSENTIAL if name not in manifest]:
            raise CheckpointError(f"checkpoint {checkpoint} is damaged: its {MANIFEST} does not list {missing[0]}")
        for name, recorded in manifest.items():
            path = checkpoint / name
            if path.stat().st_size != recorded["bytes"] or sha256(path) != recorded["sha256"]:
                raise CheckpointError(f"checkpoint {checkpoint} is damaged: {name} is not what was written")
        return step_of(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} is incomplete ({error})") from error


def step_of(checkpoint: Path) -> int:
    """The number of the last update in it."""
    return json.loads((checkpoint / "trainer.json").read_text())["step"]


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote it."""
    return json.loads((checkpoint / "trainer.json").read_text())["processes"]


def load_optimizer(checkpoint: Path, engine: Engine) -> None:
    """Gives the engine its moments, and to an engine with bfloat16 parameters the float32 ones beneath them too.

    The student itself is loaded from the folder like any Hugging Face checkpoint.
    """
    moments = _Tensors([checkpoint / "trainer" / "optimizer.safetensors"])
    if adapters.is_adapted(engine.student.model):
        engine.load(moments, adapters.read(checkpoint, engine.student.model))
        return
    manifest = json.loads((checkpoint / MANIFEST).read_text())  # it leaves out foreign files beside the model
    model = [checkpoint / name for name in manifest if name.endswith(".safetensors") and "/" not in name]
    engine.load(moments, _Tensors(model))


class _Tensors(Mapping):
    """The tensors of safetensors files by name. Each is read on demand, because all of them may not fit in memory."""

    def __init__(self, paths: Iterable[Path]):
        files = [safe_open(path, framework="pt") for path in sorted(paths)]
        self.file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)


def load_weighter(checkpoint: Path) -> dict[str, Tensor]:
    """The memory of the weighter; empty if it remembered nothing."""
    path = checkpoint / "trainer" / "weighter.safetensors"
    return load_file(path) if path.exists() else {}


def load_average(checkpoint: Path) -> Mapping[str, Tensor]:
    """The average of the student's weights by parameter name, each tensor read on demand."""
    return _Tensors([checkpoint / "trainer" / "teacher.safetensors"])


def _all(run_dir: Path) -> list[Path]:
    """The folders of checkpoints, the oldest first. Other files beside them belong to the user and are left out."""
    folders = (p for p in (run_dir / "checkpoints").glob("step_*") if step_number(p) is not None and p.is_dir())
    return sorted(folders, key=step_number)
