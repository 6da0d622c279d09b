"""What a selection does in conversations, from the token dumps of runs: quadrants by turn, and the tokens of Q3.

In an agent's conversation the turns before the last one hold the calls, and the last one holds the answer. So the two
are told apart, rollout by rollout.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd.record import dump
from tip.results.grid import grid
from tip.results.token_map import dumped_updates

BEFORE, LAST = "before the last", "last"
QUADRANTS = (1, 2, 3, 4)
MANY_TURNS = 6  # in rows of their own
CARRIERS = 12  # listed tokens of Q3
CONTEXT = 5  # tokens shown before a listed one


@dataclass
class Cells:
    """Sums over some tokens, by quadrant."""

    tokens: list[int] = field(default_factory=lambda: [0] * len(QUADRANTS))
    divergence: list[float] = field(default_factory=lambda: [0.0] * len(QUADRANTS))  # reverse KL, nats
    kept: list[int] = field(default_factory=lambda: [0] * len(QUADRANTS))

    def add(self, quadrant: int, divergence: float, kept: bool) -> None:
        self.tokens[quadrant - 1] += 1
        self.divergence[quadrant - 1] += divergence
        self.kept[quadrant - 1] += kept


@dataclass
class Carrier:
    """Tokens of Q3 with one text, where the teacher finds one other text likeliest."""

    turns: str  # BEFORE or LAST
    text: str
    teacher: str
    tokens: int = 0
    divergence: float = 0.0  # sum of reverse KL, nats
    strongest: float = 0.0  # its largest reverse KL
    before: str = ""  # what stands before the strongest


@dataclass
class Turns:
    """What the dumps hold."""

    label: str  # the arm whose quadrants and Q3 are told
    by_update: dict[int, dict[str, Cells]]  # of that arm: update -> a turn, BEFORE or LAST -> sums
    by_arm: dict[str, dict[str, Cells]]  # label -> BEFORE or LAST -> sums over all dumped updates
    carriers: list[Carrier]  # of that arm, by falling divergence


def read(folders: Mapping[str, Mapping[int, Path]], label: str) -> Turns | None:
    """What the dumps of these runs hold; None where no dumped rollout of the arm `label` has several turns.

    Args:
        folders: label of an arm -> seed -> run.
    """
    by_update: dict[int, dict[str, Cells]] = {}
    by_arm: dict[str, dict[str, Cells]] = {}
    carriers: dict[tuple[str, str, str], Carrier] = {}
    for arm, runs in folders.items():
        for row in _rows(runs.values()):
            of_update = by_update.setdefault(row["step"], {}) if arm == label else {}
            _count(row, by_arm.setdefault(arm, {}), of_update)
            if arm == label:
                _list_carriers(row, carriers)
    if BEFORE not in by_arm.get(label, {}):
        return None
    ordered = sorted(carriers.values(), key=lambda carrier: -carrier.divergence)
    return Turns(label, dict(sorted(by_update.items())), by_arm, ordered)


def _rows(runs: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The dumped rollouts of some runs that hold quadrants and turns."""
    for run in runs:
        for path in dumped_updates(run):
            yield from (row for row in dump.rows(path) if "quadrant" in row and row.get("turn"))


def _count(row: Mapping[str, Any], of_arm: dict[str, Cells], of_update: dict[str, Cells]) -> None:
    last = max(row["turn"])
    columns = zip(row["turn"], row["quadrant"], row["reverse_kl"], row["weight"], strict=True)
    for turn, quadrant, divergence, weight in columns:
        where = LAST if turn == last else BEFORE
        of_arm.setdefault(where, Cells()).add(quadrant, divergence, weight > 0)
        of_update.setdefault(where, Cells()).add(quadrant, divergence, weight > 0)
        if where == BEFORE and turn < MANY_TURNS:
            of_update.setdefault(f"turn {turn + 1}", Cells()).add(quadrant, divergence, weight > 0)


def _list_carriers(row: Mapping[str, Any], carriers: dict[tuple[str, str, str], Carrier]) -> None:
    last, tokens = max(row["turn"]), row["tokens"]
    for i, quadrant in enumerate(row["quadrant"]):
        if quadrant == 3:
            key = (LAST if row["turn"][i] == last else BEFORE, tokens[i], row["teacher_top5"][i][0][0])
            carrier, divergence = carriers.setdefault(key, Carrier(*key)), row["reverse_kl"][i]
            carrier.tokens += 1
            carrier.divergence += divergence
            if divergence >= carrier.strongest:
                carrier.strongest, carrier.before = divergence, "".join(tokens[max(0, i - CONTEXT) : i])


def text(turns: Turns | None) -> str:
    """Three tables in Markdown; empty where there are no conversations."""
    if turns is None:
        return ""
    step, places = next(iter(turns.by_update.items()))
    both = [places[where] for where in (BEFORE, LAST) if where in places]
    ordered = [*sorted(places.keys() - {BEFORE, LAST}), *(where for where in (BEFORE, LAST) if where in places)]
    lie = [(where, *_lie(places[where], both)) for where in ordered]
    kept = [(arm, *_kept(cells, BEFORE), *_kept(cells, LAST)) for arm, cells in turns.by_arm.items()]
    return "\n\n".join(
        [
            f"Turns of {turns.label} at update {step}: the turns before the last one hold the calls, and the last one "
            "the answer. Shares of all tokens and of all divergence, by quadrant.",
            grid(("turns", *_columns("tokens"), *_columns("divergence")), lie),
            "What each arm keeps of a quadrant, in the turns before the last and in the last, over all dumped updates.",
            grid(("arm", *_columns(BEFORE), *_columns(LAST)), kept),
            f"Which tokens carry Q3 in {turns.label}, over all dumped updates, with their share of Q3's divergence.",
            _carriers(turns.carriers),
        ]
    )


def _columns(title: str) -> list[str]:
    return [f"{title}: {name}" for name in ("all", *(f"Q{q}" for q in QUADRANTS))]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _lie(cells: Cells, both: Sequence[Cells]) -> list[str]:
    """Shares of the tokens and of the divergence of `both`, together and by quadrant."""
    shares = []
    for part, whole in (
        (cells.tokens, sum(sum(some.tokens) for some in both)),
        (cells.divergence, sum(sum(some.divergence) for some in both)),
    ):
        shares += [_percent(sum(part), whole), *(_percent(of_quadrant, whole) for of_quadrant in part)]
    return shares


def _kept(by_place: Mapping[str, Cells], where: str) -> list[str]:
    cells = by_place.get(where, Cells())
    parts = zip(cells.kept, cells.tokens, strict=True)
    return [_percent(sum(cells.kept), sum(cells.tokens)), *(_percent(kept, tokens) for kept, tokens in parts)]


def _carriers(carriers: Sequence[Carrier]) -> str:
    total = sum(carrier.divergence for carrier in carriers)
    rows = [
        (
            carrier.turns,
            _plain(carrier.text),
            _plain(carrier.teacher),
            str(carrier.tokens),
            _percent(carrier.divergence, total),
            _plain(carrier.before),
        )
        for carrier in carriers[:CARRIERS]
    ]
    header = ("turns", "student's token", "teacher's likeliest", "tokens", "divergence", "what stands before")
    return grid(header, rows)


def _plain(words: str) -> str:
    """A model's text for a cell: nothing in it ends the cell, the line or the code, or reaches a terminal unseen."""
    shown = repr(words)[1:-1].replace("|", "¦").replace("`", "'")
    return f"`{shown}`"
