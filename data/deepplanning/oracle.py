"""A planner that knows the answers of a synthetic task and writes a plan in which everything holds.

It is made for the tasks of synthetic.py, whose days have room for every wish. It can be told to miss one wish, which
shows that the scorer sees it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.deepplanning.checks import HOUR, OPEN_ALWAYS, WEEKDAYS, Case, total_cost
from data.deepplanning.constraints import wishes
from data.deepplanning.database import Database, Row
from data.deepplanning.plan import clock, parse_plan, read_plan

NUMBER = {"trains": "train_no", "flights": "flight_no"}
MIDNIGHT = 24 * HOUR
MEAL = 75  # minutes
DIRECT = "1"  # how the index of a route without a change begins in the synthetic tables


@dataclass(frozen=True)
class Choices:
    """What a plan takes: the rows of both journeys, the hotel, the restaurants, and the attractions of every day."""

    out: Row
    back: Row
    hotel: Row
    restaurants: Sequence[Row]
    attractions: Sequence[Sequence[Row]]


@dataclass
class DayWriter:
    """Writes the lines of a day one after the other."""

    database: Database
    now: int
    place: str
    lines: list[str] = field(default_factory=list)

    def line(self, minutes: int, text: str) -> None:
        self.lines.append(f"{_time(self.now)}-{_time(self.now + minutes)} | {text}")
        self.now += minutes

    def go(self, place: str) -> None:
        """Rides to another place."""
        if place == self.place:
            return
        road = self.database.roads[self.database.coordinate(self.place), self.database.coordinate(place)]
        distance = int(road["distance_meters"]) / 1000
        minutes, cost = int(road["duration_minutes"]), road["cost"]
        self.line(minutes, f"travel_city | {self.place} - {place}, {distance:.1f}km, {minutes}min, ¥{cost}")
        self.place = place

    def wait(self, until: int) -> None:
        if self.now < until:
            self.line(until - self.now, "buffer | Free time")

    def visit(self, row: Row) -> None:
        self.go(row["attraction_name"])
        self.wait(_opening(row))
        minutes = math.ceil(float(row["min_visit_hours"]) * HOUR)
        self.line(minutes, f"attraction | {row['attraction_name']}, ¥{row['ticket_price']}/person")

    def eat(self, kind: str, row: Row, earliest: int) -> None:
        self.go(row["restaurant_name"])
        self.wait(max(earliest, _opening(row)))
        self.line(MEAL, f"meal | {kind}, {row['restaurant_name']}, ¥{row['price_per_person']}/person")

    def journey(self, row: Row) -> None:
        kind, column = ("train", "train_no") if "train_no" in row else ("flight", "flight_no")
        places = f"{row['dep_station_name']} - {row['arr_station_name']}"
        text = f"travel_intercity_public | {kind} {row[column]}, {places}, ¥{row['price']}/person"
        self.line(int(row["duration"]), text)
        self.place = row["arr_station_name"]

    def sleep(self, hotel: Row) -> None:
        self.go(hotel["name"])
        self.line(MIDNIGHT - self.now, f"hotel | Rest, {hotel['name']}")


def _time(minutes: int) -> str:
    return f"{minutes // HOUR:02}:{minutes % HOUR:02}"


def _opening(row: Row) -> int:
    return 0 if row["opening_time"] in OPEN_ALWAYS else clock(row["opening_time"]) or 0


def write_plan(trip: Mapping[str, Any], database: Database, miss: str | None = None) -> str:
    """The text of a plan, in the form that the prompt asks for, in which everything holds.

    Args:
        trip: the task's meta_info.
        miss: a kind of wish that the plan does not fulfil.
    """
    choices = choose(trip, database, miss)
    days = [_first_day(trip, database, choices)]
    days += [_full_day(trip, database, choices, day) for day in range(1, trip["days"] - 1)]
    days.append(_last_day(trip, database, choices))
    text = "\n".join(f"Day {number}:\n{day}" for number, day in enumerate(days, 1))
    return f"{text}\n{_budget(text, trip, database)}"


def _first_day(trip: Mapping[str, Any], database: Database, choices: Choices) -> str:
    day = DayWriter(database, _leaving(choices.out), choices.out["dep_station_name"])
    day.journey(choices.out)
    day.eat("Lunch", choices.restaurants[0], 11 * HOUR)
    for attraction in choices.attractions[0]:
        day.visit(attraction)
    day.eat("Dinner", choices.restaurants[1], 17 * HOUR)
    day.sleep(choices.hotel)
    return _day(f"from {trip['org']} to {trip['dest'][0]}", choices.hotel, day)


def _full_day(trip: Mapping[str, Any], database: Database, choices: Choices, number: int) -> str:
    day = DayWriter(database, 8 * HOUR, choices.hotel["name"])
    morning, afternoon = choices.attractions[number]
    day.visit(morning)
    day.eat("Lunch", choices.restaurants[2 * number], 11 * HOUR)
    day.visit(afternoon)
    day.eat("Dinner", choices.restaurants[2 * number + 1], 17 * HOUR)
    day.sleep(choices.hotel)
    return _day(trip["dest"][0], choices.hotel, day)


def _last_day(trip: Mapping[str, Any], database: Database, choices: Choices) -> str:
    day = DayWriter(database, 8 * HOUR, choices.hotel["name"])
    day.line(15, f"hotel | Check-out, {choices.hotel['name']}")
    for attraction in choices.attractions[-1]:
        day.visit(attraction)
    day.eat("Lunch", choices.restaurants[2 * trip["days"] - 2], 11 * HOUR)
    day.go(choices.back["dep_station_name"])
    day.wait(_leaving(choices.back))
    day.journey(choices.back)
    return _day(f"from {trip['dest'][0]} to {trip['org']}", None, day)


def _leaving(row: Row) -> int:
    return clock(row["dep_datetime"].split(" ")[1]) or 0


def _day(city: str, hotel: Row | None, day: DayWriter) -> str:
    room = f"{hotel['name']}, ¥{hotel['price']}/room/night" if hotel else "-"
    return "\n".join([f"Current City: {city}", f"Accommodation: {room}", *day.lines])


def _budget(text: str, trip: Mapping[str, Any], database: Database) -> str:
    """The budget summary of a plan without one. The scorer's own sum is its total."""
    case = Case(read_plan(parse_plan(text, database.names)[0]), trip, database)

    def sum_of(**changes: Any) -> float:
        return total_cost(replace(case, trip={**trip, **changes}))

    total, without_rooms = sum_of(), sum_of(room_number=0)
    people = trip["people_number"]
    meals = people * sum(meal.cost or 0 for meal in case.plan.all("meal"))
    tickets = people * sum(visit.cost or 0 for visit in case.plan.all("attraction"))
    amounts = {
        "Transportation": without_rooms - meals - tickets,
        "Accommodation": total - without_rooms,
        "Meals": meals,
        "Attractions & Tickets": tickets,
        "Total Estimated Budget": total,
    }
    return "\n".join(["**Budget Summary**:", *(f"   **{name}: {amount:.0f} RMB**" for name, amount in amounts.items())])


# --- what to take -----------------------------------------------------------------------------------------------------
def choose(trip: Mapping[str, Any], database: Database, miss: str | None = None) -> Choices:
    """What fulfils all wishes but `miss`, and costs little; with the budget missed, what costs much."""
    wished = wishes(trip, quirks=True)
    missed = wished.pop(miss) if miss else {}
    gold: dict[str, list[str]] = {"hotel": [], "restaurant": [], "attraction": []}
    banned = set(_names(missed)[:1])
    for wish in wished.values():
        for what, names in gold.items():
            names += _names({key: wish[key] for key in wish if key.startswith(what)})
    sign = -1 if miss == "budget_constraint" else 1

    def take(rows: Iterable[Row], name: str, price: str, first: Sequence[str]) -> list[Row]:
        """The wished rows, then the others by price; never a banned one."""
        order = sorted(rows, key=lambda row: (row[name] not in first, sign * float(row[price])))
        return [row for row in order if row[name] not in banned]

    attractions = take(database.rows("attractions"), "attraction_name", "ticket_price", gold["attraction"])
    return Choices(
        _journey(trip, database, "outbound", missed),
        _journey(trip, database, "inbound", missed),
        take(database.rows("hotels"), "name", "price", gold["hotel"])[0],
        take(database.last_restaurants.values(), "restaurant_name", "price_per_person", gold["restaurant"]),
        _deal(trip, attractions),
    )


def _names(wish: Mapping[str, Any]) -> list[str]:
    names = [wish[key] for key in ("hotel_name", "restaurant_name") if key in wish]
    return names + list(wish.get("attraction_names", ()))


def _journey(trip: Mapping[str, Any], database: Database, way: str, missed: Mapping[str, Any]) -> Row:
    """The direct offer that the wishes name for a way, or any other than the missed one."""
    named = [wish for wish in wishes(trip, quirks=True).values() if wish is not missed]
    cities = (trip["org"], trip["dest"][0])
    origin, date = (cities[0], trip["depart_date"]) if way == "outbound" else (cities[1], trip["return_date"])
    offers = [
        (row, row[column], f"{way}_{column}")
        for table, column in NUMBER.items()
        for row in database.rows(table)
        if (row["origin_city"], row["dep_date"]) == (origin, date) and row["route_index"].startswith(DIRECT)
    ]
    wanted = [row for row, number, key in offers if any(wish.get(key) == number for wish in named)]
    return (wanted or [row for row, number, key in offers if missed.get(key) != number])[0]


def _deal(trip: Mapping[str, Any], attractions: Sequence[Row]) -> list[list[Row]]:
    """One attraction for the first and the last day, two for the others, each on a day on which it is open."""
    days: list[list[Row]] = [[] for _ in range(trip["days"])]
    room = [1 if day in (0, trip["days"] - 1) else 2 for day in range(trip["days"])]
    wanted = sorted(attractions[: sum(room)], key=lambda row: not row["closing_dates"])
    for row in wanted:
        day = next(
            day
            for day in range(trip["days"])
            if len(days[day]) < room[day]
            and not set(WEEKDAYS[(trip["depart_weekday"] - 1 + day) % 7]) & {row["closing_dates"]}
        )
        days[day].append(row)
    return days
