"""The wishes of an invented trip: each kind with its answer, found in the tables, and a sentence for the request."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from data.deepplanning.checks import Case, total_cost
from data.deepplanning.constraints import KINDS
from data.deepplanning.database import Database, Row
from data.deepplanning.oracle import DIRECT, write_plan
from data.deepplanning.plan import parse_plan, read_plan
from data.deepplanning.world import TYPES, Tables

BUDGET_ROOM = 1.02  # the budget of a trip, as a multiple of what a frugal plan costs


def make_wish(kind: str, trip: dict[str, Any], tables: Tables, rng: random.Random) -> dict[str, Any]:
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
