"""Which runs stand beside each other: those of a table's arms and seeds, or any that started alike."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd.config import ROOT, read_pair
from tip.results.runs import Run
from tip.results.types import Comparison, Panel
from tip.tables import Table


def paper() -> dict[str, Any]:
    """The numbers of the paper (data/paper/tables.json)."""
    return json.loads((ROOT / "data" / "paper" / "tables.json").read_text())


def of_table(
    table: Table, root: Path, seeds: Sequence[int], pair: str, models: tuple[str, str], command: str = ""
) -> Comparison:
    """The arms and seeds of a table.

    Args:
        root: holds seed_<n>/<arm>.
        pair: name of the pair file.
        models: paths of student and teacher; the paper's values are shown only where they are those of its pair file.
        command: what was typed.
    """
    in_paper = paper()["tables"][table.paper] if table.paper else {"pairs": {}}
    by_benchmark = in_paper["pairs"].get(pair, {})
    if by_benchmark:
        shipped, _ = read_pair(ROOT / "configs" / f"{pair}.json")
        if models != (shipped["student"]["path"], shipped["teacher"]["path"]):
            by_benchmark = {}
    return Comparison(
        name=table.name,
        title=table.title,
        command=command,
        pair=pair,
        seeds=tuple(seeds),
        baselines=table.baselines,
        every_evaluation=table.every_evaluation,
        panels=tuple(Panel(title, tuple(arm.label for arm in arms)) for title, arms in table.panels),
        settings={arm.label: arm.settings for arm in table.arms},
        folders={arm.label: {seed: root / f"seed_{seed}" / arm.slug for seed in seeds} for arm in table.arms},
        paper=by_benchmark,
        paper_metric=in_paper.get("of", "mean_at_k"),
        note="" if by_benchmark else table.note,
    )


def of_runs(runs: Sequence[Run], command: str = "") -> Comparison:
    """Finished runs that started alike, in one panel; the first is the baseline."""
    arms: dict[str, Run] = {}
    for run in runs:
        label = next((label for label in (run.label, run.folder.name) if label not in arms), str(run.folder))
        arms[label] = run
    base, *others = arms
    return Comparison(
        name="runs",
        title=f"{others[0] if len(others) == 1 else f'{len(others)} runs'} against {base}" if others else base,
        command=command,
        pair=runs[0].config["run_name"],
        seeds=(runs[0].config["seed"],),
        baselines=(base,),
        every_evaluation=False,
        panels=(Panel("runs", tuple(arms)),),
        settings={
            label: {f"tip.{key}": run.config["tip"][key] for key in ("rule", "retention")}
            if "tip" in run.config
            else {}
            for label, run in arms.items()
        },
        folders={label: {run.config["seed"]: run.folder} for label, run in arms.items()},
        paper={},
    )
