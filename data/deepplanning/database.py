"""The tables of one task. They are read once, and a tool or a check looks things up in them by exact text."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from opd.errors import InputError
from opd.files import read_text

Row = Mapping[str, str]

JOURNEY = (
    "origin_city",
    "destination_city",
    "dep_date",
    "seat_class",
    "route_index",
    "segment_index",
    "seat_status",
    "arr_station_code",
    "arr_station_name",
    "dep_station_code",
    "dep_station_name",
    "duration",
    "arr_datetime",
    "dep_datetime",
    "price",
)
FILES = {
    "trains": "trains/trains.csv",
    "flights": "flights/flights.csv",
    "hotels": "hotels/hotels.csv",
    "attractions": "attractions/attractions.csv",
    "locations": "locations/locations_coords.csv",
    "roads": "transportation/distance_matrix.csv",
    "restaurants": "restaurants/restaurants.csv",
}
COLUMNS = {
    "trains": (*JOURNEY, "train_type", "train_no"),
    "flights": (*JOURNEY, "airline", "flight_no", "equip_size", "equip_type", "manufacturer"),
    "hotels": (
        "name",
        "address",
        "latitude",
        "longitude",
        "decoration_time",
        "hotel_star",
        "price",
        "score",
        "brand",
        "services",
    ),
    "attractions": (
        "attraction_id",
        "attraction_name",
        "city",
        "address",
        "latitude",
        "longitude",
        "description",
        "rating",
        "opening_time",
        "closing_time",
        "closing_dates",
        "min_visit_hours",
        "max_visit_hours",
        "ticket_price",
        "attraction_type",
    ),
    "locations": ("poi_name", "latitude", "longitude", "poi_type"),
    "roads": ("origin", "destination", "distance_meters", "duration_minutes", "cost"),
    "restaurants": (
        "restaurant_id",
        "restaurant_name",
        "latitude",
        "longitude",
        "price_per_person",
        "cuisine",
        "opening_time",
        "closing_time",
        "nearby_attraction_name",
        "rating",
        "tags",
        "query_latitude",
        "query_longitude",
    ),
}
REQUIRED = {  # the columns without which nothing can be looked up; any other that a file lacks reads as empty
    "trains": ("origin_city", "destination_city", "dep_date", "route_index", "segment_index", "train_no", "price"),
    "flights": ("origin_city", "destination_city", "dep_date", "route_index", "segment_index", "flight_no", "price"),
    "hotels": ("name", "price"),
    "attractions": ("attraction_name", "opening_time", "closing_time", "ticket_price"),
    "locations": ("poi_name", "latitude", "longitude"),
    "roads": ("origin", "destination", "duration_minutes"),
    "restaurants": ("restaurant_name", "price_per_person", "query_latitude", "query_longitude"),
}
OLDER = {"place_name": "poi_name"}  # a column's older name, and its present one
# Cells that pandas, with which the original's tools read the files, takes as empty.
EMPTY = frozenset(
    (
        "NA",
        "N/A",
        "n/a",
        "NULL",
        "null",
        "None",
        "NaN",
        "nan",
        "-NaN",
        "-nan",
        "<NA>",
        "#NA",
        "#N/A",
        "#N/A N/A",
        "1.#IND",
    )
) | {"1.#QNAN", "-1.#IND", "-1.#QNAN"}
KEPT = 64  # databases kept in memory, of a few MB each


@dataclass(frozen=True)
class Database:
    """The tables of a task by name. A table whose file is missing is None, which is not the same as an empty one."""

    tables: Mapping[str, Sequence[Row] | None]

    def rows(self, table: str) -> Sequence[Row]:
        """The rows of a table, none where its file is missing."""
        return self.tables[table] or ()

    @cached_property
    def hotels(self) -> dict[str, Row]:
        return {row["name"]: row for row in self.rows("hotels")}

    @cached_property
    def attractions(self) -> dict[str, Row]:
        """By name. The first row of a name counts."""
        return {row["attraction_name"]: row for row in reversed(self.rows("attractions"))}

    @cached_property
    def first_restaurants(self) -> dict[str, Row]:
        """By name, with the first row of a name, as the tools see it."""
        return {row["restaurant_name"]: row for row in reversed(self.rows("restaurants"))}

    @cached_property
    def last_restaurants(self) -> dict[str, Row]:
        """By name, with the last row of a name, as the scorer sees it."""
        return {row["restaurant_name"]: row for row in self.rows("restaurants")}

    @cached_property
    def restaurants_near(self) -> dict[tuple[str, str], list[Row]]:
        near: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows("restaurants"):
            near.setdefault((row["query_latitude"], row["query_longitude"]), []).append(row)
        return near

    @cached_property
    def locations(self) -> dict[str, Row]:
        return {row["poi_name"]: row for row in reversed(self.rows("locations"))}

    @cached_property
    def roads(self) -> dict[tuple[str, str], Row]:
        return {(row["origin"], row["destination"]): row for row in reversed(self.rows("roads"))}

    @cached_property
    def coordinates(self) -> frozenset[str]:
        """Every coordinate from which or to which a road is known."""
        return frozenset(place for pair in self.roads for place in pair)

    @cached_property
    def cities(self) -> dict[str, str]:
        """The city of every station and airport. The first row that names a station counts."""
        cities: dict[str, str] = {}
        for row in (*self.rows("flights"), *self.rows("trains")):
            cities.setdefault(row["dep_station_name"], row["origin_city"])
            cities.setdefault(row["arr_station_name"], row["destination_city"])
        return cities

    @cached_property
    def fares(self) -> dict[str, list[str]]:
        """All prices of a flight number, or else of a train number."""
        fares: dict[str, dict[str, list[str]]] = {"flights": {}, "trains": {}}
        for table, column in (("flights", "flight_no"), ("trains", "train_no")):
            for row in self.rows(table):
                fares[table].setdefault(row[column], []).append(row["price"])
        return fares["trains"] | fares["flights"]

    @cached_property
    def names(self) -> frozenset[str]:
        """Every name of a place, with which a plan's `FROM - TO` is split where names hold a dash themselves."""
        return frozenset((*self.locations, *self.hotels, *self.attractions, *self.first_restaurants, *self.cities))

    def coordinate(self, name: str) -> str | None:
        """`latitude,longitude` of a place, as the roads write it."""
        row = self.locations.get(name)
        return f"{row['latitude']},{row['longitude']}" if row else None


@lru_cache(maxsize=KEPT)
def read_database(folder: Path) -> Database:
    """The database in a task's folder. Raises InputError where the folder is missing or a file is not as expected."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is missing, and the tools of its task read it. Expected the folder of a task's CSV files. "
            "Run: python -m data.prepare deepplanning"
        )
    tables = {}
    for table, name in FILES.items():
        path = folder / name
        tables[table] = read_table(read_text(path, "a CSV file"), table, str(path)) if path.exists() else None
    return Database(tables)


def read_table(text: str, table: str, where: str) -> list[Row]:
    """The rows of a CSV text, every cell as text and an empty cell as "". Raises InputError that names `where`."""
    if not text.strip():
        return []
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = [OLDER.get(name, name) for name in reader.fieldnames or ()]
        if lacking := [name for name in REQUIRED[table] if name not in header]:
            raise InputError(
                f"{where}: no column {lacking[0]!r}; it has {str(header)[:300]}. Expected {', '.join(COLUMNS[table])}."
            )
        reader.fieldnames = header
        return [{name: _cell(row.get(name)) for name in COLUMNS[table]} for row in reader]
    except csv.Error as error:
        raise InputError(f"{where}: not CSV ({error}). Expected fields in double quotes.") from None


def _cell(text: str | None) -> str:
    return "" if text is None or text in EMPTY else text
