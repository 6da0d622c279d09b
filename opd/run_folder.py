"""The folder of a run: what it was started with, where to continue, and its final figures."""

import hashlib
import json
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from opd import checkpoint
from opd.cli import InputError, command_line
from opd.config import ROOT
from opd.files import write_whole
from opd.metrics import read_metrics

VERSIONED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
DONE = "done"
MACHINE = {  # section -> keys that fit a run to a machine and change nothing else: it may continue with others
    "rollout": ("servers", "timeout", "gpu_memory"),
    "engine": ("phases",),
    "teacher": ("cache_gb",),
}


def open_run(run_dir: Path, identity: Mapping[str, Any], resume: str) -> Path | str | None:
    """Where to start: None for the beginning, the path of a checkpoint, or DONE. Changes nothing on disk.

    Raises InputError for a folder that is not a run, a run of another configuration (naming the differing keys), or a
    `resume` that does not fit.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir} is a file, expected a run folder. Choose another --set run_name=NAME.")
    if not run_dir.exists() or all(p.name.startswith(".") for p in run_dir.iterdir()):
        if resume not in ("auto", "none"):
            raise InputError(f"--resume {resume}: {run_dir} has no run to continue. Expected an existing run folder.")
        return None
    if resume == "none":
        raise InputError(f"{run_dir} exists, and --resume none starts a new run. Choose another --set run_name=NAME.")
    try:
        recorded = json.loads((run_dir / "config.json").read_text())
        there, here = {k: recorded.get(k) for k in identity}, json.loads(json.dumps(identity))
        there["config"], here["config"] = _anywhere(there["config"]), _anywhere(here["config"])
        differing = _differences(there, here)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
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
            if Path(resume).resolve().parent != (run_dir / "checkpoints").resolve():
                raise checkpoint.CheckpointError(f"{resume} does not stand in {run_dir / 'checkpoints'}")
            checkpoint.verify(Path(resume))
        except checkpoint.CheckpointError as error:
            raise InputError(f"--resume {resume}: {error}. Expected a whole checkpoint of {run_dir}.") from None
        return Path(resume)
    if (run_dir / "summary.json").exists():
        return DONE
    return checkpoint.newest(run_dir)


def alike(shared: Path, identity: Mapping[str, Any]) -> Path:
    """The folder below `shared` for runs that agree in all that decides how their step-0 models evaluate."""
    config = _anywhere(identity["config"])
    same = {key: config[key] for key in ("student", "teacher", "data", "rollout", "eval", "engine", "seed")}
    same |= {key: identity[key] for key in ("benchmarks", "grader", "files")}
    same["loss"] = config["loss"]["chunk_bytes"]  # of the reverse KL that an evaluation measures, to the last bit
    return shared / f"start_{hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]}"


def _anywhere(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what fits it to a machine."""
    return {
        section: {key: value for key, value in values.items() if key not in MACHINE[section]}
        if section in MACHINE
        else values
        for section, values in config.items()
    }


def digests(paths: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the problem files: other problems under the same name make another run. Raises InputError."""
    found = {}
    for path in paths:
        try:
            found[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}). Expected a JSONL file of problems.") from None
    return found


def rewind(run_dir: Path, step: int) -> None:
    """Removes what a run wrote after `step`, from where it continues: checkpoints, evaluations, token dumps, the summary.

    For a run that goes on from an older checkpoint they are an abandoned future; damaged checkpoints go with them.
    Checkpoints go first: stopped half-way, the run still continues from `step`.
    """
    checkpoint.remove_after(run_dir, step)
    (run_dir / "summary.json").unlink(missing_ok=True)
    warnings = run_dir / "warnings.jsonl"
    if warnings.exists():
        lines = warnings.read_text(encoding="utf-8").splitlines(keepends=True)
        write_whole(warnings, "".join(line for line in lines if json.loads(line)["step"] <= step))
    for tokens in (run_dir / "tokens").glob("step_*.jsonl"):
        if int(tokens.stem.removeprefix("step_")) > step:
            tokens.unlink()
    for folder in (run_dir / "eval").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path.removeprefix('config.')} (there {json.dumps(old)}, here {json.dumps(new)})"]


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
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout.strip() or None


def write_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json: the final figures of a run, computed from its own files."""
    rows = read_metrics(run_dir)
    evals = {p.parent.name: json.loads(p.read_text()) for p in sorted((run_dir / "eval").glob("*/summary.json"))}
    steps = sorted(n for n in evals if n.startswith("step_"))
    phases = sorted({k for row in rows for k in row if k.startswith("time/")})
    figures = {
        "steps": len(rows),
        "eval": {
            "teacher": evals.get("teacher"),
            "step_0": evals.get("step_000000"),
            "final": evals[steps[-1]] if steps else None,
        },
        "tokens": {k: sum(r[f"tokens/{k}"] for r in rows) for k in ("response", "kept")},
        "seconds": {k.removeprefix("time/"): sum(r[k] for r in rows) for k in phases},
        "seconds_evaluating": sum(b["time/evaluation"] for e in evals.values() for b in e.values()),
        "peak_memory_gb": max(r["memory/peak_gb"] for r in rows),
        "mass_covered": _mean(r["tip/mass_covered"] for r in rows if "tip/mass_covered" in r),
    }
    write_whole(run_dir / "summary.json", json.dumps(figures, indent=1) + "\n")
    return figures


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None
