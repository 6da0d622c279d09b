"""A finished run as a report reads it."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from typing_extensions import TypedDict

from opd.errors import InputError
from opd.files import check
from opd.record.folder import Recorded, Summary, read_final, read_record
from opd.record.metrics import read_metrics


class Selection(TypedDict):
    """What is read of a recorded tip section."""

    rule: str
    retention: float


@dataclass(frozen=True)
class Run:
    folder: Path
    label: str
    config: Recorded
    summary: Summary


def read_run(folder: Path) -> Run:
    """Reads a finished run. Raises InputError when it is not one."""
    config, summary = read_record(folder)["config"], read_final(folder)
    tip = config.get("tip")
    if tip is not None:
        check(tip, Selection, f"{folder / 'config.json'}: config.tip", "a rule and its retention")
    start = (summary["eval"]["step_0"] or {}).keys()
    for who in ("teacher", "final"):
        if missing := sorted(start - (summary["eval"][who] or {}).keys()):
            raise InputError(
                f"{folder / 'summary.json'}: eval.{who} has no figures of benchmark {missing[0]!r}. Remove the file "
                "and give the command of the run again, which makes it anew from the run's evaluations."
            )
    label = f"{tip['rule']} {tip['retention']:g}" if tip and tip["rule"] != "all" else "all tokens"
    return Run(folder, label, config, summary)


def mass_covered(run_dir: Path) -> float | None:
    """Share of the divergence that the kept tokens carry, mean over the updates that measured it; None: none did."""
    measured = [row["tip/mass_covered"] for row in read_metrics(run_dir) if "tip/mass_covered" in row]
    return fmean(measured) if measured else None
