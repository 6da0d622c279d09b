"""Checkpoints that are there whole or not at all.

`checkpoints/step_000020/` holds the student in Hugging Face format (safetensors, float32, tokenizer beside it), in
trainer/ the optimizer's moments and what a running weighter remembers (safetensors; beside the model vLLM would take
them for it), trainer.json, and manifest.json with size and SHA-256 of every file. It is written under a temporary name,
flushed to disk, then renamed; `latest` names the newest one. Nothing is ever unpickled. It is the same whatever number
of processes wrote it, so any number continues from it.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd import distributed
from opd.cli import say
from opd.engine import Engine
from opd.errors import RunError
from opd.files import amount, flush, sha256, step_number, write_whole
from opd.models import LanguageModel

MANIFEST = "manifest.json"
ESSENTIAL = ("config.json", "trainer.json", "trainer/optimizer.safetensors")  # without which nothing continues


class CheckpointError(Exception):
    """A checkpoint is damaged or incomplete."""


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def save(
    run_dir: Path,
    step: int,
    student: LanguageModel,
    engine: Engine,
    memory: dict[str, Tensor],
    keep: int,
) -> Path:
    """Writes the checkpoint of update `step`, points `latest` at it, and removes all but the newest `keep`.

    All ranks call it, the first one writes. `memory` is what the weighter remembers, if anything.

    Raises RunError, with the earlier checkpoints untouched, when there is no room or a write fails.
    """
    final = folder(run_dir, step)
    temporary = final.with_name(f".{final.name}.tmp")
    weights, moments = engine.parameters_by_name(), engine.moments_by_name()
    if not distributed.is_first():
        return final
    optimizer = {name: value.detach().cpu().contiguous() for name, value in moments.items()}
    needed = sum(v.nbytes for v in optimizer.values()) + sum(v.nbytes for v in weights.values())
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".step_*"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover)
    free = shutil.disk_usage(final.parent).free
    if free < needed * 1.05:
        raise RunError(
            f"no room for the checkpoint of step {step}: it takes {amount(needed)} and {final.parent} has "
            f"{amount(free)} free. Earlier checkpoints are intact; make room and start the same command again."
        )
    try:
        student.model.save_pretrained(temporary, state_dict=weights)
        student.tokenizer.save_pretrained(temporary)
        _say_float32(temporary / "config.json")
        (temporary / "trainer").mkdir()
        save_file(optimizer, temporary / "trainer" / "optimizer.safetensors")
        if memory:
            save_file(memory, temporary / "trainer" / "weighter.safetensors")
        trainer = {"step": step, "processes": distributed.world_size()}
        (temporary / "trainer.json").write_text(json.dumps(trainer) + "\n")
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*files, temporary / MANIFEST, temporary / "trainer", temporary):
            flush(path)
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


def point(checkpoint: Path) -> None:
    """Makes `latest` name a checkpoint."""
    write_whole(checkpoint.parent / "latest", checkpoint.name + "\n")


def remove_after(run_dir: Path, step: int) -> None:
    """Removes the checkpoints of later updates than `step`."""
    for later in _all(run_dir):
        if step_number(later) > step:
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
    """The moments; the student itself is loaded from the folder like any Hugging Face checkpoint.

    An engine whose parameters are bfloat16 takes the float32 weights beneath them from here too.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())  # a foreign file beside the weights is none of them
    weights = [checkpoint / name for name in manifest if name.endswith(".safetensors") and "/" not in name]
    engine.load(_Tensors([checkpoint / "trainer" / "optimizer.safetensors"]), _Tensors(weights))


class _Tensors(Mapping):
    """Tensors of safetensors files by name, read when asked for: no process holds all of a large model's moments."""

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
    """What the weighter remembered; empty if it had learnt nothing."""
    path = checkpoint / "trainer" / "weighter.safetensors"
    return load_file(path) if path.exists() else {}


def _say_float32(config: Path) -> None:
    """Under DeepSpeed the student runs in bfloat16 and transformers writes that down, but the saved weights are
    float32."""
    values = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _all(run_dir: Path) -> list[Path]:
    """Folders of checkpoints, the oldest first; whatever else lies there is no business of the run."""
    found = (p for p in (run_dir / "checkpoints").glob("step_*") if step_number(p) is not None and p.is_dir())
    return sorted(found, key=step_number)
