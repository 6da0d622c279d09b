"""The tables of an invented trip. Prices, ratings and times are distinct, so that every wish has one answer."""

import random
from collections.abc import Sequence
from typing import Any

from data.deepplanning.checks import WEEKDAYS
from data.deepplanning.database import Row
from data.deepplanning.oracle import DIRECT

TYPES = ("Historical and Cultural", "Natural Scenery", "Art Exhibition", "City Landmark")
BRANDS = ("Amber", "Birch", "Cedar", "Dune")
CUISINES = ("Noodles", "Grill", "Seafood")
TAGS = ("Birthday Package", "Waiting Area", "Terrace")
AIRLINES = ("North Air", "South Air")
MAKERS = ("Airbus", "Boeing")

Tables = dict[str, list[dict[str, str]]]


def make_tables(trip: dict[str, Any], rng: random.Random) -> Tables:
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
