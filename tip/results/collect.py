"""The results of arms x seeds, read from their run folders alone.

Three kinds of uncertainty are kept apart. *Over seeds*: the standard error of the mean of seeds, which holds everything
that makes two trainings differ. *Over samples*: the root mean square of the runs' own standard errors over problems.
*Paired*: the difference to a baseline arm with the same seeds and problems, whose interval (opd.accuracy) covers new
seeds and new problems, or with one seed new problems only.
"""

import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from opd.accuracy import Interval, paired_interval, standard_error
from opd.compare import finished_evaluations, per_problem
from opd.errors import InputError
from opd.files import whole_rows
from opd.measures import MEASURES
from opd.record.evaluation import Figures, read_summary
from opd.record.folder import ConfigFile, read_final, read_record
from opd.record.metrics import Warned, read_metrics
from tip.results import turns
from tip.results.types import PHASES, Accuracy, ArmResult, Comparison, Evaluation, Results, Warnings

Runs = Mapping[int, Path]  # seed -> folder
PerProblem = Callable[[Path], Mapping[str, Mapping[str, float]]]  # as opd.compare.per_problem


def collect(comparison: Comparison) -> Results:
    """Reads the run folders of a comparison. What is missing or failed is named with the reason."""
    finished = {
        label: {seed: folder for seed, folder in folders.items() if (folder / "summary.json").exists()}
        for label, folders in comparison.folders.items()
    }
    first_runs: dict[int, Path] = {}  # for every seed some finished run: all arms of a seed start alike
    for folders in finished.values():
        first_runs = folders | first_runs
    beginnings = [first_runs[seed] / "eval" for seed in sorted(first_runs)]
    first = next((folder for folders in finished.values() for folder in folders.values()), None)
    record: ConfigFile | dict[str, Any] = read_record(first) if first else {}
    read = cache(per_problem)  # a baseline is compared with every arm
    return Results(
        comparison=comparison,
        machine=machine(),
        arms={label: _arm(label, comparison, finished, read) for label, folders in finished.items() if folders},
        step_0_student=_evaluations(folder / "step_000000" for folder in beginnings),
        teacher=_evaluations(folder / "teacher" for folder in beginnings),
        folders=finished,
        missing={
            label: {seed: _reason(folder) for seed, folder in folders.items() if seed not in finished[label]}
            for label, folders in comparison.folders.items()
            if len(finished[label]) < len(folders)
        },
        config=record.get("config"),
        versions=record.get("versions"),
        git_commit=record.get("git_commit"),
        turns=_turns(comparison, finished, record),
    )


def _turns(comparison: Comparison, finished: Mapping[str, Runs], record: Mapping[str, Any]) -> turns.Turns | None:
    """The turns of conversations; the dumps of runs without an environment are not read."""
    if not record or record["config"]["data"].get("environment") is None:
        return None
    base = comparison.baselines[0]
    return turns.read(finished, base if finished[base] else next(label for label, runs in finished.items() if runs))


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU"


def _reason(folder: Path) -> str:
    failed = folder.with_name(f"{folder.name}.failed.txt")
    if failed.exists():
        return failed.read_text().strip().splitlines()[-1]
    return "not finished" if folder.exists() else "not started"


def _arm(label: str, comparison: Comparison, finished: Mapping[str, Runs], read: PerProblem) -> ArmResult:
    runs = finished[label]
    summaries = [read_final(folder) for folder in runs.values()]
    kept, responses = (sum(summary["tokens"][key] for summary in summaries) for key in ("kept", "response"))
    covered = [mass for folder in runs.values() if (mass := _mass_covered(folder)) is not None]
    baselines = {base: finished[base] for base in comparison.baselines if base != label and finished.get(base)}
    return ArmResult(
        seeds=tuple(sorted(runs)),
        retained=kept / max(responses, 1),
        mass_covered=fmean(covered) if covered else None,
        peak_memory_gb=max(summary["peak_memory_gb"] for summary in summaries),
        seconds=fmean(summary["seconds"]["step"] for summary in summaries),
        seconds_by_phase={phase: fmean(summary["seconds"][phase] for summary in summaries) for phase in PHASES},
        seconds_evaluating=fmean(summary["seconds_evaluating"] for summary in summaries),
        paper={benchmark: arms[label] for benchmark, arms in comparison.paper.items() if label in arms},
        evaluations=_evaluations_by_step(runs, baselines, read),
        warnings=_warnings(runs.values()),
    )


def _mass_covered(run_dir: Path) -> float | None:
    """Share of the divergence that the kept tokens carry, mean over the updates that measured it; None: none did."""
    shares = [row["tip/mass_covered"] for row in read_metrics(run_dir) if "tip/mass_covered" in row]
    return fmean(shares) if shares else None


def _warnings(folders: Iterable[Path]) -> dict[str, Warnings]:
    messages: dict[str, list[str]] = {}
    for folder in folders:
        path = folder / "warnings.jsonl"
        for row in whole_rows(path, Warned)[0] if path.exists() else []:
            messages.setdefault(row["kind"], []).append(row["message"])
    return {kind: Warnings(len(texts), texts[0]) for kind, texts in messages.items()}


def _evaluations_by_step(
    runs: Runs, baselines: Mapping[str, Runs], read: PerProblem
) -> dict[int, dict[str, Evaluation]]:
    """Of the trained student, with the differences to the baselines."""
    by_step = {}
    for step in sorted({step for folder in runs.values() for step in finished_evaluations(folder)} - {0}):
        evaluations = _evaluations(folder / "eval" / f"step_{step:06d}" for folder in runs.values())
        by_step[step] = {
            name: replace(
                e, differences={b: _differences(runs, of_b, step, name, read) for b, of_b in baselines.items()}
            )
            for name, e in evaluations.items()
        }
    return by_step


def _evaluations(folders: Iterable[Path]) -> dict[str, Evaluation]:
    """Benchmark -> the evaluation over seeds, from the folders that hold one."""
    summaries = [read_summary(folder) for folder in folders if (folder / "summary.json").exists()]
    return {name: _evaluation([summary[name] for summary in summaries]) for name in (summaries or [{}])[0]}


def _evaluation(by_seed: list[Figures]) -> Evaluation:
    accuracies = {metric: _accuracy(by_seed, metric) for metric in MEASURES}
    reverse_kl = [figures["reverse_kl"] for figures in by_seed if figures["reverse_kl"] is not None]
    return Evaluation(
        problems=by_seed[0]["problems"],
        k=by_seed[0]["k"],
        accuracies={metric: accuracy for metric, accuracy in accuracies.items() if accuracy is not None},
        reverse_kl=fmean(reverse_kl) if reverse_kl else None,
        differences={},
    )


def _accuracy(by_seed: list[Figures], metric: str) -> Accuracy | None:
    shares = tuple(figures[metric] for figures in by_seed if figures.get(metric) is not None)
    if not shares:
        return None
    errors = [error for figures in by_seed if (error := figures.get(f"{metric}_se")) is not None]
    return Accuracy(
        mean=fmean(shares),
        by_seed=shares,
        se_seeds=standard_error(shares),
        se_samples=math.sqrt(fmean(error * error for error in errors)) if errors else None,
    )


def _differences(arm: Runs, base: Runs, step: int, name: str, read: PerProblem) -> dict[str, Interval]:
    """Measure -> arm minus base on a benchmark."""
    intervals = {metric: paired_difference(arm, base, step, name, metric, read) for metric in MEASURES}
    return {metric: interval for metric, interval in intervals.items() if interval is not None}


def paired_difference(
    arm: Runs, base: Runs, step: int, name: str, metric: str, read: PerProblem = per_problem
) -> Interval | None:
    """Arm minus base over the seeds and problems that both have after an update; None where there are none.

    Raises InputError where the seeds have no problem in common.
    """
    by_seed = []
    for seed in sorted(arm.keys() & base.keys()):
        ours, theirs = (runs[seed] / "eval" / f"step_{step:06d}" / f"{name}.jsonl" for runs in (arm, base))
        if ours.exists() and theirs.exists():
            our_mean, their_mean = read(ours)[metric], read(theirs)[metric]
            if common := our_mean.keys() & their_mean.keys():
                by_seed.append({problem: our_mean[problem] - their_mean[problem] for problem in common})
    try:
        return paired_interval(by_seed) if by_seed else None
    except ValueError as error:
        raise InputError(
            f"{name} at step_{step:06d}: {error} Measure all seeds on the same problems, or give runs of one seed at a "
            "time."
        ) from None


def curve(runs: Runs, metric: str) -> dict[float, float]:
    """Update -> mean over seeds of a metric of metrics.jsonl, where every seed has it."""
    rows = [{row["step"]: row[metric] for row in read_metrics(f) if metric in row} for f in runs.values()]
    common = sorted(set.intersection(*map(set, rows))) if rows else []
    return {step: fmean(row[step] for row in rows) for step in common}
