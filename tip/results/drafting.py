"""Students as drafters of their teacher in speculative decoding, before and after training, from the run folders.

An evaluation with eval.reverse_kl holds for every response how many of its tokens the teacher would accept as drafts
(opd.speculative). Here a problem counts once, whatever the length of its responses, as in the accuracies.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from opd.accuracy import Interval, paired_interval
from opd.compare import finished_evaluations
from opd.record.evaluation import ACCEPTED, read_responses
from tip.results.grid import difference_cell, grid
from tip.results.types import Results

START = "step-0 student"
Shares = Mapping[str, float]  # problem id -> mean share of accepted tokens


@dataclass(frozen=True)
class Drafter:
    """A student on one benchmark; differences are of the share of accepted tokens, in [-1, 1]."""

    name: str
    accepted: float  # share of the drafted tokens
    of_block: float  # tokens of a block that are accepted
    to_start: Interval | None  # difference to the step-0 student
    to_base: Interval | None  # difference to the first baseline


def drafters(results: Results, benchmark: str) -> list[Drafter]:
    """The step-0 student and every arm after its last update; empty where the evaluations did not measure it."""
    after = {label: _by_seed(runs.values(), benchmark, last=True) for label, runs in results.folders.items()}
    before = {label: _by_seed(runs.values(), benchmark, last=False) for label, runs in results.folders.items()}
    base = results.comparison.baselines[0]
    first = next((of_seeds for of_seeds in before.values() if any(of_seeds)), [])
    found = [_drafter(START, first, None, None)] if any(first) else []
    for label, of_seeds in after.items():
        if of_seeds and all(of_seeds):
            seeds = results.folders[label].keys()
            common = [s for s in seeds if s in results.folders[base]]
            ours = [of for s, of in zip(seeds, of_seeds, strict=True) if s in common]
            theirs = [of for s, of in zip(results.folders[base], after[base], strict=True) if s in common]
            to_base = None if label == base else _difference(ours, theirs)
            found.append(_drafter(label, of_seeds, _difference(of_seeds, before[label]), to_base))
    return found


def _by_seed(folders: Iterable[Path], benchmark: str, *, last: bool) -> list[dict[str, Shares]]:
    """Per run: `acceptance` and ACCEPTED -> problem id -> mean over its responses; empty where it was not measured."""
    of_seeds = []
    for folder in folders:
        evaluations = finished_evaluations(folder)
        path = (
            evaluations[max(evaluations) if last else min(evaluations)] / f"{benchmark}.jsonl" if evaluations else None
        )
        columns: dict[str, dict[str, list[float]]] = {}
        for row in read_responses(path) if path is not None and path.exists() else []:
            for name in ("acceptance", ACCEPTED):
                if name in row:
                    columns.setdefault(name, defaultdict(list))[row["id"]].append(row[name])
        of_seeds.append({name: {p: fmean(of) for p, of in by_problem.items()} for name, by_problem in columns.items()})
    return of_seeds


def _drafter(
    name: str, of_seeds: list[dict[str, Shares]], to_start: Interval | None, to_base: Interval | None
) -> Drafter:
    accepted, of_block = (fmean(fmean(of[key].values()) for of in of_seeds) for key in ("acceptance", ACCEPTED))
    return Drafter(name, accepted, of_block, to_start, to_base)


def _difference(ours: list[dict[str, Shares]], theirs: list[dict[str, Shares]]) -> Interval | None:
    pairs = [(a["acceptance"], b["acceptance"]) for a, b in zip(ours, theirs, strict=True) if a and b]
    differences = [{p: a[p] - b[p] for p in a.keys() & b.keys()} for a, b in pairs]
    return paired_interval(differences) if differences and set.intersection(*map(set, differences)) else None


def markdown(results: Results) -> str:
    """A table for each benchmark; empty where nothing was measured."""
    parts = []
    for benchmark in dict.fromkeys(name for arm in results.arms.values() for name in arm.last):
        rows = [
            (
                drafter.name,
                f"{100 * drafter.accepted:.1f}",
                f"{drafter.of_block:.2f}",
                difference_cell(drafter.to_start),
                difference_cell(drafter.to_base),
            )
            for drafter in drafters(results, benchmark)
        ]
        if rows:
            base = results.comparison.baselines[0]
            header = ("drafter", "accepted, %", "of a block of 4", f"accepted - {START}", f"accepted - {base}")
            about = (
                f"as drafters of the teacher on {benchmark}: the share of the drafted tokens that it accepts, and how "
                "many tokens of a block of 4; means over problems and seeds"
            )
            parts.append(f"{about}\n\n{grid(header, rows)}")
    return "\n\n".join(parts)
