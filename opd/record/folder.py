"""The folder of a run: where to continue, what it was started with, and its final figures."""

import json
import platform
import shutil
import subprocess
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from opd import evaluate
from opd.benchmarks import VALIDATION
from opd.cli import command_line, path_fault, say
from opd.config import ROOT
from opd.errors import InputError
from opd.files import check, read_object, step_number, whole_rows, write_whole
from opd.record import checkpoint
from opd.record.identity import differences
from opd.record.metrics import Row, Warned, read_metrics

VERSIONED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
DONE = "done"


class Evaluations(TypedDict):
    """Benchmark -> figures, of each model; None: not evaluated."""

    teacher: dict[str, evaluate.Figures] | None
    step_0: dict[str, evaluate.Figures] | None
    final: dict[str, evaluate.Figures] | None


class Tokens(TypedDict):
    """Of all updates."""

    response: float
    kept: float


class Seconds(TypedDict):
    """Of all updates, by phase."""

    rollout: float
    teacher: float
    score: float
    update: float
    step: float


class Recorded(TypedDict):
    """What is read again of a run's configuration; any section may stand beside it."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    data: dict[str, Any]
    seed: int
    run_name: str


class Record(TypedDict):
    """What is read again of a run's config.json."""

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
    """The final figures of a finished run. Raises InputError where it is none."""
    path, expected = run_dir / "summary.json", "the final figures of a finished run"
    return check(read_object(path, expected), Summary, str(path), expected)


def read_record(run_dir: Path) -> Record:
    """How a run was started. Raises InputError where the folder is none of a run."""
    path, expected = run_dir / "config.json", "what a run was started with"
    return check(read_object(path, expected), Record, str(path), expected)


def open_run(run_dir: Path, identity: Mapping[str, Any], resume: str) -> Path | str | None:
    """Where to start: None for the beginning, the path of a checkpoint, or DONE. Changes nothing on disk.

    Raises InputError for a folder that is not a run, a run of another configuration (naming the differing keys), or a
    `resume` that does not fit.
    """
    if not run_dir.exists() or all(p.name.startswith(".") for p in run_dir.iterdir()):
        if resume not in ("auto", "none"):
            raise InputError(
                f"--resume {resume[:200]}: {run_dir} has no run to continue. Expected an existing run folder."
            )
        return None
    if resume == "none":
        raise InputError(f"{run_dir} exists, and --resume none starts a new run. Choose another --set run_name=NAME.")
    try:
        recorded = read_object(run_dir / "config.json", "what a run was started with")
        differing = differences(recorded, identity)
    except (InputError, AttributeError, KeyError, TypeError):
        raise InputError(
            f"{run_dir} exists and is not a run folder (no readable config.json). Choose another --set run_name=NAME."
        ) from None
    if differing:
        raise InputError(
            f"{run_dir} holds a run of another configuration; it differs in {'; '.join(differing)}. "
            "Choose another --set run_name=NAME, or give the same configuration to continue it."
        )
    if resume != "auto":
        try:
            if path_fault(resume) or Path(resume).resolve().parent != (run_dir / "checkpoints").resolve():
                raise checkpoint.CheckpointError(f"{resume[:200]} does not stand in {run_dir / 'checkpoints'}")
            checkpoint.verify(Path(resume))
        except checkpoint.CheckpointError as error:
            raise InputError(f"--resume {resume[:200]}: {error}. Expected a whole checkpoint of {run_dir}.") from None
        found = Path(resume)
    elif _is_complete(run_dir):
        return DONE
    else:
        found = checkpoint.newest(run_dir)
    if found is not None:
        config = identity["config"]
        names = [*identity["benchmarks"], *([VALIDATION] if config["data"]["validation"] else [])]
        check_history(run_dir, checkpoint.step_of(found), config["eval"]["every"], names)
    return found


def _is_complete(run_dir: Path) -> bool:
    """Whether a run has its final figures; unreadable ones are said to be, and are made again.

    Raises InputError for a complete run whose last checkpoint is damaged: to train it once more is for the user to
    decide. A last checkpoint that was removed is not missed.
    """
    path = run_dir / "summary.json"
    try:
        last = checkpoint.folder(run_dir, read_final(run_dir)["steps"]) if path.exists() else None
    except InputError as error:
        say(f"warning: {error} It is made again.")
        return False
    if last is not None and not last.exists():
        say(f"note: {last} was removed")
    elif last is not None:
        try:
            checkpoint.verify(last)
        except checkpoint.CheckpointError as error:
            raise InputError(
                f"{run_dir} is complete, and {error}. To have the run go on from the checkpoint before it, or from the "
                f"start where there is none, remove {path} and give the same command."
            ) from None
    return last is not None


def check_history(run_dir: Path, step: int, every: int, names: Collection[str]) -> None:
    """Refuses a run that continues after `step` without what it has recorded up to there and cannot make again.

    Args:
        every: of eval.every.
        names: of the benchmarks that each evaluation holds.
    Raises:
        InputError: naming the file, and how to go on.
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
        if evaluate.finished(folder, names) is None:
            raise InputError(f"{folder}: the evaluation after update {number} is damaged or missing. {then}")


def rewind(run_dir: Path, step: int, start: Path | None) -> None:
    """Removes what a run wrote after `step`, from where it continues: checkpoints, evaluations, token dumps, the
    summary.

    For a run that goes on from an older checkpoint they are an abandoned future; damaged checkpoints go with them.
    Checkpoints go first: stopped half-way, the run still continues from `step`. What the run did not write is left
    alone.

    Args:
        start: the checkpoint it continues from, if any.
    """
    checkpoint.remove_after(run_dir, step)
    if start is not None:
        checkpoint.point(start)
    (run_dir / "summary.json").unlink(missing_ok=True)
    for path, kind in ((run_dir / "metrics.jsonl", Row), (run_dir / "warnings.jsonl", Warned)):
        if path.exists():
            rows, damaged = whole_rows(path, kind)
            if damaged:
                say(f"warning: {path}: damaged lines are dropped, {damaged} in number")
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    for path in ((run_dir / "tokens").glob("step_*"), (run_dir / "eval").glob("step_*")):
        for written in path:
            if (number := step_number(written)) is not None and number > step:
                shutil.rmtree(written) if written.is_dir() else written.unlink()


def write_identity(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Creates the folder and config.json, unless a run that continues already has them."""
    try:
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
    except OSError as error:
        raise InputError(
            f"{run_dir} cannot be written ({error.strerror}). Set output_dir to a folder you may write to."
        ) from None


def _git_commit() -> str | None:
    result = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


def write_summary(run_dir: Path, names: Collection[str]) -> Summary:
    """summary.json: the final figures of a run, computed from its own files; `names` are its benchmarks."""
    rows = read_metrics(run_dir)
    evals = {
        folder.name: evaluate.finished(folder, names) for folder in (run_dir / "eval").glob("*") if folder.is_dir()
    }
    evals = {name: found for name, found in evals.items() if found is not None}
    steps = sorted((n for n in evals if step_number(Path(n)) is not None), key=lambda n: step_number(Path(n)))
    phases = sorted({k for row in rows for k in row if k.startswith("time/")})
    figures = {
        "steps": len(rows),
        "eval": {
            "teacher": evals.get("teacher"),
            "step_0": evals.get("step_000000"),
            "final": evals[steps[-1]] if steps else None,
        },
        "tokens": {k: sum(r[f"tokens/{k}"] for r in rows) for k in ("response", "kept")},
        "seconds": {k.removeprefix("time/"): sum(r.get(k, 0.0) for r in rows) for k in phases},
        "seconds_evaluating": sum(b["time/evaluation"] for n in (*steps, "teacher") for b in evals.get(n, {}).values()),
        "peak_memory_gb": max(r["memory/peak_gb"] for r in rows),
    }
    write_whole(run_dir / "summary.json", json.dumps(figures, indent=1) + "\n")
    return figures
