"""The runs of a table: an arm with a seed -> its configuration and its training."""

import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import students
from opd import distributed
from opd.cli import say
from opd.config import Config, load_config
from opd.doctor import resolved
from opd.errors import Interrupted
from opd.progress import Progress
from opd.train import run as train
from tip.config import SECTIONS
from tip.diagnostics import TipObserver
from tip.frozen import with_frozen_pair
from tip.tables import Arm, Table, folder_of
from tip.weighter import TipWeighter


def arm_config(path: str, overrides: list[str], arm: Arm, seed: int) -> tuple[Config, dict[str, Any]]:
    """The configuration of one run."""
    base, _ = load_config(path, overrides, SECTIONS)
    folder, student = folder_of(base) / f"seed_{seed}", student_of(base, seed)
    of_seed = [f"seed={seed}", f"output_dir={folder}", f"run_name={arm.slug}", f"student.path={student}"]
    config, sections = load_config(path, [*overrides, *arm.overrides, *of_seed], SECTIONS)
    return with_frozen_pair(config, sections["tip"]), sections


def student_of(config: Config, seed: int) -> str | Path:
    """An embedded pair, and that of SmolLM2, has a student for every seed."""
    pair = Path(config.student.path).parent
    if not (pair / "recipe.json").exists():
        return config.student.path
    return students.student(pair, seed, Path(config.output_dir) / "students")


def run_seed(
    table: Table,
    options: Namespace,
    seed: int,
    tell: Callable[[str], None] = say,
    advance: Callable[[int], None] = lambda runs: None,
) -> int:
    """Runs the arms of one seed one after another; returns how many failed (their traceback lies beside the run).

    `tell` gets a message when an arm has ended, and `advance` is called with 1 then.
    """
    failed = 0
    for arm in table.arms:
        with Progress(f"student of seed {seed}"):
            config, sections = arm_config(options.config, options.overrides, arm, seed)
        if options.verbose:
            say(resolved(config, sections))
        report = config.run_dir.with_name(f"{arm.slug}.failed.txt")
        report.unlink(missing_ok=True)
        try:
            weighter = TipWeighter(sections["tip"])
            shared = config.run_dir.parent
            observer = TipObserver(weighter, config.loss.divergence)
            train(config, weighter, sections, "auto", observer, shared)
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
        advance(1)
    return failed
