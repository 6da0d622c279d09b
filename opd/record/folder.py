"""The folder of a run: where the run continues, what it was started with, and its final figures."""

import json
import platform
import shutil
import subprocess
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from opd.arguments import path_fault
from opd.benchmarks import VALIDATION
from opd.cli import command_line, say
from opd.config import ROOT
from opd.errors import InputError
from opd.files import check, read_object, step_number, whole_rows, writable, write_whole
from opd.record import checkpoint, evaluation
from opd.record.identity import differences
from opd.record.metrics import Row, Warned, read_metrics

VERSIONED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
DONE = "done"


class Evaluations(TypedDict):
    """The figures of each model by benchmark; None where it was not evaluated."""

    teacher: dict[str, evaluation.Figures] | None
    step_0: dict[str, evaluation.Figures] | None
    final: dict[str, evaluation.Figures] | None


class Tokens(TypedDict):
    """Counts over all updates."""

    response: float
    kept: float


class Seconds(TypedDict):
    """Seconds of each phase over all updates."""

    rollout: float
    teacher: float
    score: float
    update: float
    step: float


class Recorded(TypedDict):
    """The parts of a recorded configuration that are read again; other sections may stand beside them."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    data: dict[str, Any]
    seed: int
    run_name: str


class ConfigFile(TypedDict):
    """The parts of a run's config.json that are read again."""

    config: Recorded
    versions: dict[str, str]
    git_commit: str | None


class Summary(TypedDict):
    """The final figures of a run, in its summary.json."""

    steps: int
    eval: Evaluations
    tokens: Tokens
    seconds: Seconds
    seconds_evaluating: float
    peak_memory_gb: float


def read_final(run_dir: Path) -> Summary:
    """The final figures of a finished run. Raises InputError where the file does not hold them."""
    path, expected = run_dir / "summary.json", "the final figures of a finished run"
    return check(read_object(path, expected), Summary, str(path), expected)


def read_record(run_dir: Path) -> ConfigFile:
    """What a run was started with. Raises InputError where the folder is not that of a run."""
    path, expected = run_dir / "config.json", "what a run was started with"
    return check(read_object(path, expected), ConfigFile, str(path), expected)


def open_run(run_dir: Path, identity: Mapping[str, Any], resume: str) -> Path | str | None:
    """Where the run begins: None for the first update, the path of a checkpoint, or DONE. Changes nothing on disk.

    Raises:
        InputError: the folder is not that of a run, or holds a run of another configuration (the message names the
            keys that differ), or `resume` does not fit.
    """
    if not run_dir.exists() or all(p.name.startswith(".") for p in run_dir.iterdir()):
        if resume not in ("auto", "none"):
            raise InputError(
                f"--resume {resume[:200]}: {run_dir} has no run to continue. Expected an existing run folder."
            )
        return None
    if resume == "none":
        raise InputError(f"{run_dir} exists, and --resume none starts a new run. Choose another --set run_name=NAME.")
    _check_same_run(run_dir, identity)
    if resume == "auto" and _is_complete(run_dir):
        return DONE
    begin = checkpoint.newest(run_dir) if resume == "auto" else _named_checkpoint(run_dir, resume)
    if begin is not None:
        config = identity["config"]
        names = [*identity["benchmarks"], *([VALIDATION] if config["data"]["validation"] else [])]
        _check_history(run_dir, checkpoint.step_of(begin), config["eval"]["every"], names)
    return begin


def _check_same_run(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Raises InputError where the folder holds another run, or none."""
    try:
        differing = differences(read_object(run_dir / "config.json", "what a run was started with"), identity)
    except (InputError, AttributeError, KeyError, TypeError):
        raise InputError(
            f"{run_dir} exists and is not a run folder (no readable config.json). Choose another --set run_name=NAME."
        ) from None
    if differing:
        raise InputError(
            f"{run_dir} holds a run of another configuration; it differs in {'; '.join(differing)}. "
            "Choose another --set run_name=NAME, or give the same configuration to continue it."
        )


def _named_checkpoint(run_dir: Path, resume: str) -> Path:
    """The checkpoint that --resume names. Raises InputError where it is not a whole checkpoint of this run."""
    try:
        if path_fault(resume) or Path(resume).resolve().parent != (run_dir / "checkpoints").resolve():
            raise checkpoint.CheckpointError(f"{resume[:200]} does not stand in {run_dir / 'checkpoints'}")
        checkpoint.verify(Path(resume))
    except checkpoint.CheckpointError as error:
        raise InputError(f"--resume {resume[:200]}: {error}. Expected a whole checkpoint of {run_dir}.") from None
    return Path(resume)


def _is_complete(run_dir: Path) -> bool:
    """Whether a run has its final figures. A summary that cannot be read is named, and is made again.

    Raises InputError for a complete run whose last checkpoint is damaged, because the user has to decide whether to
    train it once more. A user who removed the last checkpoint does not want to.
    """
    path = run_dir / "summary.json"
    if not path.exists():
        return False
    try:
        last = checkpoint.folder(run_dir, read_final(run_dir)["steps"])
    except InputError as error:
        say(f"warning: {error} It is made again.")
        return False
    if not last.exists():
        say(f"note: {last} was removed")
        return True
    try:
        checkpoint.verify(last)
    except checkpoint.CheckpointError as error:
        raise InputError(
            f"{run_dir} is complete, and {error}. To have the run go on from the checkpoint before it, or from the "
            f"start where there is none, remove {path} and give the same command."
        ) from None
    return True


def _check_history(run_dir: Path, step: int, every: int, names: Collection[str]) -> None:
    """Refuses to continue after `step` without the metrics and evaluations up to it, which cannot be made again.

    An evaluation is due after every `every` updates, and holds the benchmarks `names`.

    Raises:
        InputError: a file is damaged or missing; the message names it, and says how to go on.
    """
    then = (
        f"A run cannot make that again once it has gone on. Restore it, continue from an earlier checkpoint of "
        f"{run_dir / 'checkpoints'} with --resume DIR, or start anew under another --set run_name=NAME."
    )
    path = run_dir / "metrics.jsonl"
    try:
        steps = {row["step"] for row in whole_rows(path, Row)[0]}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). {then}") from None
    if missing := sorted(set(range(1, step + 1)) - steps):
        raise InputError(
            f"{path}: update {missing[0]} of the {step} behind the checkpoint is damaged or missing. {then}"
        )
    for number in range(0, step, every or step) if names else ():
        folder = run_dir / "eval" / f"step_{number:06d}"
        if evaluation.finished(folder, names) is None:
            raise InputError(f"{folder}: the evaluation after update {number} is damaged or missing. {then}")


def rewind(run_dir: Path, step: int, begin: Path | None) -> None:
    """Removes what the run wrote after `step`: checkpoints, evaluations, token dumps, lines of metrics, the summary.

    A run that continues from an older checkpoint abandons them; damaged checkpoints go with them. Checkpoints go first,
    so that a process killed half-way still continues from `step`. Files that the run did not write stay.

    Args:
        begin: the checkpoint that the run continues from; None where it begins anew.
    """
    checkpoint.remove_after(run_dir, step)
    if begin is not None:
        checkpoint.point(begin)
    (run_dir / "summary.json").unlink(missing_ok=True)
    for path, kind in ((run_dir / "metrics.jsonl", Row), (run_dir / "warnings.jsonl", Warned)):
        if path.exists():
            rows, damaged = whole_rows(path, kind)
            if damaged:
                say(f"warning: {path}: damaged lines are dropped, {damaged} in number")
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    for path in (*(run_dir / "tokens").glob("step_*"), *(run_dir / "eval").glob("step_*")):
        if (number := step_number(path)) is not None and number > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_identity(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Creates the folder and its config.json. A run that continues has them already."""
    with writable(run_dir, "output_dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / "config.json").exists():
            return
        record = {
            **identity,
            "versions": {name: metadata.version(name) for name in VERSIONED},
            "python": platform.python_version(),
            "git_commit": _git_commit(),
            "command": command_line(),
        }
        write_whole(run_dir / "config.json", json.dumps(record, indent=1) + "\n")


def keep_teacher(run_dir: Path, weights: str) -> None:
    """Records the digest of the weights that teach a run from elsewhere. They can change where their path does not.

    Raises InputError where other weights have taught this run before.
    """
    path = run_dir / "teacher_weights.json"
    if not path.exists():
        return write_whole(path, json.dumps({"weights": weights}) + "\n")
    before = read_object(path, "which weights have taught a run").get("weights")
    if before != weights:
        raise InputError(
            f"{run_dir}: weights with the digest {before} have taught this run, and the teacher servers have "
            f"{weights}. Start them with the teacher of then, or choose another --set run_name=NAME."
        )


def _git_commit() -> str | None:
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or None


def write_summary(run_dir: Path, names: Collection[str]) -> Summary:
    """Writes summary.json: the final figures of a run, from its own files. `names` are its benchmarks."""
    rows = read_metrics(run_dir)
    folders = (folder for folder in (run_dir / "eval").glob("*") if folder.is_dir())
    evaluations = {f.name: figures for f in folders if (figures := evaluation.finished(f, names)) is not None}
    steps = sorted((n for n in evaluations if step_number(Path(n)) is not None), key=lambda n: step_number(Path(n)))
    timed = [evaluations[name] for name in (*steps, "teacher") if name in evaluations]
    phases = sorted({name for row in rows for name in row if name.startswith("time/")})
    summary = {
        "steps": len(rows),
        "eval": {
            "teacher": evaluations.get("teacher"),
            "step_0": evaluations.get("step_000000"),
            "final": evaluations[steps[-1]] if steps else None,
        },
        "tokens": {kind: sum(row[f"tokens/{kind}"] for row in rows) for kind in ("response", "kept")},
        "seconds": {name.removeprefix("time/"): sum(row.get(name, 0.0) for row in rows) for name in phases},
        "seconds_evaluating": sum(one["time/evaluation"] for figures in timed for one in figures.values()),
        "peak_memory_gb": max(row["memory/peak_gb"] for row in rows),
    }
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary
