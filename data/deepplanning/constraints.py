"""The personal wishes of a task. Each kind names an entity, its gold, that must stand in the plan.

How the entity was found is not judged. A wish of a kind that is not known here is not counted, as in the benchmark.
"""

from collections.abc import Callable, Mapping
from typing import Any

from data.deepplanning.checks import Case, total_cost

FLIGHT_MODES = frozenset({"flight", "airplane", "plane", "飞机"})
TRAIN_MODES = frozenset({"train", "railway", "火车", "高铁", "gaotie"})
KINDS = {
    "flight_": (
        "seat_class",
        "seat_status",
        "cheapest_direct",
        "cheapest_airline_direct",
        "cheapest_manufacturer_direct",
        "earliest_departure_direct",
        "earliest_airline_direct",
        "shortest_duration_direct",
        "departure_time_range",
        "arrival_time_range",
    ),
    "train_": (
        "seat_class",
        "seat_status",
        "cheapest_direct",
        "cheapest_train_type",
        "earliest_departure_direct",
        "latest_arrival_direct",
        "shortest_duration_direct",
        "departure_time_range",
    ),
    "hotel_": (
        "highest_rated",
        "cheapest_brand",
        "cheapest_star",
        "newest_decoration",
        "brand_highest_rated",
        "star_highest_rated",
        "price_range",
        "star_service_required",
    ),
    "restaurant_": (
        "highest_rated",
        "cheapest_nearby_attraction",
        "closest_to_attraction",
        "must_eat_named",
        "specific_cuisine_nearby",
        "specific_tag_nearby",
    ),
    "attraction_": (
        "must_visit_named",
        "all_of_type",
        "top_rated_must_visit",
        "all_free_attractions",
        "type_highest_rated",
    ),
    "budget_": ("constraint",),
}
ALL_KINDS = tuple(prefix + name for prefix, names in KINDS.items() for name in names)

Wish = Mapping[str, Any]


def wishes(trip: Mapping[str, Any], quirks: bool) -> dict[str, Wish]:
    """The counted wishes of a task by kind.

    With `quirks`, only those where the original looks for them. English task 79 has its budget beside the others, so
    the original does not count it.
    """
    found = dict(trip["hard_constraints"])
    if not quirks and "budget_constraint" in trip:
        found["budget_constraint"] = trip["budget_constraint"]
    return {kind: wish for kind, wish in found.items() if any(kind.startswith(prefix) for prefix in HOLDS)}


def holds(kind: str, wish: Wish, case: Case) -> bool:
    """Whether a wish is fulfilled. A wish that lacks its gold entity fails, but for trains and flights."""
    check = next(check for prefix, check in HOLDS.items() if kind.startswith(prefix))
    try:
        return check(wish, case)
    except (KeyError, TypeError, ValueError):  # a wish of another shape fails, as any exception does in the original
        return False


def _by_flight(wish: Wish, case: Case) -> bool:
    return _travels(wish, case, "flight_no", FLIGHT_MODES)


def _by_train(wish: Wish, case: Case) -> bool:
    return _travels(wish, case, "train_no", TRAIN_MODES)


def _travels(wish: Wish, case: Case, column: str, modes: frozenset[str]) -> bool:
    numbers = {line.number for line in case.plan.all("travel_intercity_public") if line.mode.lower() in modes}
    return {wish[f"{way}_{column}"] for way in ("outbound", "inbound") if wish.get(f"{way}_{column}")} <= numbers


def _sleeps(wish: Wish, case: Case) -> bool:
    return bool(wish["hotel_name"]) and wish["hotel_name"] in [day.hotel for day in case.plan.days]


def _eats(wish: Wish, case: Case) -> bool:
    return bool(wish["restaurant_name"]) and wish["restaurant_name"] in [meal.name for meal in case.plan.all("meal")]


def _visits(wish: Wish, case: Case) -> bool:
    names = wish["attraction_names"]
    return bool(names) and set(names) <= {visit.name for visit in case.plan.all("attraction")}


def _affords(wish: Wish, case: Case) -> bool:
    return total_cost(case) <= float(wish["max_budget"])


HOLDS: dict[str, Callable[[Wish, Case], bool]] = {
    "flight_": _by_flight,
    "train_": _by_train,
    "hotel_": _sleeps,
    "restaurant_": _eats,
    "attraction_": _visits,
    "budget_constraint": _affords,
}
