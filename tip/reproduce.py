"""A table of the paper as one command: arms x seeds -> runs -> table.

    python -m tip.reproduce --table 5 --config configs/tiny.json --seeds 0,1,2 [--jobs 2] [--set KEY=VALUE ...]

A table is data (configs/tables/): its arms are settings of a pair file. A run lies in
`<output_dir>/<run_name>-reproduce/seed_<n>/<arm>` and serves every table that has the arm. Finished runs are found and
left alone, stopped ones continue, a failed one is reported and the others go on. The arms of a seed share the
evaluations of step-0 student and teacher. With `--jobs` several processes work at a time: each takes a seed with all of
its arms, or one arm where there are fewer seeds than jobs (with engine.kind deepspeed each arm runs on all GPUs). On an
embedded pair and on that of SmolLM2 a seed is a new student and a new stream of prompts; on others it is a new stream.
The results are made by tip.results from the run folders.
"""

import os
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from opd import launch
from opd.arguments import seed_argument
from opd.cli import main, say
from opd.config import Config, load_config
from opd.errors import InputError, RunError
from opd.files import lock
from opd.progress import Progress
from tip.commands import COMMANDS
from tip.config import SECTIONS
from tip.jobs import Job, run_jobs
from tip.results.grid import grid, show
from tip.tables import Table, folder_of, only, read_table
from tip.weighter import TipWeighter

DEEPPLANNING = {"table7", "figure4"}


def deepplanning() -> str:
    """The paper's values of Table 7 and Figure 4, and why there are none of ours."""
    from tip.results import comparison  # slow to import, and not needed to start a table's runs

    facts = comparison.paper()["deepplanning"]
    rows = [
        (name.replace("_", " "), *(f"{mean:.1f} +- {pm:.2f}" for mean, pm in facts[name]))
        for name in ("teacher_qwen3_14b", "teacher_qwen3_32b")
    ]
    return (
        "Table 7 and Figure 4 of the paper need the DeepPlanning benchmark, whose databases are not part of this "
        "project: nothing is run, and no other task's numbers are shown under this name. The paper's values "
        f"({facts['metric']}):\n\n{grid(('', *facts['columns']), rows)}"
    )


def command(arguments: list[str]) -> None:
    options = COMMANDS["reproduce"].parser().parse_args(arguments)
    name = f"figure{options.figure}" if options.figure else options.table
    name = f"table{name}" if name.isdigit() else name
    if name in DEEPPLANNING:
        print(deepplanning())
        return
    table = read_table(name)
    if options.arms:
        table = only(table, options.arms.split(","))
    seeds = _read_seeds(options.seeds)
    base = _checked(table, options.config, options.overrides)
    if options.dry_run:
        say(f"{table.title}: {len(table.arms)} arms x {len(seeds)} seeds: {', '.join(a.label for a in table.arms)}")
        config, sections = load_config(options.config, [*options.overrides, *table.arms[0].overrides], SECTIONS)
        from opd.doctor import dry_run  # slow to import, as all that works with models is

        dry_run(config, sections, TipWeighter(sections["tip"]), "auto")
    elif options.only_seed is not None:
        _run_job(table, options)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a table starts its own processes on all GPUs. Start it plainly: python -m tip.reproduce ...")
    else:
        with lock(folder_of(base), "output_dir") if launch.machine() == 0 else nullcontext():
            _run_table(table, base, seeds, options, arguments)


def _read_seeds(text: str) -> list[int]:
    try:
        seeds = [seed_argument(number) for number in text.split(",")]
    except ArgumentTypeError as error:
        raise InputError(f"--seeds: {error}. Give them with commas, for example 0,1,2.") from None
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text[:80]}: expected different seeds. Give each once.")
    return seeds


def _checked(table: Table, path: str, overrides: Sequence[str]) -> Config:
    """The configuration that the arms share. Raises InputError for wrong settings of any arm, before anything runs."""
    fixed = {"seed", "run_name"}.union(*(arm.settings for arm in table.arms))
    base, _ = load_config(path, overrides, SECTIONS)
    for text in overrides:
        if (key := text.partition("=")[0]) in fixed:
            raise InputError(f"--set {text[:80]}: the arms and seeds of a table set {key}. Leave it out.")
    for arm in table.arms:
        TipWeighter(load_config(path, [*overrides, *arm.overrides], SECTIONS)[1]["tip"])
    return base


def _run_job(table: Table, options: Namespace) -> None:
    """Runs the arms of one seed, or one of them, as the process that `run_jobs` has started."""
    from tip.arms import run_seed  # slow to import: the process that only starts others does without it

    def tell(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(text, flush=True)

    if options.only_arm:
        chosen = ((title, tuple(arm for arm in arms if arm.label == options.only_arm)) for title, arms in table.panels)
        table = replace(table, panels=tuple((title, arms) for title, arms in chosen if arms))
    if run_seed(table, options, options.only_seed, tell):
        raise RunError("not every arm finished")


def _run_table(table: Table, base: Config, seeds: list[int], options: Namespace, arguments: list[str]) -> None:
    """Runs what has not run, then writes the table, as the only writer of its folder."""
    failed = _run_seeds(table, base, seeds, options, arguments)
    if launch.machine() > 0:
        return  # the first machine writes the table
    from tip.results import comparison, files  # it draws, which no process needs that trains
    from tip.results.collect import collect
    from tip.results.markdown import markdown

    out = folder_of(base) / table.name
    line, models = " ".join(["python -m tip.reproduce", *arguments]), (base.student.path, base.teacher.path)
    with Progress("table and figures"):
        results = collect(comparison.of_table(table, folder_of(base), seeds, Path(options.config).stem, models, line))
        text = markdown(results)
        files.write(results, text, out)
    show(text)
    say(f"{out}: table.md, .csv, .json, figures and report.html")
    if failed:
        raise RunError(f"{failed} of the runs failed; the table says which. Give the same command to try them again.")


def _run_seeds(table: Table, base: Config, seeds: list[int], options: Namespace, arguments: list[str]) -> int:
    """Runs every arm of every seed, here or in processes; returns how many failed."""
    at_once, logs = min(options.jobs, torch.cuda.device_count() or options.jobs), folder_of(base) / "logs"
    sharded = base.engine.kind == "deepspeed"  # an arm is then a group of processes on all GPUs: one runs at a time
    runs = len(table.arms) * len(seeds)
    say(f"{table.title}: {runs} runs\n  {base.student.path} learns from {base.teacher.path}\n  into {folder_of(base)}")
    if at_once == 1 and not sharded:
        from tip.arms import run_seed, student_of  # slow to import: not where other processes do the work

        for seed in seeds:
            student_of(base, seed)  # before the bars, because its training shows a bar of its own
        with Progress(table.name, runs, "runs") as progress:
            return sum(run_seed(table, options, seed, advance=progress.advance) for seed in seeds)
    if at_once <= len(seeds) and not sharded:
        return run_jobs(arguments, [Job(seed) for seed in seeds], at_once, logs)
    jobs = [Job(seed, arm.label) for seed in seeds for arm in table.arms]
    return run_jobs(arguments, jobs, 1 if sharded else at_once, logs)


if __name__ == "__main__":
    main(command)
