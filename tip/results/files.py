"""The files of a comparison: table.md to read, table.csv and table.json to compute with, figures, report.html, and
tokens.html where the runs have token dumps.
"""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd.accuracy import Interval
from opd.files import write_whole
from tip.results import page, token_map
from tip.results.types import ArmResult, Evaluation, Results


def write(results: Results, text: str, out: Path, example: str = "") -> None:
    """Writes all of them into `out`, each whole or not at all.

    `text` is what table.md holds. The page shows `example`, which is Markdown of one problem's responses.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "table.json", json.dumps(as_json(results), indent=1) + "\n")
    write_whole(out / "table.csv", as_csv(results))
    write_whole(out / "table.md", text)
    if results.arms:
        _write_token_map(results, out / "tokens.html")
        page.write(results, example, out)


def _write_token_map(results: Results, path: Path) -> None:
    """Writes the token map of one seed of every arm that can be mapped, the arms that select first."""
    baselines = results.comparison.baselines
    first = {label: next(iter(runs.values())) for label, runs in results.folders.items() if runs}
    labels = sorted(filter(lambda a: token_map.can_be_mapped(first[a]), first), key=lambda a: a in baselines)
    if labels:
        runs = {label: first[label] for label in labels}
        write_whole(path, token_map.page_of(runs, f"Token map: {results.comparison.title}"))


def as_json(results: Results) -> dict[str, Any]:
    """Everything as plain data; accuracies and differences are shares."""
    comparison = asdict(results.comparison)
    return {
        "table": comparison.pop("name"),
        "paper_pair": bool(comparison.pop("paper")),
        **comparison,
        "machine": results.machine,
        "folders": {label: {seed: str(f) for seed, f in runs.items()} for label, runs in results.folders.items()},
        "missing": results.missing,
        "config": results.config,
        "versions": results.versions,
        "git_commit": results.git_commit,
        "start": {"step-0 student": _by_benchmark(results.step_0_student), "teacher": _by_benchmark(results.teacher)},
        "arms": {label: _arm(arm) for label, arm in results.arms.items()},
        "comparisons": len(list(results.differences)),
        "turns": results.turns and asdict(results.turns),
    }


def _arm(arm: ArmResult) -> dict[str, Any]:
    differences: dict[str, Any] = {}  # baseline -> step -> benchmark -> metric
    for step, evaluations in arm.evaluations.items():
        for name, evaluation in evaluations.items():
            for base, intervals in evaluation.differences.items():
                by_metric = {metric: _interval(interval) for metric, interval in intervals.items()}
                differences.setdefault(base, {}).setdefault(step, {})[name] = by_metric
    by_step = {step: _by_benchmark(evaluations) for step, evaluations in arm.evaluations.items()}
    return asdict(arm) | {"evaluations": by_step, "differences": differences}


def _by_benchmark(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    return {
        name: {
            "problems": evaluation.problems,
            "k": evaluation.k,
            "metrics": {
                metric: {
                    "mean": accuracy.mean,
                    "values": accuracy.by_seed,
                    "se_seeds": accuracy.se_seeds,
                    "se_samples": accuracy.se_samples,
                }
                for metric, accuracy in evaluation.accuracies.items()
            },
            "reverse_kl": evaluation.reverse_kl,
        }
        for name, evaluation in evaluations.items()
    }


def _interval(interval: Interval) -> dict[str, Any]:
    return asdict(interval) | {"seeds": len(interval.by_seed), "wins": interval.wins}


def as_csv(results: Results) -> str:
    """One row per panel, arm, benchmark, evaluated step and metric; accuracies and differences as shares."""
    baselines = results.comparison.baselines
    columns = ["panel", "arm", "benchmark", "step", "metric", "seeds", "mean", "se_seeds", "se_samples", "paper"]
    columns += ["paper_pm", "retained", "mass_covered", "peak_memory_gb", "seconds"]
    columns += [f"{what} {base}" for base in baselines for what in ("difference to", "low of", "high of", "covers of")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for panel in results.comparison.panels:
        for label in filter(results.arms.get, panel.arms):
            arm = results.arms[label]
            for step, evaluations in arm.evaluations.items():
                for name, evaluation in evaluations.items():
                    for metric, accuracy in evaluation.accuracies.items():
                        in_paper = arm.paper.get(name) if metric == results.comparison.paper_metric else None
                        cells = [len(accuracy.by_seed), accuracy.mean, accuracy.se_seeds, accuracy.se_samples]
                        cells += [percent / 100 for percent in in_paper] if in_paper else ["", ""]
                        cells += [arm.retained, arm.mass_covered, arm.peak_memory_gb, arm.seconds]
                        for base in baselines:
                            i = evaluation.differences.get(base, {}).get(metric)
                            cells += [i.mean, i.low, i.high, i.covers] if i else [""] * 4
                        writer.writerow([panel.title, label, name, step, metric, *cells])
    return file.getvalue()
