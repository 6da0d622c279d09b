"""The nine tools. Each is a look-up by exact text: no state, no randomness, and no argument goes anywhere else.

With `quirks` they answer as the original's code does, also where that differs from its own documentation:
- Where no flight is found, the answer is an error, because the original's text misses an argument.
- Segments and routes are ordered as texts, "10" before "2".
- An attraction without closing days has the closing days "nan".
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.deepplanning.database import Database, Row

Arguments = Mapping[str, str]
NOT_LOADED = "Database not loaded"


def answer(database: Database, schemas: Sequence[Mapping[str, Any]], name: str, arguments: Any, quirks: bool) -> str:
    """What a tool answers. Anything wrong with the call is a text for the model, never an exception.

    Args:
        schemas: descriptions of the tools, whose parameters the arguments are checked against.
        name, arguments: as the model wrote them.
    """
    schema = next((s["function"]["parameters"] for s in schemas if s["function"]["name"] == name), None)
    if schema is None or name not in TOOLS:
        return error(f"tool '{name}' not found")
    if fault := _fault(schema, arguments):
        return error(fault)
    try:
        return TOOLS[name](database, arguments, quirks)
    except ValueError as problem:  # a number of the database that cannot be read
        return error(str(problem))


def error(text: str) -> str:
    return json.dumps({"error": text}, ensure_ascii=False)


def _fault(schema: Mapping[str, Any], arguments: Any) -> str | None:
    """What is wrong with the arguments, in the words of jsonschema."""
    if not isinstance(arguments, dict):
        return f"{arguments!r} is not of type 'object'"
    for name in schema["required"]:
        if name not in arguments:
            return f"{name!r} is a required property"
    for name in schema["properties"]:
        if name in arguments and not isinstance(arguments[name], str):
            return f"{arguments[name]!r} is not of type 'string'"
    return None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _order(text: str, quirks: bool) -> tuple[int, str]:
    return (int(text) if not quirks and text.isascii() and text.isdigit() else 0, text)


# --- trains and flights -----------------------------------------------------------------------------------------------
def _routes(rows: Sequence[Row], arguments: Arguments, quirks: bool) -> list[list[Row]]:
    """The offers for a journey: each is the rows of one route, in the order of its segments."""
    wanted = (arguments["origin"], arguments["destination"], arguments["depDate"])
    seat = arguments.get("seatClassName", "")
    routes: dict[str, list[Row]] = {}
    for row in rows:
        if (row["origin_city"], row["destination_city"], row["dep_date"]) == wanted and seat in ("", row["seat_class"]):
            routes.setdefault(row["route_index"], []).append(row)
    return [
        sorted(routes[index], key=lambda row: _order(row["segment_index"], quirks))
        for index in sorted(routes, key=lambda index: _order(index, quirks))
    ]


def _segment(row: Row, kind: str, number: str, city: str) -> dict[str, Any]:
    return {
        "arrCityName": row["destination_city"],
        "arrStationCode": row["arr_station_code"],
        "arrStationName": row["arr_station_name"],
        "depCityName": city,
        "depStationCode": row["dep_station_code"],
        "depStationName": row["dep_station_name"],
        "duration": int(row["duration"]),
        "arrDateTime": row["arr_datetime"],
        "depDateTime": row["dep_datetime"],
        "marketingTransportName": row[kind],
        "marketingTransportNo": row[number],
        "seatClassName": row["seat_class"],
        "Remaining Seats": row["seat_status"] or "Available",
    }


def _price(route: Sequence[Row]) -> float:
    try:
        return float(route[0]["price"])
    except ValueError:
        return 0


def _nothing(kind: str, arguments: Arguments) -> str:
    journey = f"from {arguments['origin']} to {arguments['destination']} on {arguments['depDate']}"
    return f"No {kind} information found {journey}"


def query_train_info(database: Database, arguments: Arguments, quirks: bool) -> str:
    if database.tables["trains"] is None:
        return "No information found"
    offers = []
    for route in _routes(database.rows("trains"), arguments, quirks):
        cities = [route[0]["origin_city"], *(row["arr_station_name"].split(" Station")[0] for row in route[:-1])]
        segments = [_segment(row, "train_type", "train_no", city) for row, city in zip(route, cities, strict=True)]
        offers.append([{f"Segment {k}": s for k, s in enumerate(segments, 1)} | {"price": _price(route)}])
    return _json(offers) if offers else _nothing("train", arguments)


def query_flight_info(database: Database, arguments: Arguments, quirks: bool) -> str:
    if database.tables["flights"] is None:
        return "No information found, please check input parameters"
    offers = []
    for route in _routes(database.rows("flights"), arguments, quirks):
        offer: dict[str, Any] = {}
        for number, row in enumerate(route, 1):
            offer[f"Segment {number}"] = _segment(row, "airline", "flight_no", row["origin_city"]) | {
                "equipSize": row["equip_size"],
                "equipType": row["equip_type"],
                "manufacturer": row["manufacturer"],
            }
        offers.append(offer | {"price": _price(route)})
    if not offers and quirks:
        return error("missing 1 required positional argument: 'seat'")
    return _json(offers) if offers else _nothing("flight", arguments)


# --- hotels and attractions -------------------------------------------------------------------------------------------
def query_hotel_info(database: Database, arguments: Arguments, quirks: bool) -> str:
    if database.tables["hotels"] is None:
        return NOT_LOADED
    star, brand = arguments.get("hotelStar", ""), arguments.get("hotelBrands", "")
    hotels = [
        {
            "name": row["name"],
            "address": row["address"],
            "latitude": row["latitude"],
            "longitude": row["longitude"],
            "decorationTime": row["decoration_time"],
            "hotelStar": row["hotel_star"],
            "price": row["price"],
            "score": row["score"],
            "brand": row["brand"],
        }
        | _list("services", row["services"])
        for row in database.rows("hotels")
        if star in ("", row["hotel_star"]) and brand in ("", row["brand"])
    ]
    if hotels:
        return _json(hotels)
    place, start, end = arguments["destination"], arguments["checkinDate"], arguments["checkoutDate"]
    return f"No hotel information found in {place} from {start} to {end}, please check parameters or reduce constraints"


def _list(name: str, text: str) -> dict[str, list[str]]:
    """A list that stands in one cell, under its name; nothing where the cell is empty."""
    parts = [part.strip() for part in text.split(";") if part.strip()]
    return {name: parts} if parts else {}


def query_attraction_details(database: Database, arguments: Arguments, quirks: bool) -> str:
    if database.tables["attractions"] is None:
        return NOT_LOADED
    name = arguments["attraction_name"]
    row = database.attractions.get(name)
    if row is None:
        return f"Detailed information not found for attraction {name}"
    opening, closing = row["opening_time"], row["closing_time"]
    lines = {
        "Attraction ID": row["attraction_id"],
        "Attraction Name": row["attraction_name"],
        "City": row["city"],
        "Address": row["address"],
        "Coordinates": f"Latitude {row['latitude']}，Longitude {row['longitude']}",
        "Description": row["description"],
        "Rating": f"{_float(row['rating'])}(average visitor rating)",
        "Opening Hours": opening if opening == closing else f"{opening} to {closing}",
        "Closed Dates": row["closing_dates"] or ("nan" if quirks else ""),
        "Minimum Visit Duration": f"{_float(row['min_visit_hours'])} hours",
        "Maximum Visit Duration": f"{_float(row['max_visit_hours'])} hours",
        "Ticket Price": f"{_float(row['ticket_price']) or '0'} RMB",
        "Attraction Type": row["attraction_type"],
    }
    return "\n".join(f"{label}：{text}" for label, text in lines.items())


def _float(text: str) -> str:
    return str(float(text)) if text else ""


def recommend_attractions(database: Database, arguments: Arguments, quirks: bool) -> str:
    if database.tables["attractions"] is None:
        return NOT_LOADED
    kind = arguments.get("attraction_type", "")
    lines = [
        f"{row['attraction_name']}, {row['description']}. This is a {row['attraction_type']} type attraction"
        for row in database.rows("attractions")
        if kind in ("", row["attraction_type"])
    ]
    return "\n".join(["Recommended attractions:\n", *lines]) if lines else "No attraction recommendations found"


# --- places, roads and restaurants ------------------------------------------------------------------------------------
def search_location(database: Database, arguments: Arguments, quirks: bool) -> str:
    if database.tables["locations"] is None:
        return NOT_LOADED
    name = arguments["place_name"]
    row = database.locations.get(name)
    if row is not None:
        return _json({"place_name": name, "latitude": row["latitude"], "longitude": row["longitude"]})
    return (
        f"Coordinate information not found for location {name}, please check: 1. Whether the place name comes from "
        "other tool results; 2. Whether the place name is exactly consistent with tool results, no abbreviation, "
        "renaming or additional description allowed"
    )


def query_road_route_info(database: Database, arguments: Arguments, quirks: bool) -> str:
    if database.tables["roads"] is None:
        return NOT_LOADED
    origin, destination = arguments["origin"], arguments["destination"]
    for place in (origin, destination):
        if place not in database.coordinates:
            return (
                f"Coordinate {place} is not in query range, please check:\n1. Whether coordinate comes from valid tool "
                "query result, not manual input or fabrication;\n2. Whether coordinate precision is exactly consistent "
                "with query result, 6 decimal places"
            )
    row = database.roads.get((origin, destination))
    if row is None:
        return f"No transportation information found from {origin} to {destination}"
    return _json(
        {
            "origin": origin,
            "destination": destination,
            "distance_in_meters": int(row["distance_meters"]),
            "duration_in_minutes": int(row["duration_minutes"]),
            "cost": int(row["cost"]),
        }
    )


def _restaurant(row: Row) -> dict[str, Any]:
    return {
        "name": row["restaurant_name"],
        "latitude": row["latitude"],
        "longitude": row["longitude"],
        "price_per_person": row["price_per_person"],
        "cuisine": row["cuisine"],
        "opening_time": row["opening_time"],
        "closing_time": row["closing_time"],
        "nearby_attraction_name": row["nearby_attraction_name"],
        "rating": row["rating"],
    } | _list("tags", row["tags"])


def recommend_restaurants(database: Database, arguments: Arguments, quirks: bool) -> str:
    if database.tables["restaurants"] is None:
        return NOT_LOADED
    place = (arguments["latitude"], arguments["longitude"])
    near = database.restaurants_near.get(place)
    if near:
        return _json([_restaurant(row) for row in near])
    return f"No recommended restaurants found near coordinates ({place[0]}, {place[1]}), please check coordinate source"


def query_restaurant_details(database: Database, arguments: Arguments, quirks: bool) -> str:
    name = arguments["restaurant_name"]
    if database.tables["restaurants"] is None:
        return _json({"message": NOT_LOADED, "restaurant_name": name})
    row = database.first_restaurants.get(name)
    if row is None:
        message = f"Detailed information not found for restaurant {name}"
        return _json({"message": message, "restaurant_name": name})
    return _json({"id": row["restaurant_id"]} | _restaurant(row))


TOOLS: dict[str, Callable[[Database, Arguments, bool], str]] = {
    tool.__name__: tool
    for tool in (
        query_train_info,
        query_flight_info,
        query_hotel_info,
        query_attraction_details,
        recommend_attractions,
        search_location,
        query_road_route_info,
        recommend_restaurants,
        query_restaurant_details,
    )
}
