"""One table of several runs: accuracy before and after, what was kept, what it cost; with --out also figures and a
page.

    python -m tip.report outputs/tiny-all outputs/tiny-soft_or-0.5 [--out DIR]

Numbers come from the run folders alone. Runs that did not start from the same student, teacher and benchmark are
refused: their accuracies do not compare.
"""

from collections.abc import Sequence
from pathlib import Path

from opd.cli import command_line, main
from opd.compare import evaluation_folder
from opd.errors import InputError
from opd.files import filled, lock
from opd.measures import GREEDY
from opd.record.evaluation import read_responses
from tip.commands import COMMANDS
from tip.results import files
from tip.results.collect import collect
from tip.results.comparison import of_runs
from tip.results.grid import show
from tip.results.markdown import markdown
from tip.results.runs import Run, check_alike, read_run
from tip.results.types import Results


def results_of(runs: Sequence[Run], command: str = "") -> Results:
    """What the table shows. Raises InputError for runs that did not start alike."""
    check_alike(runs)
    return collect(of_runs(runs, command))


def example(runs: Sequence[Run]) -> str:
    """Responses to one problem of the first benchmark: step-0 student, teacher, every run at its end.

    The greedy ones, or the first samples where there are none. The problem is the first one that the step-0 student
    gets wrong (the first of all if there is none).
    """
    name = next(iter(runs[0].summary["eval"]["step_0"] or {}), None)
    if name is None:
        raise InputError(f"{runs[0].folder}: no evaluation in it, so there is no example. Set eval.benchmarks.")
    evaluations = runs[0].folder / "eval"
    folders = {"step-0 student": evaluations / "step_000000"}
    folders |= {"teacher": evaluations / "teacher"} if runs[0].evaluates_teacher else {}
    folders |= {run.label: evaluation_folder(run.folder) for run in runs}
    responses = {label: _first_responses(folder, name) for label, folder in folders.items()}
    start = responses["step-0 student"]
    for label, rows in responses.items():
        if start.keys() != rows.keys():
            raise InputError(
                f"{runs[0].folder}: step-0 student and {label} have not answered the same problems of {name}."
            )
    chosen = next((key for key, row in start.items() if not row["correct"]), next(iter(start)))
    how = "greedy" if start[chosen]["sample"] == GREEDY else "sampled"
    prompt = f"problem {chosen} of {name}, answer {start[chosen]['answer']}\n\n{_indented(start[chosen]['prompt'])}"
    parts = [prompt]
    for label, rows in responses.items():
        row, verdict = rows[chosen], "right" if rows[chosen]["correct"] else "not right"
        parts.append(f"{label}, {how}, {row['tokens']} tokens, {verdict}\n\n{_indented(row['response'])}")
    return "\n\n".join(parts)


def _first_responses(folder: Path, name: str) -> dict[str, dict]:
    """Problem id -> its response with the lowest sample number (the greedy one has the lowest)."""
    rows = read_responses(folder / f"{name}.jsonl")
    first = min(row["sample"] for row in rows)
    return {row["id"]: row for row in rows if row["sample"] == first}


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().split("\n"))


def command(arguments: list[str]) -> None:
    options = COMMANDS["report"].parser().parse_args(arguments)
    runs = [read_run(folder) for folder in options.runs]
    results = results_of(runs, command_line())
    responses = example(runs) if options.example else ""
    text = markdown(results) + (f"\n{responses}\n" if responses else "")
    if options.out:
        with lock(options.out, "--out"), filled(options.out, "--out") as new:
            files.write(results, text, new, responses)
    show(text.removesuffix("\n"))


if __name__ == "__main__":
    main(command)
