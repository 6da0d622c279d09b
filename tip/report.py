"""One table of several runs: accuracy before and after, what was kept, what it cost; with --out also figures and a
page.

    python -m tip.report outputs/tiny-all outputs/tiny-soft_or-0.5 [--out DIR]

Numbers come from the run folders alone. Runs that did not start from the same student, teacher and benchmark are
refused: their accuracies do not compare.
"""

from pathlib import Path

from opd.benchmarks import GREEDY
from opd.cli import Parser, command_line, main, path_argument
from opd.compare import evaluation_folder
from opd.errors import InputError
from opd.evaluate import percent, read_responses
from opd.files import filled, lock, write_whole
from tip.results import collect as results
from tip.results import page
from tip.results.grid import grid
from tip.results.runs import Run, mass_covered, read_run

PHASES = ("rollout", "teacher", "score", "update")


def table(runs: list[Run]) -> str:
    """Markdown: a block per benchmark with step-0 student, teacher and every run, then cost per run."""
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = _start(first), _start(run)
        for key in ours | theirs:
            if theirs.get(key) != ours.get(key):
                raise InputError(
                    f"{run.folder} and {first.folder} differ in {key} ({theirs.get(key)} and {ours.get(key)}): they "
                    "did not start alike, so their results do not compare. Report them one by one."
                )
    parts = [_accuracy_block(name, runs) for name in runs[0].summary["eval"]["step_0"] or {}]
    parts.append(
        "cost: seconds per phase, sum over all updates, and peak memory of the process\n\n"
        + grid(
            ("", *PHASES, "whole updates", "evaluations", "peak GiB", "run folder"), [_cost_row(run) for run in runs]
        )
    )
    return "\n\n".join(parts)


def _accuracy_block(name: str, runs: list[Run]) -> str:
    evaluations = runs[0].summary["eval"]
    start = evaluations["step_0"][name]
    rows = [
        ("step-0 student", *_accuracy_cells(start), "", ""),
        ("teacher", *_accuracy_cells(evaluations["teacher"][name]), "", ""),
        *((run.label, *_accuracy_cells(run.summary["eval"]["final"][name]), *_kept_cells(run)) for run in runs),
    ]
    header = ("", "greedy", f"mean@{start['k']}", "reverse KL", "tokens kept", "divergence mass covered")
    about = (
        f"{name}: accuracy in % over {start['problems']} problems, +- standard error over problems; reverse KL to the "
        "teacher in nats per token of the sampled responses"
    )
    return f"{about}\n\n{grid(header, rows)}"


def _accuracy_cells(figures: dict) -> tuple[str, str, str]:
    return (
        "-" if figures["greedy"] is None else percent(figures["greedy"], figures["greedy_se"]),
        "-" if figures["mean_at_k"] is None else percent(figures["mean_at_k"], figures["mean_at_k_se"]),
        "-" if figures["reverse_kl"] is None else f"{figures['reverse_kl']:.3f}",
    )


def _kept_cells(run: Run) -> tuple[str, str]:
    tokens, mass = run.summary["tokens"], mass_covered(run.folder)
    if tokens["kept"] == tokens["response"]:
        return "100.0 %", "100.0 %"
    share = 100 * tokens["kept"] / max(tokens["response"], 1)
    return f"{share:.1f} %", "not measured" if mass is None else f"{100 * mass:.1f} %"


def _cost_row(run: Run) -> tuple[str, ...]:
    seconds = run.summary["seconds"]
    return (
        run.label,
        *(f"{seconds[p]:.1f}" for p in (*PHASES, "step")),
        f"{run.summary['seconds_evaluating']:.1f}",
        f"{run.summary['peak_memory_gb']:.2f}",
        str(run.folder),
    )


def example(runs: list[Run]) -> str:
    """Responses to one problem of the first benchmark: step-0 student, teacher, every run at its end.

    The greedy ones, or the first samples where there are none. The problem is the first one that the step-0 student
    gets wrong (the first of all if there is none).
    """
    name = next(iter(runs[0].summary["eval"]["step_0"] or {}), None)
    if name is None:
        raise InputError(f"{runs[0].folder}: no evaluation in it, so there is no example. Set eval.benchmarks.")
    evaluations = runs[0].folder / "eval"
    responses = {"step-0 student": _first_responses(evaluations / "step_000000", name)}
    responses["teacher"] = _first_responses(evaluations / "teacher", name)
    responses |= {run.label: _first_responses(evaluation_folder(run.folder), name) for run in runs}
    start = responses["step-0 student"]
    for label, rows in responses.items():
        if start.keys() != rows.keys():
            raise InputError(
                f"{runs[0].folder}: step-0 student and {label} have not answered the same problems of {name}."
            )
    chosen = next((key for key, row in start.items() if not row["correct"]), next(iter(start)))
    how = "greedy" if start[chosen]["sample"] == GREEDY else "sampled"
    prompt = f"problem {chosen} of {name}, answer {start[chosen]['answer']}\n\n{_indented(start[chosen]['prompt'])}"
    return "\n\n".join(
        [prompt]
        + [
            f"{label}, {how}, {rows[chosen]['tokens']} tokens, "
            f"{'right' if rows[chosen]['correct'] else 'not right'}\n\n"
            f"{_indented(rows[chosen]['response'])}"
            for label, rows in responses.items()
        ]
    )


def _first_responses(folder: Path, name: str) -> dict[str, dict]:
    """Problem id -> its response with the lowest sample number (the greedy one has the lowest)."""
    rows = read_responses(folder / f"{name}.jsonl")
    first = min(row["sample"] for row in rows)
    return {row["id"]: row for row in rows if row["sample"] == first}


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().split("\n"))


def _start(run: Run) -> dict[str, object]:
    """What two runs must share for their accuracies to compare."""
    shared = {key: run.config[key] for key in ("student", "teacher", "data", "seed")}
    for name, figures in (run.summary["eval"]["step_0"] or {}).items():
        shared[f"benchmark {name}"] = {key: figures[key] for key in ("benchmark", "grader", "problems", "k")}
    return shared


def command(arguments: list[str]) -> None:
    parser = Parser("python -m tip.report", "One table of finished runs.")
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="also write table.md, figures and report.html there"
    )
    parser.add_argument("--example", action="store_true", help="also one problem's responses before and after")
    options = parser.parse_args(arguments)
    runs = [read_run(folder) for folder in options.runs]
    text = table(runs) + (f"\n\n{example(runs)}" if options.example else "")
    if options.out:
        with lock(options.out, "--out"), filled(options.out, "--out") as new:
            write_whole(new / "table.md", text + "\n")
            page.write(results.of_runs(runs) | {"command": command_line()}, new)
    print(text)


if __name__ == "__main__":
    main(command)
