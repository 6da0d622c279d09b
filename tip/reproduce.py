"""A table of the paper as one command: arms x seeds -> runs -> table.

    python -m tip.reproduce --table 5 --config configs/tiny.json --seeds 0,1,2 [--jobs 2] [--set KEY=VALUE ...]

A table is data (configs/tables/): its arms are settings of a pair file. A run lies in
`<output_dir>/<run_name>-reproduce/seed_<n>/<arm>` and serves every table that has the arm. Finished runs are found and
left alone, stopped ones continue, a failed one is reported and the others go on. The arms of a seed share the
evaluations of step-0 student and teacher. With `--jobs` several processes work at a time: each takes a seed with all of
its arms, or one arm where there are fewer seeds than jobs (with engine.kind deepspeed each arm runs on all GPUs). On an
embedded pair a seed is a new student and a new stream of prompts; on others it is a new stream. The results are made by
tip.results from the run folders.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from data.tiny import build
from opd import distributed, launch
from opd.cli import main, number_argument, parser, say, seed_argument
from opd.config import Config, load_config
from opd.errors import InputError, Interrupted, RunError
from opd.files import lock
from opd.train import dry_run
from opd.train import run as train
from tip.config import SECTIONS
from tip.diagnostics import TipObserver
from tip.results import collect as results
from tip.results import page
from tip.results.grid import grid
from tip.tables import Arm, Table, only, read_table
from tip.weighter import TipWeighter

DEEPPLANNING = {"table7", "figure4"}


def arm_config(path: str, overrides: list[str], arm: Arm, seed: int) -> tuple[Config, dict[str, Any]]:
    """The configuration of one run."""
    base, _ = load_config(path, overrides, SECTIONS)
    settings = {k: json.dumps(v) for k, v in arm.settings.items()} | {
        "seed": str(seed),
        "output_dir": str(_root(base) / f"seed_{seed}"),
        "run_name": arm.slug,
        "student.path": str(student_of(base, seed)),
    }
    return load_config(path, [*overrides, *(f"{k}={v}" for k, v in settings.items())], SECTIONS)


def student_of(config: Config, seed: int) -> str | Path:
    """An embedded pair has a student for every seed."""
    pair = Path(config.student.path).parent
    if not (pair / "recipe.json").exists():
        return config.student.path
    return build.student(pair, seed, Path(config.output_dir) / "students")


def run_seed(table: Table, path: str, overrides: list[str], seed: int, tell: Callable[[str], None] = say) -> int:
    """Runs the arms of one seed one after another; returns how many failed (their traceback lies beside the run)."""
    failed = 0
    for arm in table.arms:
        config, sections = arm_config(path, overrides, arm, seed)
        report = config.run_dir.with_name(f"{arm.slug}.failed.txt")
        report.unlink(missing_ok=True)
        try:
            weighter = TipWeighter(sections["tip"])
            shared = config.run_dir.parent
            train(config, weighter, sections, "auto", TipObserver(weighter), shared)
            tell(f"seed {seed}: {arm.label} is done")
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever it is, the other arms go on
            failed += 1
            if distributed.is_first():
                report.parent.mkdir(parents=True, exist_ok=True)
                report.write_text(traceback.format_exc())
                tell(f"seed {seed}: {arm.label} FAILED ({error}); see {report}")
            if distributed.world_size() > 1:
                raise  # the other processes may be waiting in the middle of this arm
    return failed


def _root(config: Config) -> Path:
    return Path(config.output_dir) / f"{config.run_name}-reproduce"


def _in_processes(arguments: list[str], parts: list[tuple[int, str | None]], jobs: int, logs: Path) -> int:
    """One process per (seed, arm or None for all of its arms), `jobs` at a time, each with a GPU of its own where it
    uses one.

    With engine.kind deepspeed it is a group of processes on all GPUs. Their progress lines go to our stderr, the rest
    to a log of each part. Returns how many failed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(parts), {}, 0
    free = list(range(jobs))
    count = torch.cuda.device_count()
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",") if count else []
    stopped, slots = 0, {}

    def forward(signum: int, frame: object) -> None:
        nonlocal stopped
        stopped = signum
        for child in running.values():
            child.send_signal(signum)

    def read(child: subprocess.Popen) -> None:
        for line in child.stdout:
            say(line.rstrip())

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not stopped):
            while waiting and len(running) < jobs and not stopped:
                part = seed, arm = waiting.pop(0)
                slot = free.pop(0)
                own_gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot]} if jobs > 1 and gpus else {}
                with _log(logs, part).open("a") as log:
                    child = subprocess.Popen(
                        [
                            sys.executable,
                            "-m",
                            "opd.launch",
                            "tip.reproduce",
                            *arguments,
                            "--only-seed",
                            str(seed),
                            *(["--only-arm", arm] if arm else []),
                        ],
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        start_new_session=True,
                        env=os.environ | own_gpu,
                    )
                threading.Thread(target=read, args=(child,), daemon=True).start()
                running[part] = child
                slots[part] = slot
                say(f"seed {seed}: {f'{arm} ' if arm else ''}started; log in {_log(logs, part)}")
            for part, child in list(running.items()):
                try:
                    code = child.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
                del running[part]
                free.append(slots[part])
                if code and not stopped:
                    failed += 1
                    say(f"seed {part[0]}: ended with exit code {code}; see {_log(logs, part)}")
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if stopped:
        raise Interrupted(stopped)
    return failed


def _log(folder: Path, part: tuple[int, str | None]) -> Path:
    seed, arm = part
    return folder / (f"seed_{seed}-{arm.replace(' ', '-')}.log" if arm else f"seed_{seed}.log")


def deepplanning() -> str:
    """The paper's values of Table 7 and Figure 4, and why there are none of ours."""
    facts = results.paper()["deepplanning"]
    rows = [
        (name.replace("_", " "), *(f"{mean:.1f} +- {pm:.2f}" for mean, pm in facts[name]))
        for name in ("teacher_qwen3_14b", "teacher_qwen3_32b")
    ]
    return (
        "Table 7 and Figure 4 of the paper need the DeepPlanning benchmark, whose environment is not part of this "
        "project: "
        "nothing is run, and no other task's numbers are shown under this name. The paper's values "
        f"({facts['metric']}):\n\n{grid(('', *facts['columns']), rows)}"
    )


def command(arguments: list[str]) -> None:
    transformers.logging.disable_progress_bar()
    cli = parser("python -m tip.reproduce", "Runs the arms of a table of the paper over seeds, then writes the table.")
    which = cli.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", metavar="N", help="3, 4, 5, 6, 7, 8, main or rules (a file of configs/tables)")
    which.add_argument("--figure", metavar="N", help="1, 3 or 4")
    cli.add_argument("--seeds", default="0", metavar="0,1,2", help="default 0")
    cli.add_argument(
        "--jobs",
        type=number_argument(1),
        default=1,
        metavar="N",
        help="seeds (or arms) at a time, in processes of their own",
    )
    cli.add_argument("--arms", metavar="A,B", help="only these arms, by the labels of --dry-run, and the baselines")
    cli.add_argument("--dry-run", action="store_true", help="print arms, and plan of the first; start nothing")
    cli.add_argument(
        "--only-seed", type=seed_argument, metavar="N", help="run this seed's arms here and write no table"
    )
    cli.add_argument("--only-arm", metavar="A", help="with --only-seed: this arm of it alone")
    options = cli.parse_args(arguments)
    name = f"figure{options.figure}" if options.figure else options.table
    name = f"table{name}" if name.isdigit() else name
    if name in DEEPPLANNING:
        print(deepplanning())
        return
    table = read_table(name)
    if options.arms:
        table = only(table, options.arms.split(","))
    try:
        seeds = [seed_argument(text) for text in options.seeds.split(",")]
    except ArgumentTypeError as error:
        raise InputError(f"--seeds: {error}. Give them with commas, for example 0,1,2.") from None
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {options.seeds[:80]}: expected different seeds. Give each once.")
    base, _ = load_config(options.config, options.overrides, SECTIONS)
    fixed = {"seed", "run_name"}.union(*(arm.settings for arm in table.arms))
    for text in options.overrides:
        if (key := text.partition("=")[0]) in fixed:
            raise InputError(f"--set {text[:80]}: the arms and seeds of a table set {key}. Leave it out.")
    for arm in table.arms:  # what is wrong with the settings is said before anything runs
        settings = [f"{key}={json.dumps(value)}" for key, value in arm.settings.items()]
        TipWeighter(load_config(options.config, [*options.overrides, *settings], SECTIONS)[1]["tip"])
    if options.dry_run:
        say(f"{table.title}: {len(table.arms)} arms x {len(seeds)} seeds: {', '.join(a.label for a in table.arms)}")
        first = [f"{key}={json.dumps(value)}" for key, value in table.arms[0].settings.items()]
        dry_run(*load_config(options.config, [*options.overrides, *first], SECTIONS))
        return
    if options.only_seed is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a table starts its own processes on all GPUs. Start it plainly: python -m tip.reproduce ...")
    if options.only_arm:
        chosen = ((title, tuple(arm for arm in arms if arm.label == options.only_arm)) for title, arms in table.panels)
        table = replace(table, panels=tuple((title, arms) for title, arms in chosen if arms))
    if options.only_seed is not None:

        def tell(text: str) -> None:
            if os.environ.get("RANK", "0") == "0":
                print(text, flush=True)

        if run_seed(table, options.config, options.overrides, options.only_seed, tell):
            raise RunError("not every arm finished")
        return
    with lock(_root(base), "output_dir") if launch.machine() == 0 else nullcontext():
        _all_seeds(table, base, seeds, options, arguments)


def _all_seeds(table: Table, base: Config, seeds: list[int], options: Namespace, arguments: list[str]) -> None:
    """Runs what has not run, then writes the table, as the only writer of its folder."""
    root = _root(base)
    jobs = min(options.jobs, torch.cuda.device_count() or options.jobs)
    sharded = (
        base.engine.kind == "deepspeed"
    )  # then an arm is a group of processes on all GPUs, so one arm runs at a time
    if jobs == 1 and not sharded:
        failed = sum(run_seed(table, options.config, options.overrides, seed) for seed in seeds)
    elif jobs <= len(seeds) and not sharded:
        failed = _in_processes(arguments, [(seed, None) for seed in seeds], jobs, root / "logs")
    else:
        for seed in seeds:
            student_of(base, seed)  # made before several processes want it
        parts = [(seed, arm.label) for seed in seeds for arm in table.arms]
        failed = _in_processes(arguments, parts, 1 if sharded else jobs, root / "logs")
    if launch.machine() > 0:
        return  # the first machine writes the table
    out = root / table.name
    models = base.student.path, base.teacher.path
    found = results.of_table(table, root, seeds, Path(options.config).stem, models)
    found["command"] = " ".join(["python -m tip.reproduce", *arguments])
    results.write(found, out)
    if found["arms"]:
        page.write(found, out)
    print((out / "table.md").read_text())
    say(f"{out}: table.md, .csv, .json, figures and report.html")
    if failed:
        raise RunError(f"{failed} of the runs failed; the table says which. Give the same command to try them again.")


if __name__ == "__main__":
    main(command)
