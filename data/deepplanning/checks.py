"""The 21 checks of common sense, in 8 dimensions of equal weight. Each is one function of a case.

Where the description of the benchmark leaves a choice, the check says what it does.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from data.deepplanning.database import Database, Row
from data.deepplanning.plan import Activity, Day, Plan, clock

OPEN_ALWAYS = ("Open 24 Hours", "全天开放")
WEEKDAYS = (
    ("Monday", "周一"),
    ("Tuesday", "周二"),
    ("Wednesday", "周三"),
    ("Thursday", "周四"),
    ("Friday", "周五"),
    ("Saturday", "周六"),
    ("Sunday", "周日"),
)
NOON, HOUR = 12 * 60, 60
ANCHORS = ("hotel", "attraction", "meal", "travel_intercity_public")


@dataclass(frozen=True)
class Case:
    """A plan before its judge: the plan, what the task says of the trip, and the task's database."""

    plan: Plan
    trip: Mapping[str, Any]  # the task's meta_info
    database: Database

    @property
    def nights(self) -> tuple[Day, ...]:
        """All days but the last."""
        return self.plan.days[:-1]

    @property
    def last(self) -> Day:
        return self.plan.days[-1]


def clean(city: str) -> str:
    """A city's name without what stands in brackets."""
    return re.sub(r"\([^()]+\)|（[^（）]+）", "", city).strip()


def transfer(day: Day) -> tuple[str, str] | None:
    """The cities of a day that says `from A to B`; None for any other day."""
    match = re.search(r"from\s+(.+?)\s+to\s+([^,，]+)", day.city, re.I)
    return (clean(match[1]), clean(match[2])) if match else None


def same_price(cost: float | None, text: str) -> bool:
    """Whether a plan's price and the database's are equal as whole numbers."""
    price = number(text)
    return cost is not None and price is not None and round(cost) == round(price)


def number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# --- route consistency ------------------------------------------------------------------------------------------------
def valid_trip_duration(case: Case) -> bool:
    return len(case.plan.days) == case.trip["days"] > 0


def closed_loop_route_structure(case: Case) -> bool:
    """The first day leaves the trip's origin and the last day returns there, if they name a journey at all."""
    first, last = transfer(case.plan.days[0]), transfer(case.last)
    return (not first or first[0] == case.trip["org"]) and (not last or last[1] == case.trip["org"])


def seamless_intercity_transfers(case: Case) -> bool:
    """Each day begins where the day before ended, and a journey between cities has a line that makes it."""
    place = case.trip["org"]
    for day in case.plan.days:
        cities = transfer(day)
        if cities is None:
            if clean(day.city) != place:
                return False
            continue
        lines = [
            (_city(case.database, line.origin), _city(case.database, line.destination))
            for line in day.all("travel_intercity_public")
        ]
        if cities[0] != place or cities not in lines:
            return False
        place = cities[1]
    return True


def _city(database: Database, station: str) -> str | None:
    """A station's city: as the tables say, else the first two Chinese characters of its name."""
    if station in database.cities:
        return database.cities[station]
    match = re.match("[\u4e00-\u9fff]{2}", station)
    return match[0] if match else None


# --- sandbox compliance -----------------------------------------------------------------------------------------------
def validated_accommodation(case: Case) -> bool:
    hotels = case.database.hotels
    rooms = all(
        day.hotel in hotels and same_price(day.hotel_price, hotels[day.hotel]["price"])
        for day in case.plan.days
        if day.hotel
    )
    visits = [visit.name for day in case.nights for visit in day.all("hotel")]
    return bool(hotels) and rooms and all(name in hotels for name in visits if name)


def validated_attractions(case: Case) -> bool:
    rows = case.database.attractions
    return all(
        visit.name in rows
        and visit.cost is not None
        and (
            number(rows[visit.name]["ticket_price"]) is None or same_price(visit.cost, rows[visit.name]["ticket_price"])
        )
        for visit in case.plan.all("attraction")
    )


def validated_meals(case: Case) -> bool:
    rows = case.database.last_restaurants
    return all(
        meal.name in rows and same_price(meal.cost, rows[meal.name]["price_per_person"])
        for meal in case.plan.all("meal")
    )


def validated_transportation(case: Case) -> bool:
    fares = case.database.fares
    return all(
        bool(line.origin and line.destination)
        and any(same_price(line.cost, fare) for fare in fares.get(line.number, ()))
        for line in case.plan.all("travel_intercity_public")
    )


# --- itinerary structure ----------------------------------------------------------------------------------------------
def traceable_accommodation(case: Case) -> bool:
    return all(day.hotel and day.all("hotel") for day in case.nights) and not case.last.hotel


def ends_with_accommodation(case: Case) -> bool:
    return all(day.activities and day.activities[-1].kind == "hotel" for day in case.nights)


def _departures(case: Case, day: Day) -> tuple[int | None, int | None]:
    """When a day leaves a city that is not the trip's origin, and when it arrives in one, in minutes of the day."""
    cities, lines = transfer(day), day.all("travel_intercity_public")
    if cities is None or not lines:
        return None, None
    home, end = case.trip["org"], lines[-1].end
    leaving = None if cities[0] == home else lines[0].start
    return leaving, None if cities[1] == home or end is None else end % (24 * HOUR)


def essential_meal_coverage(case: Case) -> bool:
    """As many meals as the day has time for. Where two are needed, the first two begin two hours apart at least.

    A day of travel without a line between cities, or with an unreadable time, is not judged.
    """
    return all(_fed(case, day) for day in case.plan.days)


def _fed(case: Case, day: Day) -> bool:
    meals = len(day.all("meal"))
    if transfer(day) is None:
        return meals >= 2 and _apart(day)
    leaving, arriving = _departures(case, day)
    if leaving is not None and not (
        meals == 0 if leaving < 9 * HOUR else meals <= 1 if leaving < 15 * HOUR else meals >= 1
    ):
        return False
    if arriving is None:
        return True
    if arriving < 10 * HOUR:
        return meals >= 2 and _apart(day)
    return meals >= 1 if arriving < 15 * HOUR else meals <= 1


def _apart(day: Day) -> bool:
    starts = sorted(meal.start for meal in day.all("meal") if meal.start is not None)
    return len(starts) < 2 or starts[1] - starts[0] >= 120


def essential_attraction_coverage(case: Case) -> bool:
    return all(_visited(case, day) for day in case.plan.days)


def _visited(case: Case, day: Day) -> bool:
    visits = day.all("attraction")
    if transfer(day) is None:
        names = {visit.name for visit in visits}
        moved = any(names & {ride.origin, ride.destination} for ride in day.all("travel_city"))
        return len(visits) >= 2 or (moved and sum(visit.minutes or 0 for visit in visits) >= 4 * HOUR)
    leaving, arriving = _departures(case, day)
    late = leaving is not None and leaving > 16 * HOUR
    early = arriving is not None and arriving < NOON
    return bool(visits) or not (late or early)


# --- time feasibility -------------------------------------------------------------------------------------------------
def no_time_overlaps(case: Case) -> bool:
    for day in case.plan.days:
        slots = sorted((a.start, a.end) for a in day.activities if a.start is not None and a.end is not None)
        if any(after[0] < before[1] for before, after in pairwise(slots)):
            return False
    return True


def reasonable_transfer_time(case: Case) -> bool:
    """Between two places lies the time that the road takes, give or take a little."""
    for day in case.plan.days:
        stops = [a for a in day.all(*ANCHORS) if a.start is not None and a.end is not None]
        for before, after in pairwise(stops):
            minutes = _road(case.database, before.destination or before.name, after.origin or after.name)
            gap = after.start - before.end
            if minutes is None or gap < 0:
                continue
            gap -= sum(_within(wait, before.end, after.start) for wait in day.all("buffer"))
            least = min(max(0, minutes - 5), minutes // 10 * 10)
            most = max(minutes + 5, -(-minutes // 10) * 10)
            if not least <= gap <= most:
                return False
    return True


def _within(wait: Activity, start: int, end: int) -> int:
    """The minutes of a buffer that lies between two times."""
    inside = wait.start is not None and wait.end is not None and start <= wait.start and wait.end <= end
    return (wait.minutes or 0) if inside else 0


def _road(database: Database, origin: str, destination: str) -> int | None:
    """Minutes from one place to another; None for one place, for unknown ones, and where no road is known."""
    start, end = database.coordinate(origin), database.coordinate(destination)
    row = database.roads.get((start, end)) if origin != destination and start and end else None
    minutes = number(row["duration_minutes"]) if row else None
    return None if minutes is None else int(minutes)


# --- business hours ---------------------------------------------------------------------------------------------------
def attraction_visit_within_opening_hours(case: Case) -> bool:
    """An attraction that is not in the database is not judged here."""
    rows = case.database.attractions
    return all(_open(visit, rows[visit.name]) is True for visit in case.plan.all("attraction") if visit.name in rows)


def dining_within_service_hours(case: Case) -> bool:
    """A restaurant that is not in the database, or whose hours are not there, is not judged."""
    rows = case.database.last_restaurants
    for meal in case.plan.all("meal"):
        if meal.start is None or meal.end is None:
            return False
        row = rows.get(meal.name)
        if row and row["opening_time"] and row["closing_time"] and not _open(meal, row):
            return False
    return True


def _open(stay: Activity, row: Row) -> bool:
    """Whether a stay lies within the opening hours, which may go over midnight; unreadable times count as closed."""
    if row["opening_time"] in OPEN_ALWAYS and row["closing_time"] in OPEN_ALWAYS:
        return True
    opening, closing = clock(row["opening_time"]), clock(row["closing_time"])
    if opening is None or closing is None or stay.start is None or stay.end is None:
        return False
    if closing <= opening:
        closing += 24 * HOUR
    return any(opening <= stay.start + late and stay.end + late <= closing for late in (0, 24 * HOUR))


def avoidance_of_closure_days(case: Case) -> bool:
    first = case.trip.get("depart_weekday")
    if not first:
        return True
    for index, day in enumerate(case.plan.days):
        weekday = WEEKDAYS[(int(first) - 1 + index) % 7]
        for visit in day.all("attraction"):
            row = case.database.attractions.get(visit.name)
            closed = {name.strip() for name in re.split("[,，、]", row["closing_dates"])} if row else set()
            if closed & set(weekday):
                return False
    return True


# --- duration ---------------------------------------------------------------------------------------------------------
def reasonable_duration_at_attractions(case: Case) -> bool:
    """An attraction that is not in the database is not judged here."""
    for visit in case.plan.all("attraction"):
        row = case.database.attractions.get(visit.name)
        if row is None:
            continue
        least, most = number(row["min_visit_hours"]), number(row["max_visit_hours"])
        if visit.minutes is None or least is None or most is None or not least <= visit.minutes / HOUR <= most:
            return False
    return True


def reasonable_meal_duration(case: Case) -> bool:
    return all(meal.minutes is not None and 30 <= meal.minutes <= 150 for meal in case.plan.all("meal"))


# --- cost and diversity -----------------------------------------------------------------------------------------------
def total_cost(case: Case) -> float:
    """What the plan costs all travellers together. A price that the plan does not state costs nothing."""
    people, days = case.trip["people_number"], case.plan.days
    lines = [line.cost or 0 for day in days for line in day.all("travel_intercity_public")[:1]]
    rides = [ride.cost or 0 for ride in case.plan.all("travel_city")]
    nights = [day.hotel_price or 0 for day in case.nights]
    persons = [stay.cost or 0 for stay in case.plan.all("meal", "attraction")]
    return (
        people * sum((*lines, *persons)) + math.ceil(people / 4) * sum(rides) + case.trip["room_number"] * sum(nights)
    )


def cost_calculation_correctness(case: Case) -> bool:
    stated, cost = case.plan.total, total_cost(case)
    if stated is None:
        return False
    return cost == 0 if stated == 0 else abs(cost - stated) / abs(stated) <= 0.10


def diverse_meal_options(case: Case) -> bool:
    names = [meal.name for meal in case.plan.all("meal")]
    return len(set(names)) == len(names)


def diverse_attraction_options(case: Case) -> bool:
    names = [visit.name for visit in case.plan.all("attraction")]
    return len(set(names)) == len(names)


DIMENSIONS: dict[str, tuple[Callable[[Case], bool], ...]] = {
    "route consistency": (valid_trip_duration, closed_loop_route_structure, seamless_intercity_transfers),
    "sandbox compliance": (
        validated_accommodation,
        validated_attractions,
        validated_meals,
        validated_transportation,
    ),
    "itinerary structure": (
        traceable_accommodation,
        ends_with_accommodation,
        essential_meal_coverage,
        essential_attraction_coverage,
    ),
    "time feasibility": (no_time_overlaps, reasonable_transfer_time),
    "business hours": (
        attraction_visit_within_opening_hours,
        dining_within_service_hours,
        avoidance_of_closure_days,
    ),
    "duration": (reasonable_duration_at_attractions, reasonable_meal_duration),
    "cost": (cost_calculation_correctness,),
    "diversity": (diverse_meal_options, diverse_attraction_options),
}
CHECKS = {check.__name__: check for checks in DIMENSIONS.values() for check in checks}
