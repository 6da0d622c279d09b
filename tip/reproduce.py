"""A table of the paper as one command: arms x seeds -> runs -> table.

    python -m tip.reproduce --table 5 --config configs/tiny.json --seeds 0,1,2 [--jobs 2] [--set KEY=VALUE ...]

A table is data (configs/tables/): its arms are settings of a pair file. A run lies in
`<output_dir>/<run_name>-reproduce/seed_<n>/<arm>` and serves every table that has the arm. Finished runs are found and
left alone, stopped ones continue, a failed one is reported and the others go on. The arms of a seed share the
evaluations of step-0 student and teacher. With `--jobs` several processes work at a time: each takes a seed with all of
its arms, or one arm where there are fewer seeds than jobs (with engine.kind deepspeed each arm runs on all GPUs). On an
embedded pair and on that of SmolLM2 a seed is a new student and a new stream of prompts; on others it is a new stream.
The results are made by tip.results from the run folders. With `--rates` every arm is trained at each of these learning
rates (tip.results.rates).
"""

import math
import os
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from threading import Thread

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
from tip.results.grid import show
from tip.tables import Table, at_rate, folder_of, only, read_table
from tip.weighter import TipWeighter


def command(arguments: list[str]) -> None:
    options = COMMANDS["reproduce"].parser().parse_args(arguments)
    name = f"figure{options.figure}" if options.figure else options.table
    name = f"table{name}" if name.isdigit() else name
    table = read_table(name)
    if options.arms:
        table = only(table, options.arms.split(","))
    seeds = _read_seeds(options.seeds)
    by_rate = _by_rate(table, options) if options.rates is not None else {}
    base = _checked([table, *by_rate.values()], options.config, options.overrides)
    if by_rate:
        title = f"{table.title}, at {len(by_rate)} learning rates"
        table = replace(table, title=title, panels=tuple(panel for t in by_rate.values() for panel in t.panels))
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
            _run_table(table, by_rate, base, seeds, options, arguments)


def _read_seeds(text: str) -> list[int]:
    try:
        seeds = [seed_argument(number) for number in text.split(",")]
    except ArgumentTypeError as error:
        raise InputError(f"--seeds: {error}. Give them with commas, for example 0,1,2.") from None
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text[:80]}: expected different seeds. Give each once.")
    return seeds


def _by_rate(table: Table, options: Namespace) -> dict[float, Table]:
    """Learning rate -> the table with it, the lowest first."""
    try:
        rates = sorted({_rate(text) for text in options.rates.split(",")})
    except ValueError:
        raise InputError(
            f"--rates {options.rates[:80]!r}: expected learning rates above 0 with commas between them, for example "
            "1e-4,3e-4,1e-3."
        ) from None
    own = load_config(options.config, options.overrides, SECTIONS)[0].optim.lr
    return {rate: at_rate(table, rate, own) for rate in rates}


def _rate(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def _checked(tables: Sequence[Table], path: str, overrides: Sequence[str]) -> Config:
    """The configuration that the arms share. Raises InputError for wrong settings of any arm, before anything runs."""
    arms = [arm for table in tables for arm in table.arms]
    fixed = {"seed", "run_name"}.union(*(arm.settings for arm in arms))
    base, _ = load_config(path, overrides, SECTIONS)
    if (table := tables[0]).conversations and base.data.environment is None:
        raise InputError(
            f"{table.name} compares conversations, and {path} has no data.environment. Give a pair with one: "
            "configs/tiny_planning.json, or configs/qwen3_14b_to_1.7b_deepplanning.json."
        )
    if base.data.environment is not None:
        from opd.rollout import environment  # slow to import, and most pairs have none

        environment.load(base.data.environment)  # where its data are missing, no arm need start
    for text in overrides:
        if (key := text.partition("=")[0]) in fixed:
            raise InputError(f"--set {text[:80]}: the arms and seeds of a table set {key}. Leave it out.")
    for arm in arms:
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


def _run_table(
    table: Table,
    by_rate: dict[float, Table],
    base: Config,
    seeds: list[int],
    options: Namespace,
    arguments: list[str],
) -> None:
    """Runs what has not run, then writes the table, as the only writer of its folder.

    With `by_rate`, `table` holds the arms of all rates; then the matrix of rates is written, and a table for each rate.
    """
    failed = _run_seeds(table, base, seeds, options, arguments)
    if launch.machine() > 0:
        return  # the first machine writes the table
    with Progress("table and figures"):
        text, where = _write(table, by_rate, base, seeds, options, arguments)
    show(text)
    say(where)
    if failed:
        raise RunError(f"{failed} of the runs failed; the table says which. Give the same command to try them again.")


def _write(
    table: Table,
    by_rate: dict[float, Table],
    base: Config,
    seeds: list[int],
    options: Namespace,
    arguments: list[str],
) -> tuple[str, str]:
    """Writes the results of runs, which need not all be done; returns what to show, and where what has been written."""
    from tip.results import comparison, files, rates  # they draw, which no process needs that trains
    from tip.results.collect import collect
    from tip.results.markdown import markdown
    from tip.results.types import Results

    line, models = " ".join(["python -m tip.reproduce", *arguments]), (base.student.path, base.teacher.path)
    root, pair = folder_of(base), Path(options.config).stem

    def write_table(table: Table, out: Path) -> tuple[Results, str]:
        results = collect(comparison.of_table(table, root, seeds, pair, models, line))
        text = markdown(results)
        files.write(results, text, out)
        return results, text

    if not by_rate:
        out = root / table.name
        return write_table(table, out)[1], f"{out}: table.md, .csv, .json, figures and report.html"
    out = root / f"{table.name}-rates"
    results = {rate: write_table(of_rate, out / f"lr_{rate:g}")[0] for rate, of_rate in by_rate.items()}
    text = rates.write(results, table.title, line, out)
    return text, f"{out}: rates.md, .json, a figure, and a table of each rate"


def _run_seeds(table: Table, base: Config, seeds: list[int], options: Namespace, arguments: list[str]) -> int:
    """Runs every arm of every seed, here or in processes; returns how many failed."""
    at_once, logs = min(options.jobs, torch.cuda.device_count() or options.jobs), folder_of(base) / "logs"
    sharded = base.engine.kind == "deepspeed"  # an arm is then a group of processes on all GPUs: one runs at a time
    runs = len(table.arms) * len(seeds)
    models = f"{base.student.path} learns from {base.teacher.path or 'itself'}"
    say(f"{table.title}: {runs} runs\n  {models}\n  into {folder_of(base)}")
    if at_once == 1 and not sharded:
        from tip.arms import run_seed, student_of  # slow to import: not where other processes do the work

        for seed in seeds:
            student_of(base, seed)  # before the bars, because its training shows a bar of its own
        with Progress(table.name, runs, "runs") as progress:
            return sum(run_seed(table, options, seed, advance=progress.advance) for seed in seeds)
    Thread(target=_import_results, daemon=True).start()
    if at_once <= len(seeds) and not sharded:
        return run_jobs(arguments, [Job(seed) for seed in seeds], at_once, logs)
    jobs = [Job(seed, arm.label) for seed in seeds for arm in table.arms]
    return run_jobs(arguments, jobs, 1 if sharded else at_once, logs)


def _import_results() -> None:
    """Imports what writes the table while other processes train; it takes seconds, which would come after the runs."""
    import_module("tip.results.files")


if __name__ == "__main__":
    main(command)
