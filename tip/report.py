"""One table of several runs: accuracy before and after, what was kept, what it cost.

    python -m tip.report outputs/tiny-all outputs/tiny-soft_or-0.5 [--out DIR]

Numbers come from the run folders alone. Runs that did not start from the same student, teacher and benchmark are
refused: their accuracies do not compare.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from opd.cli import InputError, main
from opd.evaluate import percent
from opd.metrics import write_whole

PHASES = ("rollout", "teacher", "score", "update")


@dataclass(frozen=True)
class Run:
    folder: Path
    label: str
    config: dict
    summary: dict


def read_run(folder: Path) -> Run:
    """Reads a finished run. Raises InputError when it is not one."""
    try:
        config = json.loads((folder / "config.json").read_text())["config"]
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: not a finished run ({error}). Expected config.json and summary.json in it."
        ) from None
    tip = config.get("tip")
    label = f"{tip['rule']} {tip['retention']:g}" if tip and tip["rule"] != "all" else "all tokens"
    return Run(folder, label, config, summary)


def table(runs: list[Run]) -> str:
    """Markdown: a block per benchmark with step-0 student, teacher and every run, then cost per run."""
    first = runs[0]
    for run in runs[1:]:
        for key in ("teacher", "step_0"):
            if _accuracies(run.summary["eval"][key]) != _accuracies(first.summary["eval"][key]):
                raise InputError(
                    f"{run.folder} and {first.folder} differ in the accuracy of {key}: they do not start from "
                    "the same pair, benchmark and seed, so their results do not compare."
                )
    parts = []
    for name, start in (first.summary["eval"]["step_0"] or {}).items():
        rows = [("step-0 student", start, "", ""), ("teacher", first.summary["eval"]["teacher"][name], "", "")]
        for run in runs:
            tokens, mass = run.summary["tokens"], run.summary["mass_covered"]
            everything = tokens["kept"] == tokens["response"]
            rows.append(
                (
                    run.label,
                    run.summary["eval"]["final"][name],
                    f"{100 * tokens['kept'] / tokens['response']:.1f} %",
                    "100.0 %" if everything else "not measured" if mass is None else f"{100 * mass:.1f} %",
                )
            )
        k = start["k"]
        parts.append(
            f"{name}: accuracy in % over {start['problems']} problems, +- standard error over problems\n\n"
            + _grid(
                ("", "greedy", f"mean@{k}", "tokens kept", "divergence mass covered"),
                [
                    (
                        label,
                        percent(v["greedy"], v["greedy_se"]),
                        percent(v["mean_at_k"], v["mean_at_k_se"]) if k else "-",
                        kept,
                        mass,
                    )
                    for label, v, kept, mass in rows
                ],
            )
        )
    parts.append(
        "cost: seconds per phase, sum over all updates, and peak memory of the process\n\n"
        + _grid(
            ("", *PHASES, "whole updates", "evaluations", "peak GiB", "run folder"),
            [
                (
                    run.label,
                    *(f"{run.summary['seconds'][p]:.1f}" for p in PHASES),
                    f"{run.summary['seconds']['step']:.1f}",
                    f"{run.summary['seconds_evaluating']:.1f}",
                    f"{run.summary['peak_memory_gb']:.2f}",
                    str(run.folder),
                )
                for run in runs
            ],
        )
    )
    return "\n\n".join(parts)


def _accuracies(evaluations: dict | None) -> dict:
    return {
        name: (v["greedy"], v["mean_at_k"], v["problems"], v["benchmark"]) for name, v in (evaluations or {}).items()
    }


def _grid(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    line = lambda row: "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tip.report", description="One table of finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/table.md")
    options = parser.parse_args(arguments)
    text = table([read_run(folder) for folder in options.runs])
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_whole(options.out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main(command)
