"""The results of arms x seeds, from their run folders alone: table.md, table.csv, table.json.

Three kinds of uncertainty are kept apart. *Over seeds*: the standard error of the mean of seeds, which holds everything
that makes two trainings differ. *Over samples*: the root mean square of the runs' own standard errors over problems.
*Paired*: the difference to a baseline arm with the same seeds and problems, whose interval (opd.accuracy) covers new
seeds and new problems, or with one seed new problems only.
"""

import csv
import io
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from opd.accuracy import PROBLEMS_ONLY, SEEDS_AND_PROBLEMS, paired_interval
from opd.compare import per_problem
from opd.config import ROOT, read_json_object
from opd.errors import InputError
from opd.evaluate import read_summary
from opd.files import step_number, whole_rows, write_whole
from opd.record.folder import read_final, read_record
from opd.record.metrics import Warned, read_metrics
from tip.results.grid import grid
from tip.results.runs import Run, mass_covered
from tip.tables import Table

METRICS = {"greedy": "greedy", "mean_at_k": "mean@k"}
CPU_MEMORY = "On a CPU peak memory is the process's, with the evaluations it ran: it does not compare rules."


def paper() -> dict[str, Any]:
    """The numbers of the paper (data/paper/tables.json)."""
    return json.loads((ROOT / "data" / "paper" / "tables.json").read_text())


def of_table(table: Table, root: Path, seeds: list[int], pair: str, models: tuple[str, str]) -> dict[str, Any]:
    """Everything of a table as plain data.

    Args:
        root: holds seed_<n>/<arm>.
        pair: name of the pair file.
        models: paths of student and teacher; the paper's values are shown only where they are those of its pair file.
    """
    facts = paper()["tables"][table.paper]["pairs"].get(pair, {}) if table.paper else {}
    if facts:
        shipped = read_json_object(ROOT / "configs" / f"{pair}.json")
        facts = facts if models == (shipped["student"]["path"], shipped["teacher"]["path"]) else {}
    return collect(
        name=table.name,
        title=table.title,
        pair=pair,
        seeds=seeds,
        baselines=list(table.baselines),
        every_evaluation=table.every_evaluation,
        facts=facts,
        panels=[{"title": title, "arms": [arm.label for arm in panel]} for title, panel in table.panels],
        settings={arm.label: arm.settings for arm in table.arms},
        arms={arm.label: {seed: root / f"seed_{seed}" / arm.slug for seed in seeds} for arm in table.arms},
    )


def of_runs(runs: list[Run]) -> dict[str, Any]:
    """The same of any finished runs that start alike: one panel, compared with the first."""
    label = {run.folder: run.label for run in runs}
    arms: dict[str, dict[int, Path]] = {}
    for run in runs:
        taken = run.config["seed"] in arms.get(label[run.folder], {})
        arms.setdefault(run.folder.name if taken else label[run.folder], {})[run.config["seed"]] = run.folder
    settings = {
        run.label: {f"tip.{k}": run.config["tip"][k] for k in ("rule", "retention")} if "tip" in run.config else {}
        for run in runs
    }
    return collect(
        name="runs",
        title="Runs",
        pair=runs[0].config["run_name"],
        seeds=sorted({run.config["seed"] for run in runs}),
        baselines=[next(iter(arms))],
        every_evaluation=False,
        facts={},
        panels=[{"title": "runs", "arms": list(arms)}],
        settings={name: settings.get(name, {}) for name in arms},
        arms=arms,
    )


def collect(
    *,
    name: str,
    title: str,
    pair: str,
    seeds: list[int],
    baselines: list[str],
    every_evaluation: bool,
    facts: dict[str, Any],
    panels: list[dict[str, Any]],
    settings: dict[str, Any],
    arms: dict[str, dict[int, Path]],
) -> dict[str, Any]:
    """Reads the run folders of arms (label -> seed -> folder). What is missing or failed is named with the reason.

    Args:
        facts: benchmark -> label -> [mean, +-] of the paper, where the pair is one of its.
    """
    done = {
        label: {s: f for s, f in folders.items() if (f / "summary.json").exists()} for label, folders in arms.items()
    }
    result = {
        "table": name,
        "title": title,
        "pair": pair,
        "seeds": seeds,
        "baselines": baselines,
        "every_evaluation": every_evaluation,
        "machine": machine(),
        "paper_pair": bool(facts),
        "panels": panels,
        "settings": settings,
        "folders": {label: {str(s): str(f) for s, f in found.items()} for label, found in done.items()},
        "missing": {
            label: {str(s): _reason(f) for s, f in folders.items() if s not in done[label]}
            for label, folders in arms.items()
            if len(done[label]) < len(folders)
        },
    }
    first = next((f for found in done.values() for f in found.values()), None)
    if first is None:
        return result | {
            "arms": {},
            "start": {},
            "config": None,
            "versions": None,
            "git_commit": None,
            "comparisons": 0,
        }
    record = read_record(first)
    result |= {key: record[key] for key in ("config", "versions", "git_commit")}
    result["start"] = {
        who: _accuracies({s: f / "eval" / folder for s, f in done_first(done).items()})
        for who, folder in (("step-0 student", "step_000000"), ("teacher", "teacher"))
    }
    result["arms"] = {label: _arm(found, facts, label) for label, found in done.items() if found}
    for label, found in result["arms"].items():
        found["differences"] = {
            base: _differences(done[base], done[label]) for base in baselines if base != label and done.get(base)
        }
    compared = [steps for arm in result["arms"].values() for steps in arm["differences"].values()]
    result["comparisons"] = sum(
        len(metrics) for steps in compared for blocks in steps.values() for metrics in blocks.values()
    )
    return result


def done_first(done: dict[str, dict[int, Path]]) -> dict[int, Path]:
    """For every seed some finished run: the start is the same for all arms of a seed."""
    found: dict[int, Path] = {}
    for folders in done.values():
        found = folders | found
    return dict(sorted(found.items()))


def evaluated_steps(run_dir: Path) -> list[str]:
    """Names of a run's finished evaluations of its student."""
    finished = (path.parent for path in (run_dir / "eval").glob("step_*/summary.json"))
    return sorted(folder.name for folder in finished if step_number(folder) is not None)


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU"


def _reason(folder: Path) -> str:
    failed = folder.with_name(f"{folder.name}.failed.txt")
    if failed.exists():
        return failed.read_text().strip().splitlines()[-1]
    return "not finished" if folder.exists() else "not started"


def _arm(folders: dict[int, Path], facts: dict[str, Any], label: str) -> dict[str, Any]:
    summaries = {seed: read_final(f) for seed, f in folders.items()}
    tokens = [s["tokens"] for s in summaries.values()]
    covered = [mass for mass in map(mass_covered, folders.values()) if mass is not None]
    steps = sorted({name for f in folders.values() for name in evaluated_steps(f)})
    return {
        "seeds": sorted(folders),
        "retained": sum(t["kept"] for t in tokens) / max(sum(t["response"] for t in tokens), 1),
        "mass_covered": statistics.fmean(covered) if covered else None,
        "peak_memory_gb": max(s["peak_memory_gb"] for s in summaries.values()),
        "seconds": statistics.fmean(s["seconds"]["step"] for s in summaries.values()),
        "paper": {benchmark: values[label] for benchmark, values in facts.items() if label in values},
        "evaluations": {
            str(int(step.removeprefix("step_"))): _accuracies({s: f / "eval" / step for s, f in folders.items()})
            for step in steps
            if step != "step_000000"
        },
        "warnings": _warnings(folders),
    }


def _warnings(folders: dict[int, Path]) -> dict[str, dict[str, Any]]:
    """Kind -> how often, and the first message."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders.values():
        path = folder / "warnings.jsonl"
        for row in whole_rows(path, Warned)[0] if path.exists() else []:
            found.setdefault(row["kind"], {"times": 0, "first": row["message"]})["times"] += 1
    return found


def _accuracies(folders: dict[int, Path]) -> dict[str, Any]:
    """Benchmark -> metric -> mean over seeds, both standard errors, and the values themselves."""
    summaries = [read_summary(f) for f in folders.values() if (f / "summary.json").exists()]
    found: dict[str, Any] = {}
    for name in summaries[0] if summaries else ():
        figures = [summary[name] for summary in summaries]
        found[name] = {"problems": figures[0]["problems"], "k": figures[0]["k"], "metrics": {}}
        for metric in METRICS:
            values = [f[metric] for f in figures if f[metric] is not None]
            if values:
                errors = [f[f"{metric}_se"] for f in figures if f[f"{metric}_se"] is not None]
                found[name]["metrics"][metric] = {
                    "mean": statistics.fmean(values),
                    "values": values,
                    "se_seeds": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
                    "se_samples": math.sqrt(statistics.fmean(e * e for e in errors)) if errors else None,
                }
        reverse = [f["reverse_kl"] for f in figures if f["reverse_kl"] is not None]
        found[name]["reverse_kl"] = statistics.fmean(reverse) if reverse else None
    return found


def _differences(base: dict[int, Path], arm: dict[int, Path]) -> dict[str, Any]:
    """Step -> benchmark -> metric -> paired difference (arm minus base) over the seeds that both have."""
    seeds = sorted(base.keys() & arm.keys())
    found: dict[str, Any] = {}
    steps = sorted({name for s in seeds for name in evaluated_steps(arm[s])} - {"step_000000"})
    for step in steps:
        blocks: dict[str, Any] = {}
        for path in sorted((arm[seeds[0]] / "eval" / step).glob("*.jsonl")):
            for metric, greedy in (("greedy", True), ("mean_at_k", False)):
                differences = []
                for seed in seeds:
                    ours, theirs = (f[seed] / "eval" / step / path.name for f in (arm, base))
                    if ours.exists() and theirs.exists():
                        a, b = per_problem(theirs, greedy), per_problem(ours, greedy)
                        if common := a.keys() & b.keys():
                            differences.append({key: b[key] - a[key] for key in common})
                if differences:
                    blocks.setdefault(path.stem, {})[metric] = _paired(differences, f"{path.stem} at {step}")
        found[str(int(step.removeprefix("step_")))] = blocks
    return found


def _paired(differences: list[dict[str, float]], where: str) -> dict[str, Any]:
    try:
        found = paired_interval(differences)
    except ValueError as error:
        raise InputError(
            f"{where}: {error} Measure all seeds on the same problems, or give runs of one seed at a time."
        ) from None
    return {
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "seeds": len(found.by_seed),
        "wins": sum(mean > 0 for mean in found.by_seed),
        "by_seed": list(found.by_seed),
        "covers": found.covers,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table to read: a block per evaluated step (or the last), benchmark and panel."""
    parts = [f"# {result['title']}", about(result)]
    arms = result["arms"]
    if not arms:
        return "\n\n".join([*parts, "No run has finished.", _missing(result)]) + "\n"
    steps = list(dict.fromkeys(step for arm in arms.values() for step in arm["evaluations"]))
    for step in steps if result["every_evaluation"] else steps[-1:]:
        for name in dict.fromkeys(n for arm in arms.values() for n in arm["evaluations"].get(step, {})):
            parts.append(f"## {name} after update {step}")
            for panel in result["panels"]:
                parts.append(f"{panel['title']}\n\n" + _panel(result, panel["arms"], name, step))
    chance = result["comparisons"] // 20
    parts.append(
        'Accuracy in %: mean over seeds +- standard error over seeds (standard error over samples). "-": not measured. '
        f"Differences in points, paired by seed and problem, with {covered(result)}, and the "
        f"number of seeds on which the arm is better. table.json holds {result['comparisons']} such differences"
        + (f"; if nothing differed, some {chance} of their intervals would miss 0 all the same." if chance else ".")
        + (f" {CPU_MEMORY}" if result["machine"].endswith("no GPU") else "")
    )
    parts += [text for text in (_missing(result), _warning_lines(result)) if text]
    return "\n\n".join(parts) + "\n"


def covered(result: dict[str, Any]) -> str:
    """What the 95 % intervals of a table cover; in a stopped table some can be of one seed, others of more."""
    kinds = {
        found["covers"]
        for arm in result["arms"].values()
        for steps in arm["differences"].values()
        for blocks in steps.values()
        for metrics in blocks.values()
        for found in metrics.values()
    }
    one = "over problems only (it says nothing about another training)"
    if SEEDS_AND_PROBLEMS not in kinds:
        return f"a 95 % interval {one}"
    rest = f"; where one seed is compared (0/1 or 1/1), {one}" if PROBLEMS_ONLY in kinds else ""
    return f"a 95 % interval that covers {SEEDS_AND_PROBLEMS}{rest}"


def about(result: dict[str, Any]) -> str:
    return (
        f"{result.get('command', '')}\n\npair {result['pair']}, seeds {', '.join(map(str, result['seeds']))}, "
        f"commit {result['git_commit']}, {result['machine']}"
    )


def _panel(result: dict[str, Any], labels: list[str], name: str, step: str) -> str:
    baselines, metrics = result["baselines"], _measured(result, name)
    k = next(iter(result["arms"].values()))["evaluations"][step][name]["k"]
    titles = {"greedy": "greedy", "mean_at_k": f"mean@{k}"}
    header = ["arm", *(titles[m] for m in metrics), *(["paper"] if result["paper_pair"] else [])]
    header += [f"{titles[m]} - {base}" for base in baselines for m in metrics]
    header += ["tokens kept", "divergence covered", "peak GiB", "s"]
    rows = []
    for who, found in result["start"].items():
        if name in found:
            cells = [accuracy(found[name]["metrics"].get(m)) for m in metrics]
            rows.append((who, *cells, *[""] * (len(header) - 1 - len(cells))))
    for label in labels:
        arm = result["arms"].get(label)
        if arm is None or name not in arm["evaluations"].get(step, {}):
            rows.append((label, "no run finished", *[""] * (len(header) - 2)))
            continue
        row = [label, *(accuracy(arm["evaluations"][step][name]["metrics"].get(m)) for m in metrics)]
        if result["paper_pair"]:
            value = arm["paper"].get(name)
            row.append(f"{value[0]:.1f} +- {value[1]:.1f}" if value else "-")
        for base in baselines:
            blocks = arm["differences"].get(base, {}).get(step, {}).get(name, {})
            row += [difference(blocks.get(m)) for m in metrics]
        row += [
            f"{100 * arm['retained']:.1f} %",
            _covered(arm),
            f"{arm['peak_memory_gb']:.2f}",
            f"{arm['seconds']:.1f}",
        ]
        rows.append(tuple(row))
    return grid(tuple(header), rows)


def _measured(result: dict[str, Any], name: str) -> list[str]:
    found = {
        m
        for arm in result["arms"].values()
        for e in arm["evaluations"].values()
        if name in e
        for m in e[name]["metrics"]
    }
    return [metric for metric in METRICS if metric in found]


def _covered(arm: dict[str, Any]) -> str:
    if arm["retained"] == 1:
        return "100.0 %"
    return "-" if arm["mass_covered"] is None else f"{100 * arm['mass_covered']:.1f} %"


def accuracy(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    seeds = "" if found["se_seeds"] is None else f" +- {100 * found['se_seeds']:.1f}"
    samples = "" if found["se_samples"] is None else f" ({100 * found['se_samples']:.1f})"
    return f"{100 * found['mean']:.1f}{seeds}{samples}"


def difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {found['wins']}/{found['seeds']}"


def _missing(result: dict[str, Any]) -> str:
    lines = [f"- {label}, seed {s}: {why}" for label, runs in result["missing"].items() for s, why in runs.items()]
    return "Not in the table:\n\n" + "\n".join(lines) if lines else ""


def _warning_lines(result: dict[str, Any]) -> str:
    lines = [
        f"- {label}: {found['times']} x {kind}, first {found['first']}"
        for label, arm in result["arms"].items()
        for kind, found in arm["warnings"].items()
    ]
    return "Warnings of the runs:\n\n" + "\n".join(lines) if lines else ""


def table_csv(result: dict[str, Any]) -> str:
    """One row per panel, arm, benchmark, evaluated step and metric; accuracies and differences as shares."""
    file = io.StringIO()
    columns = [
        "panel",
        "arm",
        "benchmark",
        "step",
        "metric",
        "seeds",
        "mean",
        "se_seeds",
        "se_samples",
        "paper",
        "paper_pm",
        "retained",
        "mass_covered",
        "peak_memory_gb",
        "seconds",
    ]
    columns += [
        f"{what} {base}" for base in result["baselines"] for what in ("difference to", "low of", "high of", "covers of")
    ]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for panel in result["panels"]:
        for label in panel["arms"]:
            arm = result["arms"].get(label)
            for step, blocks in (arm["evaluations"] if arm else {}).items():
                for name, block in blocks.items():
                    for metric, found in block["metrics"].items():
                        value = arm["paper"].get(name) if metric == "mean_at_k" else None
                        row = [
                            panel["title"],
                            label,
                            name,
                            step,
                            metric,
                            len(found["values"]),
                            found["mean"],
                            found["se_seeds"],
                            found["se_samples"],
                            *([v / 100 for v in value] if value else ["", ""]),
                            arm["retained"],
                            arm["mass_covered"],
                            arm["peak_memory_gb"],
                            arm["seconds"],
                        ]
                        for base in result["baselines"]:
                            d = arm["differences"].get(base, {}).get(step, {}).get(name, {}).get(metric)
                            row += [d[key] for key in ("mean", "low", "high", "covers")] if d else [""] * 4
                        writer.writerow(row)
    return file.getvalue()


def write(result: dict[str, Any], out: Path) -> None:
    """table.md, table.csv and table.json, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "table.json", json.dumps(result, indent=1) + "\n")
    write_whole(out / "table.csv", table_csv(result))
    write_whole(out / "table.md", markdown(result))


def curves(folders: dict[str, str], name: str) -> tuple[list[float], list[float]]:
    """Mean over seeds of a metric of metrics.jsonl, at the updates where every seed has it."""
    rows = [{r["step"]: r[name] for r in read_metrics(Path(f)) if name in r} for f in folders.values()]
    common = sorted(set.intersection(*(set(r) for r in rows))) if rows else []
    return common, [statistics.fmean(r[step] for r in rows) for step in common]
