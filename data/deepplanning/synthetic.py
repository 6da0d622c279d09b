"""Invented trips with known answers, in the benchmark's form: `python -m data.deepplanning.synthetic --out DIR`.

They test the tools, the checks and the training loop without the benchmark's databases. Numbers on them are no numbers
of DeepPlanning, and their manifest gives them a name of their own.
"""

import csv
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from data.commands import COMMANDS
from data.deepplanning import tasks
from data.deepplanning.checks import WEEKDAYS, Case, total_cost
from data.deepplanning.constraints import ALL_KINDS, KINDS
from data.deepplanning.database import COLUMNS, FILES, Database, Row
from data.deepplanning.oracle import DIRECT, write_plan
from data.deepplanning.plan import parse_plan, read_plan
from data.prepare import Found, write
from opd.cli import main
from opd.files import lock

NAME = "synthetic_trips"
TOOLS = Path(__file__).with_name("tools.json")
CITIES = ("Arlen", "Brasko", "Corvane", "Delmire", "Estrel", "Farrow", "Galdin", "Hestia")
TYPES = ("Historical and Cultural", "Natural Scenery", "Art Exhibition", "City Landmark")
BRANDS = ("Amber", "Birch", "Cedar", "Dune")
CUISINES = ("Noodles", "Grill", "Seafood")
TAGS = ("Birthday Package", "Waiting Area", "Terrace")
AIRLINES = ("North Air", "South Air")
MAKERS = ("Airbus", "Boeing")
BUDGET_ROOM = 1.02  # the budget of a trip, as a multiple of what a frugal plan costs

Tables = dict[str, list[dict[str, str]]]


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
    tables = _tables(trip, rng)
    wanted = _draw(rng) if kinds is None else kinds
    for kind in sorted(wanted, key=ALL_KINDS.index):  # the budget comes last and knows all other wishes
        trip["hard_constraints"][kind] = _wish(kind, trip, tables, rng)
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


# --- the tables -------------------------------------------------------------------------------------------------------
def _tables(trip: dict[str, Any], rng: random.Random) -> Tables:
    org, dest = trip["org"], trip["dest"][0]
    attractions = _attractions(trip, rng)
    restaurants = _restaurants(attractions, rng)
    hotels = _hotels(dest, rng)
    stations = [f"{city} {kind}" for city in (org, dest) for kind in ("Central Station", "Airport")]
    points = {name: _point(rng) for name in stations}
    points |= {row["name"]: (row["latitude"], row["longitude"]) for row in hotels}
    points |= {row["attraction_name"]: (row["latitude"], row["longitude"]) for row in attractions}
    points |= {row["restaurant_name"]: (row["latitude"], row["longitude"]) for row in restaurants}
    return {
        "trains": _journeys(trip, rng, "train"),
        "flights": _journeys(trip, rng, "flight"),
        "hotels": hotels,
        "attractions": attractions,
        "locations": [
            {"poi_name": n, "latitude": a, "longitude": b, "poi_type": "place"} for n, (a, b) in points.items()
        ],
        "roads": _roads(list(points.values()), rng),
        "restaurants": restaurants,
    }


def _point(rng: random.Random) -> tuple[str, str]:
    return f"{rng.uniform(30, 31):.6f}", f"{rng.uniform(120, 121):.6f}"


def _roads(points: list[tuple[str, str]], rng: random.Random) -> list[dict[str, str]]:
    roads = []
    for start in points:
        for end in points:
            if start != end:
                meters = rng.randrange(500, 15000)
                roads.append(
                    {
                        "origin": ",".join(start),
                        "destination": ",".join(end),
                        "distance_meters": str(meters),
                        "duration_minutes": str(8 + meters // 750),
                        "cost": str(0 if meters <= 2000 else 10 + meters // 400),
                    }
                )
    return roads


def _journeys(trip: dict[str, Any], rng: random.Random, kind: str) -> list[dict[str, str]]:
    """Direct offers in two classes for both ways, and one with a change, which is cheaper and faster than all."""
    cities = (trip["org"], trip["dest"][0])
    rows = []
    ways = ((*cities, trip["depart_date"], 7 * 60), (*cities[::-1], trip["return_date"], 15 * 60))
    for way, (origin, destination, day, earliest) in enumerate(ways):
        prices = rng.sample(range(200, 400), 8)
        starts, lengths = rng.sample(range(earliest, earliest + 120, 10), 4), rng.sample(range(100, 180, 10), 4)
        plenty = rng.randrange(4)
        for offer in range(4):
            for seat in range(2 if offer == plenty else 1):  # one offer alone has both classes, and enough seats
                rows.append(
                    _segment(kind, (origin, destination, day), starts[offer], lengths[offer])
                    | _equipment(kind, f"{way}{offer}", offer)
                    | {
                        "route_index": f"{DIRECT}{way}{offer}{seat}",
                        "seat_class": (("Second", "First") if kind == "train" else ("Economy", "Business"))[seat]
                        + " Class",
                        "seat_status": ("" if seat else "99") if offer == plenty else "1",
                        "price": str(prices[2 * offer + seat]),
                    }
                )
        for segment in range(2):
            rows.append(
                _segment(kind, (origin, destination, day), earliest - 60 + 50 * segment, 40)
                | _equipment(kind, f"9{way}{segment}", segment)
                | {
                    "route_index": f"2{way}",
                    "segment_index": str(segment + 1),
                    "seat_class": "Second Class" if kind == "train" else "Economy Class",
                    "seat_status": "99",
                    "price": "50",
                }
            )
    return rows


def _segment(kind: str, journey: tuple[str, str, str], start: int, length: int) -> dict[str, str]:
    origin, destination, day = journey
    place = "Central Station" if kind == "train" else "Airport"
    return {
        "origin_city": origin,
        "destination_city": destination,
        "dep_date": day,
        "segment_index": "1",
        "arr_station_code": destination[:3].upper(),
        "arr_station_name": f"{destination} {place}",
        "dep_station_code": origin[:3].upper(),
        "dep_station_name": f"{origin} {place}",
        "duration": str(length),
        "dep_datetime": f"{day} {start // 60:02}:{start % 60:02}",
        "arr_datetime": f"{day} {(start + length) // 60:02}:{(start + length) % 60:02}",
    }


def _equipment(kind: str, number: str, offer: int) -> dict[str, str]:
    if kind == "train":
        return {"train_type": ("Bullet Train", "High-speed Train")[offer % 2], "train_no": f"G{number}"}
    return {
        "airline": AIRLINES[offer % 2],
        "flight_no": f"FL{number}",
        "equip_size": "Medium",
        "equip_type": "320",
        "manufacturer": MAKERS[offer // 2],
    }


def _hotels(city: str, rng: random.Random) -> list[dict[str, str]]:
    """Eight hotels, two of each brand and of each number of stars; one of them was decorated lately."""
    prices, scores = rng.sample(range(150, 600), 8), rng.sample(range(30, 50), 8)
    newest, pool = rng.randrange(8), rng.randrange(8)
    rows = []
    for i in range(8):
        latitude, longitude = _point(rng)
        rows.append(
            {
                "name": f"{BRANDS[i // 2]} Hotel - {city} {i + 1}",
                "address": f"{i + 1} High Street",
                "latitude": latitude,
                "longitude": longitude,
                "decoration_time": "2025" if i == newest else str(2015 + i),
                "hotel_star": str(2 + i % 4),
                "price": str(prices[i]),
                "score": str(scores[i] / 10),
                "brand": BRANDS[i // 2],
                "services": "Parking;Swimming Pool" if i == pool else "Parking" if i % 2 else "",
            }
        )
    return rows


def _attractions(trip: dict[str, Any], rng: random.Random) -> list[dict[str, str]]:
    """Attractions of distinct ratings: one closed on the second day, one always open, one open until after midnight."""
    count = 2 * trip["days"] + 4
    ratings, prices = rng.sample(range(20, 50), count), rng.sample(range(20, 120), count)
    hours = [("Open 24 Hours", "Open 24 Hours"), ("10:00", "02:00")]
    rows = []
    for i in range(count):
        latitude, longitude = _point(rng)
        opening, closing = hours[i] if i < 2 else ("08:00", "19:00")
        rows.append(
            {
                "attraction_id": str(1000 + i),
                "attraction_name": f"{trip['dest'][0]} Sight {i + 1}",
                "city": trip["dest"][0],
                "address": f"{i + 1} Park Lane",
                "latitude": latitude,
                "longitude": longitude,
                "description": "A place that visitors like",
                "rating": str(ratings[i] / 10),
                "opening_time": opening,
                "closing_time": closing,
                "closing_dates": WEEKDAYS[trip["depart_weekday"] % 7][0] if i == 2 else "",
                "min_visit_hours": str(rng.choice((1.0, 1.5, 2.0))),
                "max_visit_hours": "3.0",
                "ticket_price": "0" if i in (3, 4) else str(prices[i]),
                "attraction_type": TYPES[i % 4] if i < 6 else TYPES[i % 2 + 2],
            }
        )
    return rows


def _restaurants(attractions: Sequence[Row], rng: random.Random) -> list[dict[str, str]]:
    """Three restaurants near each attraction, of distinct price, rating, cuisine and tag; the first is near two."""
    prices = rng.sample(range(30, 230), 3 * len(attractions))
    rows = []
    for number, place in enumerate(attractions):
        ratings = rng.sample(range(30, 50), 3)
        for i in range(3):
            latitude, longitude = _point(rng)
            rows.append(
                {
                    "restaurant_id": str(5000 + 3 * number + i),
                    "restaurant_name": f"{CUISINES[i]} House {number + 1}",
                    "latitude": latitude,
                    "longitude": longitude,
                    "price_per_person": str(prices[3 * number + i]),
                    "cuisine": CUISINES[i],
                    "opening_time": "10:30",
                    "closing_time": "23:00",
                    "nearby_attraction_name": place["attraction_name"],
                    "rating": str(ratings[i] / 10),
                    "tags": TAGS[i],
                    "query_latitude": place["latitude"],
                    "query_longitude": place["longitude"],
                }
            )
    second = {"query_latitude": attractions[1]["latitude"], "query_longitude": attractions[1]["longitude"]}
    return [*rows, rows[0] | second]


# --- the wishes -------------------------------------------------------------------------------------------------------
def _wish(kind: str, trip: dict[str, Any], tables: Tables, rng: random.Random) -> dict[str, Any]:
    """The parameters of a wish, with its gold entity found in the tables and a sentence for the request."""
    prefix = next(prefix for prefix in KINDS if kind.startswith(prefix))
    name = kind.removeprefix(prefix)
    if prefix in ("flight_", "train_"):
        return _journey_wish(name, prefix.removesuffix("_"), trip, tables)
    if prefix == "hotel_":
        return _hotel_wish(name, tables["hotels"], rng)
    if prefix == "restaurant_":
        return _restaurant_wish(name, tables, rng)
    if prefix == "attraction_":
        return _attraction_wish(name, tables["attractions"], rng)
    database = Database(tables)
    plan = read_plan(parse_plan(write_plan(trip, database), database.names)[0])
    budget = int(total_cost(Case(plan, trip, database)) * BUDGET_ROOM)
    return {"constraint_context": f"Spend {budget} yuan at most.", "max_budget": budget}


def _journey_wish(name: str, kind: str, trip: dict[str, Any], tables: Tables) -> dict[str, Any]:
    """Of the way out, and for seats of both ways, so that each has one answer."""
    number = f"{kind}_no"
    offers = [row for row in tables[f"{kind}s"] if row["route_index"].startswith(DIRECT)]
    out = [row for row in offers if row["origin_city"] == trip["org"]]
    back = [row for row in offers if row["origin_city"] != trip["org"]]
    seats = {
        "seat_class": (lambda row: row["seat_class"].startswith(("First", "Business")), "a seat of the better class"),
        "seat_status": (lambda row: row["seat_status"] == "99", "seats for all of us"),
    }
    if name in seats:
        fits, words = seats[name]
        gold = {
            f"{way}_{number}": next(filter(fits, rows))[number] for way, rows in (("outbound", out), ("inbound", back))
        }
        return {"constraint_context": f"Go by {kind} both ways, with {words}."} | gold
    if name in ("latest_arrival_direct", "arrival_time_range"):
        best = max(back, key=lambda row: row["arr_datetime"])
        when = best["arr_datetime"].split(" ")[1]
        words = "latest direct one" if name == "latest_arrival_direct" else f"direct one that arrives at {when}"
        return {"constraint_context": f"Come back by {kind}, with the {words}.", f"inbound_{number}": best[number]}
    column = "train_type" if kind == "train" else "manufacturer" if "manufacturer" in name else "airline"
    named = any(word in name for word in ("airline", "manufacturer", "train_type"))
    group = [row for row in out if not named or row[column] == out[0][column]]
    keys: dict[str, Callable[[Row], Any]] = {
        "cheapest": lambda row: int(row["price"]),
        "earliest": lambda row: row["dep_datetime"],
        "departure": lambda row: row["dep_datetime"],
        "shortest": lambda row: int(row["duration"]),
    }
    best = min(group, key=keys[name.split("_")[0]])
    of = f" of {best[column]}" if named else ""
    words = f"at {best['dep_datetime'].split(' ')[1]}" if "range" in name else f"with the {name.split('_')[0]} one{of}"
    return {"constraint_context": f"Go there by direct {kind}, {words}.", f"outbound_{number}": best[number]}


def _hotel_wish(name: str, hotels: Sequence[Row], rng: random.Random) -> dict[str, Any]:
    one = rng.choice(hotels)
    brand = [row for row in hotels if row["brand"] == one["brand"]]
    star = [row for row in hotels if row["hotel_star"] == one["hotel_star"]]

    def score(row: Row) -> float:
        return float(row["score"])

    def price(row: Row) -> int:
        return int(row["price"])

    words, row = {
        "highest_rated": ("the highest-rated hotel", max(hotels, key=score)),
        "cheapest_brand": (f"the cheapest {one['brand']} hotel", min(brand, key=price)),
        "cheapest_star": (f"the cheapest hotel with {one['hotel_star']} stars", min(star, key=price)),
        "newest_decoration": (
            "a hotel decorated in 2025 or later",
            next(row for row in hotels if row["decoration_time"] == "2025"),
        ),
        "brand_highest_rated": (f"the highest-rated {one['brand']} hotel", max(brand, key=score)),
        "star_highest_rated": (f"the highest-rated hotel with {one['hotel_star']} stars", max(star, key=score)),
        "price_range": (f"a hotel from {price(one)} to {price(one)} yuan a night", one),
        "star_service_required": ("a hotel with a pool", next(row for row in hotels if "Pool" in row["services"])),
    }[name]
    return {"constraint_context": f"Stay at {words}.", "hotel_name": row["name"]}


def _restaurant_wish(name: str, tables: Tables, rng: random.Random) -> dict[str, Any]:
    place = rng.choice(tables["attractions"][2:])
    at = (place["latitude"], place["longitude"])
    near = [row for row in tables["restaurants"] if (row["query_latitude"], row["query_longitude"]) == at]
    one = rng.choice(near)
    minutes = {
        row["destination"]: int(row["distance_meters"]) for row in tables["roads"] if row["origin"] == ",".join(at)
    }
    words, row = {
        "highest_rated": ("the highest-rated restaurant", max(near, key=lambda row: float(row["rating"]))),
        "cheapest_nearby_attraction": (
            "the cheapest restaurant",
            min(near, key=lambda row: int(row["price_per_person"])),
        ),
        "closest_to_attraction": (
            "the closest restaurant",
            min(near, key=lambda row: minutes[f"{row['latitude']},{row['longitude']}"]),
        ),
        "must_eat_named": (f"'{one['restaurant_name']}'", one),
        "specific_cuisine_nearby": (f"a restaurant with the cuisine {one['cuisine']}", one),
        "specific_tag_nearby": (f"a restaurant with {one['tags']}", one),
    }[name]
    where = "" if name == "must_eat_named" else f" near '{place['attraction_name']}'"
    return {"constraint_context": f"Eat at {words}{where}.", "restaurant_name": row["restaurant_name"]}


def _attraction_wish(name: str, attractions: Sequence[Row], rng: random.Random) -> dict[str, Any]:
    best = sorted(attractions, key=lambda row: -float(row["rating"]))
    kind = rng.choice(TYPES[:2])
    of_kind = [row for row in best if row["attraction_type"] == kind]
    words, rows = {
        "must_visit_named": ("two of your choice", rng.sample(attractions, 2)),
        "all_of_type": (f"all of the type {kind}", of_kind),
        "top_rated_must_visit": ("the three highest-rated ones", best[:3]),
        "all_free_attractions": ("all free ones", [row for row in attractions if row["ticket_price"] == "0"]),
        "type_highest_rated": (f"the highest-rated one of the type {kind}", of_kind[:1]),
    }[name]
    names = [row["attraction_name"] for row in rows]
    words = " and ".join(names) if name == "must_visit_named" else f"of the attractions {words}"
    return {"constraint_context": f"Visit {words}.", "attraction_names": names}


# --- files ------------------------------------------------------------------------------------------------------------
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
