"""A plan: its text in the format that the prompt asks for, the JSON of the benchmark, and what the checks read.

The text is read by fixed rules, so the same text always gives the same plan, and a line that the rules cannot read is
counted. The original has a model turn the text into JSON (convert.py does that on request), so numbers may differ.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from data.deepplanning.calls import spoken
from opd.files import check

LONGEST = 1000  # characters of a line; a longer one is counted as unread, so that no pattern works long on it
BLOCK = re.compile(r"<plan>(.*?)</plan>", re.S | re.I)
DAY = re.compile(r"day\s*(\d{1,3})\b", re.I)
CITY = re.compile(r"current city\s*[:：]\s*(.*)", re.I)
HOTEL = re.compile(r"accommodation\s*[:：]\s*(.*)", re.I)
SUMMARY = re.compile(r"budget summary", re.I)
BUDGET = {
    "transportation": re.compile(r"transportation\s*[:：](.*)", re.I),
    "accommodation": re.compile(r"accommodation\s*[:：](.*)", re.I),
    "meals": re.compile(r"meals\s*[:：](.*)", re.I),
    "attractions_and_tickets": re.compile(r"attractions(?:\s*(?:&|and)\s*tickets)?\s*[:：](.*)", re.I),
    "other": re.compile(r"other\s*[:：](.*)", re.I),
    "total_estimated_budget": re.compile(r"total(?: estimated)? budget\s*[:：](.*)", re.I),
}
CURRENCY = re.compile(r"currency\s*[:：]", re.I)
SLOT = re.compile(r"(\d{1,2}:\d{2})\s*[-–—~]\s*(\d{1,2}:\d{2})\s*\|([^|]*)\|(.*)")
NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
COST = re.compile(
    rf"[,，]\s*(?:[¥￥]\s*({NUMBER.pattern})\s*(?:RMB|CNY|yuan)?|({NUMBER.pattern})\s*(?:RMB|CNY|yuan))(?:/\w+)*$", re.I
)
TIME = re.compile(r"[,，]\s*(\d[\d.]*)\s*min(?:ute)?s?$", re.I)
DISTANCE = re.compile(r"[,，]\s*(\d[\d.]*)\s*k?m$", re.I)
INTERCITY = re.compile(r"(\w+)\s+([^\s,，]+)\s*[,，]\s*(.+)")
FIRST = re.compile(r"([^,，]+)[,，]\s*(.+)")
DECORATION = re.compile(r"[-=*_`#\s]*")

Kind = Literal["travel_intercity_public", "travel_city", "attraction", "meal", "hotel", "buffer"]


class Details(TypedDict):
    mode: NotRequired[str | None]
    number: NotRequired[str | None]
    origin: NotRequired[str | None]
    to: NotRequired[str | None]
    distance: NotRequired[str | float | None]
    duration: NotRequired[str | float | None]
    cost: NotRequired[float | None]
    name: NotRequired[str | None]
    city: NotRequired[str | None]
    meal_type: NotRequired[str | None]
    activity: NotRequired[str | None]
    description: NotRequired[str | None]


class JsonActivity(TypedDict):
    time_slot: NotRequired[str | None]
    type: Kind
    details: Details


class JsonHotel(TypedDict):
    name: NotRequired[str | None]
    price_per_night: NotRequired[float | None]


class JsonDay(TypedDict):
    day_number: NotRequired[int | None]
    current_city: NotRequired[str | None]
    accommodation: NotRequired[JsonHotel | None]
    activities: list[JsonActivity]


class JsonBudget(TypedDict):
    total_estimated_budget: NotRequired[float | None]


class JsonPlan(TypedDict):
    budget_summary: NotRequired[JsonBudget | None]
    daily_plans: list[JsonDay]


@dataclass(frozen=True)
class Activity:
    """A line of a day. A text that the line does not have is empty."""

    kind: Kind
    start: int | None  # minutes of the day; None where the time cannot be read
    end: int | None  # minutes after the same midnight, so behind `start` also when the line ends on the next day
    name: str = ""  # of an attraction, a restaurant or a hotel
    cost: float | None = None
    mode: str = ""
    number: str = ""
    origin: str = ""
    destination: str = ""

    @property
    def minutes(self) -> int | None:
        return None if self.start is None or self.end is None else self.end - self.start


@dataclass(frozen=True)
class Day:
    city: str
    hotel: str  # empty where the day has none
    hotel_price: float | None
    activities: tuple[Activity, ...]

    def all(self, *kinds: Kind) -> list[Activity]:
        return [activity for activity in self.activities if activity.kind in kinds]


@dataclass(frozen=True)
class Plan:
    days: tuple[Day, ...]
    total: float | None  # as the plan itself states it

    def all(self, *kinds: Kind) -> list[Activity]:
        return [activity for day in self.days for activity in day.all(*kinds)]


def plan_text(turn: str) -> str | None:
    """The plan in a model's final turn: what stands in its `<plan>` tags behind its thinking; None without any."""
    blocks = [block.strip() for block in BLOCK.findall(spoken(turn))]
    return "\n\n".join(block for block in blocks if block) or None


# --- JSON -> plan -----------------------------------------------------------------------------------------------------
def read_plan(value: Any) -> Plan:
    """The plan in the benchmark's JSON. Raises InputError that names the first part of another shape."""
    expected = "the JSON of a plan"
    if isinstance(value, Mapping):
        value = _with_origins(value)
    plan: JsonPlan = check(value, JsonPlan, "the plan", expected)
    return Plan(
        tuple(_read_day(day) for day in plan["daily_plans"]),
        (plan.get("budget_summary") or {}).get("total_estimated_budget"),
    )


def _with_origins(value: Any) -> Any:
    """`from` is a keyword of Python, so that a TypedDict cannot name it; the plan's `from` becomes `origin`."""
    if isinstance(value, list):
        return [_with_origins(item) for item in value]
    if isinstance(value, Mapping):
        return {"origin" if name == "from" else name: _with_origins(item) for name, item in value.items()}
    return value


def _read_day(day: JsonDay) -> Day:
    hotel = day.get("accommodation") or {}
    name = (hotel.get("name") or "").strip()
    return Day(
        day.get("current_city") or "",
        "" if name == "-" else name,
        hotel.get("price_per_night"),
        tuple(_read_activity(activity) for activity in day["activities"]),
    )


def _read_activity(activity: JsonActivity) -> Activity:
    details = activity["details"]
    start, _, end = (activity.get("time_slot") or "").partition("-")
    first, last = clock(start), clock(end)
    if first is not None and last is not None and last < first:
        last += 24 * 60
    texts = {name: details.get(name) or "" for name in ("name", "mode", "number", "origin")}
    return Activity(
        activity["type"],
        first,
        last,
        **texts,
        cost=details.get("cost"),
        destination=details.get("to") or "",
    )


def clock(text: str) -> int | None:
    """Minutes of the day of a text HH:MM. 24:00 is read as 23:59. None for any other text."""
    match = re.fullmatch(r"\s*(\d{1,2}):(\d{2})(?::\d{2})?\s*", text, re.A)
    if not match:
        return None
    minutes = int(match[1]) * 60 + int(match[2])
    if minutes == 24 * 60:
        return minutes - 1
    return minutes if minutes < 24 * 60 and int(match[2]) < 60 else None


# --- text -> JSON -----------------------------------------------------------------------------------------------------
@dataclass
class Reading:
    """What was read of a plan's text so far."""

    days: list[dict[str, Any]] = field(default_factory=list)
    budget: dict[str, Any] = field(default_factory=dict)
    in_budget: bool = False
    unread: list[str] = field(default_factory=list)


def parse_plan(text: str, names: Collection[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """The benchmark's JSON of a plan's text, and the lines that could not be read.

    Args:
        names: of known places, with which `FROM - TO` is split where a name holds " - " itself.
    """
    reading = Reading()
    for line in text.splitlines():
        line = line.replace("**", "").strip().lstrip("#•").strip()
        line = re.sub(r"^[-*]\s+", "", line)
        if DECORATION.fullmatch(line):
            continue
        if len(line) > LONGEST or not _take(line, reading, names):
            reading.unread.append(line)
    plan: dict[str, Any] = {"daily_plans": reading.days}
    if reading.budget:
        plan["budget_summary"] = reading.budget | {"currency": "RMB"}
    return plan, reading.unread


def _take(line: str, reading: Reading, names: Collection[str]) -> bool:
    """Reads one line; False where it cannot be read."""
    if match := DAY.match(line):
        reading.days.append({"day_number": int(match[1]), "current_city": "", "activities": []})
        reading.in_budget = False
        return True
    if SUMMARY.match(line):
        reading.in_budget = True
        return True
    if reading.in_budget or not reading.days:
        return _take_budget(line, reading)
    day = reading.days[-1]
    if match := CITY.match(line):
        day["current_city"] = match[1].strip()
        return True
    if match := HOTEL.match(line):
        name, price = _cost(match[1].strip())
        if name not in ("", "-"):
            day["accommodation"] = {"name": name, "price_per_night": price}
        return True
    match = SLOT.match(line)
    details = _details(match[3].strip(), match[4].strip(), names) if match else None
    if details is not None:
        slot = f"{match[1]}-{match[2]}"
        day["activities"].append({"time_slot": slot, "type": match[3].strip(), "details": details})
    return details is not None


def _take_budget(line: str, reading: Reading) -> bool:
    if CURRENCY.match(line):
        return True
    for name, pattern in BUDGET.items():
        match = pattern.match(line)
        number = NUMBER.search(match[1]) if match else None
        if number:
            reading.budget[name] = _number(number[0])
            return True
    return False


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _cost(text: str) -> tuple[str, float | None]:
    """A text without the price at its end, and the price."""
    match = COST.search(text)
    return (text[: match.start()].strip(), _number(match[1] or match[2])) if match else (text, None)


def _details(kind: str, text: str, names: Collection[str]) -> dict[str, Any] | None:
    """What the last field of a line says, by the line's kind; None where it cannot be read."""
    if kind == "travel_intercity_public":
        rest, cost = _cost(text)
        match = INTERCITY.fullmatch(rest)
        places = _places(match[3], names) if match else None
        return places and {"mode": match[1].lower(), "number": match[2], **places, "cost": cost}
    if kind == "travel_city":
        rest, cost = _cost(text)
        found: dict[str, str | None] = {"distance": None, "duration": None}
        for name, pattern in (("duration", TIME), ("distance", DISTANCE)):
            if match := pattern.search(rest):
                found[name], rest = match[1], rest[: match.start()].strip()
        places = _places(rest, names)
        return places and places | found | {"cost": cost}
    if kind == "attraction":
        name, cost = _cost(text)
        return {"name": name, "cost": cost} if name else None
    if kind == "meal":
        match = FIRST.fullmatch(text)
        name, cost = _cost(match[2]) if match else ("", None)
        return {"meal_type": match[1].strip(), "name": name, "cost": cost} if match and name else None
    if kind == "hotel":
        match = FIRST.fullmatch(text)
        return {"activity": match[1].strip(), "name": match[2].strip()} if match else None
    return {"description": text} if kind == "buffer" else None


def _places(text: str, names: Collection[str]) -> dict[str, str] | None:
    """FROM and TO of `FROM - TO`: at the dash with a known name on both sides, else at the last one."""
    pairs = [(text[: m.start()].strip(), text[m.end() :].strip()) for m in re.finditer(" [-–—] ", text)]
    known = [pair for pair in pairs if pair[0] in names and pair[1] in names]
    pairs = [pair for pair in known or pairs[-1:] if all(pair)]
    return {"from": pairs[0][0], "to": pairs[0][1]} if pairs else None
