"""Invented trips with known answers, in the benchmark's form: `python -m data.deepplanning.synthetic --out DIR`.

They test the tools, the checks and the training loop without the benchmark's databases. Numbers on them are no numbers
of DeepPlanning, and their manifest gives them a name of their own.
"""

import csv
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from data.commands import COMMANDS
from data.deepplanning import tasks
from data.deepplanning.answers import make_wish
from data.deepplanning.checks import WEEKDAYS
from data.deepplanning.constraints import ALL_KINDS, KINDS
from data.deepplanning.database import COLUMNS, FILES, Database
from data.deepplanning.world import Tables, make_tables
from data.prepare import Found, write
from opd.cli import main
from opd.files import lock

NAME = "synthetic_trips"
TOOLS = Path(__file__).with_name("tools.json")
CITIES = ("Arlen", "Brasko", "Corvane", "Delmire", "Estrel", "Farrow", "Galdin", "Hestia")


@dataclass(frozen=True)
class Trip:
    """A task in the benchmark's form, and the tables that its tools read."""

    task: dict[str, Any]
    tables: Tables

    @property
    def database(self) -> Database:
        return Database(self.tables)


def make_trip(number: int, seed: int, kinds: Sequence[str] | None = None, days: int = 3) -> Trip:
    """A trip; the same arguments give the same one.

    Args:
        kinds: of its wishes. None draws four, of the kinds that the benchmark mixes, and now and then a budget.
        days: three or more, so that there is a whole day.
    """
    rng = random.Random(f"{seed} {number}")
    org, dest = rng.sample(CITIES, 2)
    first = date(2026, 3, 2) + timedelta(rng.randrange(28))
    trip: dict[str, Any] = {
        "org": org,
        "dest": [dest],
        "days": days,
        "depart_date": first.isoformat(),
        "depart_weekday": first.isoweekday(),
        "return_date": (first + timedelta(days - 1)).isoformat(),
        "people_number": rng.randint(2, 5),
        "room_number": rng.randint(1, 3),
        "hard_constraints": {},
    }
    tables = make_tables(trip, rng)
    wanted = _draw(rng) if kinds is None else kinds
    for kind in sorted(wanted, key=ALL_KINDS.index):  # the budget comes last and knows all other wishes
        trip["hard_constraints"][kind] = make_wish(kind, trip, tables, rng)
    wished = [wish["constraint_context"] for wish in trip["hard_constraints"].values()]
    query = (
        f"Plan a trip of {days} days from {org} to {dest}, from {trip['depart_date']} to {trip['return_date']}, for "
        f"{trip['people_number']} people in {trip['room_number']} rooms. {' '.join(wished)} "
        f"{trip['depart_date']} is a {WEEKDAYS[trip['depart_weekday'] - 1][0]}."
    )
    return Trip({"id": str(number), "query": query, "query_with_constraints": query, "meta_info": trip}, tables)


def _draw(rng: random.Random) -> list[str]:
    drawn = [rng.choice([kind for kind in ALL_KINDS if kind.startswith(("flight_", "train_"))])]
    drawn += [prefix + rng.choice(KINDS[prefix]) for prefix in ("hotel_", "restaurant_", "attraction_")]
    return drawn + ["budget_constraint"] * (rng.random() < 0.15)


def write_trips(out: Path, trips: int = 20, seed: int = 0) -> Path:
    """Writes invented trips in the layout of prepared data, whole or not at all; returns the folder."""
    made = [make_trip(number, seed, days=3 + number % 3) for number in range(trips)]
    rows = tasks.rows([trip.task for trip in made], NAME, "en", NAME)
    splits = tasks.split(rows, tasks.TRAIN_SHARE, seed)

    def write_more(folder: Path) -> dict[str, Any]:
        shutil.copy(TOOLS, folder / tasks.TOOLS)
        for trip in made:
            write_tables(trip.tables, tasks.task_folder(folder, int(trip.task["id"])))
        return {"language": "en"}

    with lock(out / NAME, "--out"):
        return write(NAME, Found(splits, {"invented": NAME}, tasks.TRAIN_SHARE, write_more=write_more), seed, out)


def write_tables(tables: Tables, folder: Path) -> None:
    """Writes the tables of a task as the CSV files that the benchmark has."""
    for table, name in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS[table], restval="")
            writer.writeheader()
            writer.writerows(tables[table])


def command(arguments: list[str]) -> None:
    options = COMMANDS["deepplanning.synthetic"].parser().parse_args(arguments)
    print(write_trips(options.out, options.trips, options.seed))


if __name__ == "__main__":
    main(command)
