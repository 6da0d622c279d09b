"""The travel environment: tools, plans, checks, wishes, prepared files. All on invented trips, in seconds.

Each check and each kind of wish is broken alone, and the scorer must see that one and no other.
"""

import json
import os
import re
import stat
import threading
import zipfile
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from data.deepplanning import database as database_module
from data.deepplanning import scores, synthetic, tasks, tools
from data.deepplanning.calls import parse_calls
from data.deepplanning.checks import CHECKS, DIMENSIONS, Case, total_cost
from data.deepplanning.constraints import ALL_KINDS, FLIGHT_MODES, holds, wishes
from data.deepplanning.convert import convert
from data.deepplanning.database import FILES, Database, read_database, read_table
from data.deepplanning.oracle import write_plan
from data.deepplanning.plan import parse_plan, plan_text, read_plan
from data.deepplanning.scores import Verdict, judge, of_parts
from data.deepplanning.travel import Travel
from data.prepare import command, prepare
from opd.benchmarks import read_benchmarks
from opd.config import load_config
from opd.data import read_problems
from opd.errors import InputError, RunError
from opd.rollout.environment import checked_messages, checked_score, load

DATA = os.environ.get("OPD_TEST_DATA")
real = pytest.mark.skipif(not DATA, reason="OPD_TEST_DATA names no folder with problem files")
KINDS = ("train_cheapest_direct", "hotel_price_range", "restaurant_must_eat_named", "attraction_must_visit_named")
SCHEMAS = json.loads(synthetic.TOOLS.read_text())


@cache
def made(kinds=KINDS, days=4):
    """A trip and the text of a plan in which everything holds."""
    trip = synthetic.make_trip(1, 7, kinds, days)
    return trip, write_plan(trip.task["meta_info"], trip.database)


def judged(text, trip, **facts):
    """What fails of a plan's text, by name."""
    plan, unread = parse_plan(text, trip.database.names)
    assert not unread, unread
    meta = trip.task["meta_info"] | facts
    verdict = judge(Case(read_plan(plan), meta, trip.database), wishes(meta, quirks=True))
    return {name for name, held in (verdict.checks | verdict.wishes).items() if not held}


def ask(trip, name, quirks=True, **arguments):
    return tools.answer(trip.database, SCHEMAS, name, arguments, quirks)


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of invented trips, an environment, and the problems' rows."""
    folder = synthetic.write_trips(tmp_path_factory.mktemp("prepared"), trips=5)
    lines = [line for name in ("train", "test") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return folder, Travel(str(folder)), [json.loads(line) for line in lines]


# --- the checks -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(8))
def test_the_oracle_satisfies_everything(number):
    trip = synthetic.make_trip(number, 3, days=3 + number % 3)
    assert judged(write_plan(trip.task["meta_info"], trip.database), trip) == set()
    assert len(trip.task["meta_info"]["hard_constraints"]) in (4, 5)


def test_there_are_21_checks_in_8_dimensions_and_38_kinds():
    assert (len(CHECKS), len(DIMENSIONS), len(set(ALL_KINDS))) == (21, 8, 38)


def failing(case):
    verdict = judge(case, wishes(case.trip, quirks=True))
    return {name for name, held in (verdict.checks | verdict.wishes).items() if not held}


@cache
def right():
    """A case of four days in which everything holds."""
    trip, text = made()
    case = Case(read_plan(parse_plan(text, trip.database.names)[0]), trip.task["meta_info"], trip.database)
    assert failing(case) == set()
    return case


def with_day(case, number, **changes):
    days = list(case.plan.days)
    days[number] = replace(days[number], **changes)
    return replace(case, plan=replace(case.plan, days=tuple(days)))


def edit(case, kind, number=0, day=1, **changes):
    """Changes one line of a day, or drops it where no changes are given."""
    lines = list(case.plan.days[day].activities)
    at = [i for i, line in enumerate(lines) if line.kind == kind][number]
    lines[at : at + 1] = [replace(lines[at], **changes)] if changes else []
    return with_day(case, day, activities=tuple(lines))


def line(case, kind, number=0, day=1):
    return case.plan.days[day].all(kind)[number]


def tables(case, table, **cells):
    """Changes cells in all rows of a table."""
    rows = [row | cells for row in case.database.rows(table)]
    return replace(case, database=Database({**case.database.tables, table: rows}))


def roadless(case):
    """Without roads, the times between places are not judged."""
    return replace(case, database=Database({**case.database.tables, "roads": []}))


def settled(case):
    """With the total that the plan costs."""
    return replace(case, plan=replace(case.plan, total=total_cost(case)))


def elsewhere(case):
    case = with_day(case, 3, city=f"from {case.trip['dest'][0]} to 北京")
    return edit(case, "travel_intercity_public", day=3, destination="北京西站")


def longer_roads(case):
    rows = [row | {"duration_minutes": str(int(row["duration_minutes"]) + 60)} for row in case.database.rows("roads")]
    return replace(case, database=Database({**case.database.tables, "roads": rows}))


def late_to_bed(case):
    rest = line(case, "hotel")
    extra = replace(rest, kind="buffer", start=rest.end, end=rest.end, name="")
    return with_day(case, 1, activities=(*case.plan.days[1].activities, extra))


def same_sight_again(case):
    case = tables(roadless(case), "attractions", opening_time="Open 24 Hours", closing_time="Open 24 Hours")
    case = tables(case, "attractions", min_visit_hours="0.5", closing_dates="")
    visit = line(case, "attraction", day=2)
    return edit(case, "attraction", 1, name=visit.name, cost=visit.cost)


def same_meal_again(case):
    meal = line(case, "meal", day=2)
    return settled(edit(roadless(case), "meal", 1, name=meal.name, cost=meal.cost))


def next_price(case, kind, day=1):
    return edit(case, kind, day=day, cost=line(case, kind, day=day).cost + 1)


BREAKS = {
    "valid_trip_duration": lambda case: replace(case, trip=case.trip | {"days": 5}),
    "closed_loop_route_structure": elsewhere,
    "seamless_intercity_transfers": lambda case: with_day(case, 1, city="Elsewhere"),
    "validated_accommodation": lambda case: with_day(case, 1, hotel_price=case.plan.days[1].hotel_price + 1),
    "validated_attractions": lambda case: next_price(case, "attraction"),
    "validated_meals": lambda case: next_price(case, "meal"),
    "validated_transportation": lambda case: next_price(case, "travel_intercity_public", day=0),
    "traceable_accommodation": lambda case: with_day(
        case, 3, hotel=case.plan.days[0].hotel, hotel_price=case.plan.days[0].hotel_price
    ),
    "ends_with_accommodation": late_to_bed,
    "essential_meal_coverage": lambda case: settled(edit(roadless(case), "meal", 1)),
    "essential_attraction_coverage": lambda case: settled(edit(roadless(case), "attraction", 1)),
    "no_time_overlaps": lambda case: edit(case, "travel_city", end=line(case, "travel_city").end + 1),
    "reasonable_transfer_time": longer_roads,
    "attraction_visit_within_opening_hours": lambda case: tables(
        case, "attractions", opening_time="22:00", closing_time="23:00"
    ),
    "dining_within_service_hours": lambda case: tables(case, "restaurants", opening_time="01:00", closing_time="02:00"),
    "avoidance_of_closure_days": lambda case: tables(
        case, "attractions", closing_dates="Monday,Tuesday,Wednesday,Thursday,Friday,周六,周日"
    ),
    "reasonable_duration_at_attractions": lambda case: tables(
        case, "attractions", min_visit_hours="9", max_visit_hours="10"
    ),
    "reasonable_meal_duration": lambda case: edit(roadless(case), "meal", end=line(case, "meal").start + 29),
    "cost_calculation_correctness": lambda case: replace(case, plan=replace(case.plan, total=case.plan.total * 1.2)),
    "diverse_meal_options": same_meal_again,
    "diverse_attraction_options": same_sight_again,
}


def test_every_check_has_a_break():
    assert list(BREAKS) == list(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_is_broken_alone(check):
    case = BREAKS[check](right())
    assert failing(case) == {check}
    verdict = judge(case, wishes(case.trip, quirks=True))
    assert verdict.commonsense == 7 / 8 and verdict.personalized == 1 and verdict.case_accuracy == 0
    assert verdict.composite == 15 / 16 and verdict.share == 1


def meals_at(case, *starts):
    """Day 1 with two meals that begin at these times."""
    for number, start in enumerate(starts):
        case = edit(roadless(case), "meal", number, start=start, end=start + 60)
    return case


def test_meals_are_two_hours_apart():
    only = replace(right().plan, days=right().plan.days[:2])
    case = replace(right(), plan=only)
    assert "essential_meal_coverage" not in failing(meals_at(case, 12 * 60, 14 * 60))
    assert "essential_meal_coverage" in failing(meals_at(case, 12 * 60, 13 * 60 + 59))


@pytest.mark.parametrize(
    "day,hour,meals,fed",
    [
        (0, 9, 1, False),
        (0, 9, 2, True),
        (0, 14, 0, False),
        (0, 14, 1, True),
        (0, 15, 2, False),
        (0, 15, 0, True),
        (3, 8, 1, False),
        (3, 8, 0, True),
        (3, 14, 2, False),
        (3, 14, 1, True),
        (3, 15, 0, False),
        (3, 15, 1, True),
    ],
)
def test_meals_on_a_day_of_travel(day, hour, meals, fed):
    case = right()
    lunch = line(case, "meal", day=0)
    eaten = [replace(lunch, start=start, end=start + 60) for start in (11 * 60, 14 * 60)][:meals]
    journey = replace(line(case, "travel_intercity_public", day=day), start=hour * 60, end=hour * 60)
    case = with_day(case, day, activities=(journey, *eaten))
    assert ("essential_meal_coverage" not in failing(case)) == fed


def test_one_long_visit_with_the_way_to_it_makes_a_day():
    case = edit(roadless(right()), "attraction", 1)
    visit = line(case, "attraction")
    longer = edit(case, "attraction", start=visit.start, end=visit.start + 240)
    assert "essential_attraction_coverage" in failing(case)
    assert "essential_attraction_coverage" not in failing(longer)
    rides = tuple(stop for stop in longer.plan.days[1].activities if stop.kind != "travel_city")
    assert "essential_attraction_coverage" in failing(with_day(longer, 1, activities=rides))


@pytest.mark.parametrize("gap,right_time", [(19, False), (20, True), (30, True), (31, False)])
def test_a_transfer_may_take_a_little_more_or_less(gap, right_time):
    """Of 25 minutes by road: from 20, which is both 25 - 5 and 25 rounded down, to 30."""
    case = right()
    rows = [row | {"duration_minutes": "25"} for row in case.database.rows("roads")]
    case = replace(case, database=Database({**case.database.tables, "roads": rows}))
    visit, meal = line(case, "attraction"), line(case, "meal")
    meal = replace(meal, start=visit.end + gap + 10, end=visit.end + gap + 60)
    wait = replace(meal, kind="buffer", start=visit.end + 3, end=visit.end + 13)
    days = (replace(case.plan.days[1], activities=(visit, wait, meal)),)
    case = replace(case, plan=replace(case.plan, days=days))
    assert ("reasonable_transfer_time" not in failing(case)) == right_time


def test_hours_over_midnight_and_around_the_clock():
    case = replace(right(), plan=replace(right().plan, days=right().plan.days[:2]))
    case = edit(edit(case, "attraction", 1), "attraction", day=0)
    late = edit(case, "attraction", start=22 * 60, end=25 * 60)
    hours = {"attraction_visit_within_opening_hours"}
    assert not hours & failing(tables(late, "attractions", opening_time="10:00", closing_time="02:00"))
    assert not hours & failing(tables(late, "attractions", opening_time="全天开放", closing_time="全天开放"))
    for opening, closing in (("10:00", "00:30"), ("10:00", "24:00"), ("nonsense", "02:00"), ("", "")):
        assert hours <= failing(tables(late, "attractions", opening_time=opening, closing_time=closing))
    early = edit(late, "attraction", start=30, end=90)
    assert not hours & failing(tables(early, "attractions", opening_time="10:00", closing_time="02:00"))


def test_costs_count_people_vehicles_and_rooms():
    case = replace(right(), trip=right().trip | {"people_number": 5, "room_number": 2})
    plan = case.plan
    lines = [day.all("travel_intercity_public")[0].cost for day in (plan.days[0], plan.days[3])]
    persons = [stop.cost for stop in plan.all("meal", "attraction")]
    rides, nights = [ride.cost for ride in plan.all("travel_city")], [day.hotel_price for day in plan.days[:3]]
    assert total_cost(case) == 5 * (sum(lines) + sum(persons)) + 2 * sum(rides) + 2 * sum(nights)


def test_without_a_plan_nothing_holds():
    case = replace(right(), plan=replace(right().plan, days=()))
    wished = wishes(case.trip, quirks=True)
    for verdict in (judge(None, wished), judge(case, wished)):
        assert not any(verdict.checks.values()) and not any(verdict.wishes.values())
        assert verdict.commonsense == verdict.share == verdict.composite == 0


# --- the wishes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_each_kind_of_wish_is_broken_alone(kind):
    other = "hotel_price_range" if kind.startswith(("train_", "flight_")) else "train_seat_class"
    trip, text = made((kind, other))
    assert judged(text, trip) == set()
    assert judged(write_plan(trip.task["meta_info"], trip.database, miss=kind), trip) == {kind}


def test_the_answers_of_invented_trips_by_hand():
    """The gold entities of three kinds, found in the tables in another way than the generator's."""
    trip, _ = made(("train_cheapest_direct", "hotel_highest_rated", "restaurant_closest_to_attraction"))
    facts, wished = trip.task["meta_info"], trip.task["meta_info"]["hard_constraints"]
    offers = json.loads(
        ask(trip, "query_train_info", origin=facts["org"], destination=facts["dest"][0], depDate=facts["depart_date"])
    )
    direct = sorted(
        (offer["price"], offer["Segment 1"]["marketingTransportNo"]) for (offer,) in offers if len(offer) == 2
    )
    assert direct[0][1] == wished["train_cheapest_direct"]["outbound_train_no"]
    assert min(offer["price"] for (offer,) in offers) == 50 < direct[0][0]  # the one with a change is cheaper
    hotels = json.loads(ask(trip, "query_hotel_info", destination="", checkinDate="", checkoutDate=""))
    best = sorted(hotels, key=lambda hotel: float(hotel["score"]))[-1]
    assert best["name"] == wished["hotel_highest_rated"]["hotel_name"]
    wish = wished["restaurant_closest_to_attraction"]
    name = re.search("near '(.+)'", wish["constraint_context"])[1]
    place = json.loads(ask(trip, "search_location", place_name=name))
    near = json.loads(ask(trip, "recommend_restaurants", latitude=place["latitude"], longitude=place["longitude"]))
    ways = {}
    for row in near:
        ends = (f"{place['latitude']},{place['longitude']}", f"{row['latitude']},{row['longitude']}")
        way = json.loads(ask(trip, "query_road_route_info", origin=ends[0], destination=ends[1]))
        ways[row["name"]] = way["distance_in_meters"]
    assert min(ways, key=ways.get) == wish["restaurant_name"]


def test_wishes_of_other_shapes():
    case = right()
    assert holds("train_seat_status", {}, case) and holds("flight_seat_class", {}, case)  # no number: nothing to miss
    assert not holds("hotel_highest_rated", {}, case) and not holds("attraction_all_of_type", {}, case)
    assert not holds("attraction_all_of_type", {"attraction_names": 3}, case)
    assert not holds("attraction_all_of_type", {"attraction_names": []}, case)
    assert not holds("budget_constraint", {"max_budget": "much"}, case)
    number = line(case, "travel_intercity_public", day=0).number
    assert not holds("flight_seat_class", {"outbound_flight_no": number}, case)  # it is a train
    for mode in FLIGHT_MODES:
        flown = edit(case, "travel_intercity_public", day=0, mode=mode.upper())
        assert holds("flight_seat_class", {"outbound_flight_no": number}, flown)
        assert not holds("train_seat_class", {"outbound_train_no": number}, flown)
    facts = {"hard_constraints": {"weather_sunny": {}, "hotel_new": {}}, "budget_constraint": {"max_budget": 1}}
    assert list(wishes(facts, quirks=True)) == ["hotel_new"]
    assert list(wishes(facts, quirks=False)) == ["hotel_new", "budget_constraint"]


# --- the scores -------------------------------------------------------------------------------------------------------
def test_scores_of_the_benchmark_and_of_the_paper_by_hand():
    checks, nothing = dict.fromkeys(CHECKS, True), dict.fromkeys(CHECKS, False)
    all_four = Verdict(checks, dict.fromkeys("abcd", True), True)
    three = Verdict(checks | {"diverse_meal_options": False}, dict.fromkeys("abc", True) | {"d": False}, True, False)
    none = Verdict(nothing, dict.fromkeys("abcd", False), False)
    text = scores.table("trips", [[all_four, three], [three, none]])
    numbers = dict(re.findall(r"\| ([^|]+?) \| ([\d.]+) \|", text))
    assert text.startswith("| trips, 2 tasks |")
    assert numbers == {
        "benchmark: commonsense": "68.8",  # 1, 7/8, 7/8, 0
        "benchmark: personalized (all wishes of a task)": "25.0",
        "benchmark: composite": "46.9",
        "benchmark: case accuracy": "25.0",
        "benchmark: delivery rate": "75.0",
        "plans with a line that could not be read": "50.0",
        "paper: Avg@2 (share of a task's wishes)": "62.5",  # 1, 3/4, 3/4, 0
        "paper: Best@2": "87.5",
    }
    assert of_parts(three.parts, True) == three


def test_scores_of_an_evaluation(prepared, tmp_path, capsys):
    folder, travel, rows = prepared
    lines = []
    for row in rows[:2]:
        text = write_plan(row["meta"]["trip"], read_database(tasks.task_folder(folder, row["meta"]["task"])))
        for sample, turn in ((-1, f"<plan>{text}</plan>"), (0, f"<plan>{text}</plan>"), (1, "none")):
            score = travel.score(row, [turn])
            lines.append({"id": row["id"], "sample": sample, "extracted": score.extracted, "parts": dict(score.parts)})
    lines.append({"id": rows[0]["id"], "sample": 2, "extracted": None, "parts": {}})  # the environment failed
    path = tmp_path / "evaluation.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    scores.command([str(path)])
    greedy, sampled = capsys.readouterr().out.split("\n\n")
    assert (
        greedy.startswith("| synthetic_trips-en, greedy, 2 tasks |")
        and "| benchmark: case accuracy | 100.0 |" in greedy
    )
    assert "| paper: Avg@3 (share of a task's wishes) | 41.7 |" in sampled and "| paper: Best@3 | 100.0 |" in sampled
    assert "| benchmark: delivery rate | 40.0 |" in sampled
    for content, message in (("{}", "line 1: id is missing"), ("", "no responses in it")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            scores.command([str(path)])


# --- the plan ---------------------------------------------------------------------------------------------------------
def test_the_example_of_the_prompt_is_read_whole():
    text = plan_text(tasks.PROMPT.read_text().partition("# An example")[2])
    plan, unread = parse_plan(text)
    assert unread == []
    facts = {"people_number": 2, "room_number": 1, "days": 3}
    assert total_cost(Case(read_plan(plan), facts, Database({}))) == plan["budget_summary"]["total_estimated_budget"]
    assert [day["current_city"] for day in plan["daily_plans"]] == [
        "from Xanten to Yverdon",
        "Yverdon",
        "from Yverdon to Xanten",
    ]


ORIGINAL = """
**Budget Summary**:
   **Transportation: 1,234.5 RMB** (trains)
   **Accommodation: 882 RMB**
   **Meals: 300 RMB**
   **Attractions & Tickets: 0 RMB**
   **Other: 0 RMB**
   **Total Estimated Budget: 2,416.5 RMB**
   **Currency: RMB**

**Day 1:**
Current City: from Hefei (Anhui) to Nanjing
Accommodation: Orange Hotel, Nanjing - East, ¥1,441.00/room/night
07:00-08:00 | travel_intercity_public | Train G7798, Hefei South - Nanjing South, ¥60/person
- 08:00–08:20 | travel_city | Nanjing South - Laomendong - East Gate, 30km, 60min, ¥12
08:20-09:20 | attraction | Laomendong, Old Town, ¥0/person
09:20-10:20 | meal | Lunch, Tea, Rice & More · Established 1994, ¥294/person
10:20-23:30 | buffer | Rest, then sleep
23:30-24:00 | hotel | Check-in, Orange Hotel, Nanjing - East
----
Day 2: the way home
Current City: from Nanjing to Hefei
Accommodation: -
This line says nothing.
25:00-26:00 | attraction
"""


def test_a_plan_in_the_form_of_the_original_is_read():
    plan, unread = parse_plan(ORIGINAL, {"Nanjing South", "Laomendong - East Gate"})
    assert unread == ["This line says nothing.", "25:00-26:00 | attraction"]
    assert plan["budget_summary"] == {
        "transportation": 1234.5,
        "accommodation": 882,
        "meals": 300,
        "attractions_and_tickets": 0,
        "other": 0,
        "total_estimated_budget": 2416.5,
        "currency": "RMB",
    }
    first, second = plan["daily_plans"]
    assert first["accommodation"] == {"name": "Orange Hotel, Nanjing - East", "price_per_night": 1441}
    assert "accommodation" not in second and second["activities"] == []
    train, ride, visit, meal, wait, hotel = (stop["details"] for stop in first["activities"])
    assert train == {"mode": "train", "number": "G7798", "from": "Hefei South", "to": "Nanjing South", "cost": 60}
    assert ride["from"] == "Nanjing South" and ride["to"] == "Laomendong - East Gate"
    assert (ride["distance"], ride["duration"], ride["cost"]) == ("30", "60", 12)
    assert visit == {"name": "Laomendong, Old Town", "cost": 0}
    assert meal == {"meal_type": "Lunch", "name": "Tea, Rice & More · Established 1994", "cost": 294}
    assert wait == {"description": "Rest, then sleep"}
    assert hotel == {"activity": "Check-in", "name": "Orange Hotel, Nanjing - East"}
    read = read_plan(plan)
    assert read.days[0].activities[-1].end == 23 * 60 + 59 and read.total == 2416.5
    # without known names, the last dash splits
    unknown = parse_plan(ORIGINAL)[0]["daily_plans"][0]["activities"][1]["details"]
    assert (unknown["from"], unknown["to"]) == ("Nanjing South - Laomendong", "East Gate")


def test_a_plan_stands_in_its_tags_behind_the_thinking():
    assert plan_text("<think><plan>no</plan></think><plan> a </plan> x <PLAN>\nb</PLAN><plan> </plan>") == "a\n\nb"
    assert plan_text("<think><plan>a</plan>") is None and plan_text("Day 1: ...") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("daily_plans"),
        lambda plan: plan["daily_plans"].append("day"),
        lambda plan: plan["daily_plans"][0]["activities"][0].update(type="sleep"),
        lambda plan: plan["daily_plans"][0]["activities"][0]["details"].update(cost="60"),
        lambda plan: plan["budget_summary"].update(total_estimated_budget="much"),
    ],
)
def test_json_of_another_shape_is_refused(change):
    plan = parse_plan(ORIGINAL)[0]
    read_plan(plan)
    change(plan)
    with pytest.raises(InputError, match="the plan"):
        read_plan(plan)


@pytest.mark.parametrize(
    "junk", ["|" * 900, "a, " * 300, "¥" * 900, "08:00-09:00 | meal | " + "1," * 400, "x" * 5000, " - " * 300]
)
def test_long_lines_are_read_in_no_time(junk):
    lines = "\n".join([junk] * 50)
    parse_plan(f"Day 1:\n{lines}\n" + "\n".join(f"08:00-09:00 | travel_city | {junk}" for _ in range(50)))


# --- the calls --------------------------------------------------------------------------------------------------------
def test_calls_are_read_behind_the_thinking():
    turn = f"<think>{call('a')}</think>\nI ask.{call('b', x='1')} and {call('c', x='</tool')}"
    assert [(c.name, c.arguments) for c in parse_calls(turn)] == [("b", {"x": "1"}), ("c", {"x": "</tool"})]
    assert parse_calls("<think>" + call("a")) == [] and parse_calls("no call") == []
    (cut,) = parse_calls('<tool_call>{"name": "a", "arguments": {}}')  # a turn that was cut behind the call
    assert (cut.name, cut.fault) == ("a", None)
    (text,) = parse_calls('<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>')
    assert text.arguments == {"x": 1}
    (other,) = parse_calls('<tool_call>{"name": "a", "arguments": "not JSON"}</tool_call>')
    assert other.arguments == {}


@pytest.mark.parametrize(
    "block",
    [
        "",
        "{",
        "null",
        "[]",
        '"query_train_info"',
        "{}",
        '{"name": 3}',
        '{"name": "a", "name": "b"}',
        "[" * 100_000,
        '{"name": "a", "arguments": ' + "9" * 5000 + "}",
        '{"name": "\\ud800"}',
        "__import__('os').system('true')",
        "<tool_call>",
    ],
)
def test_a_malformed_call_is_a_message(prepared, block):
    _, travel, rows = prepared
    (message,) = travel.reply(rows[0], [f"<tool_call>{block}</tool_call>"])
    assert message["role"] == "tool" and json.loads(message["content"])["error"]
    message["content"].encode()


HOSTILE = (
    "../../../../etc/passwd",
    "/etc/passwd",
    "__class__",
    "'; DROP TABLE hotels; --",
    "$(touch hacked)",
    "__import__('os').system('touch hacked')",
    "{0.__class__}",
    "%s%n",
    "\x00",
    "a" * 100_000,
    "",
)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value[:20]))
def test_hostile_arguments_are_only_looked_up(prepared, value, monkeypatch, tmp_path):
    """No file is opened and nothing runs, whatever the name of the tool and its arguments are."""
    _, travel, rows = prepared
    travel.reply(rows[0], [call("search_location", place_name="")])  # reads the database
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("a tool touched the machine")

    for owner, name in ((Path, "open"), (os, "system"), (os, "open"), (os, "popen"), (os, "stat")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("builtins.eval", refuse)
    monkeypatch.setattr("builtins.exec", refuse)
    names = [schema["function"]["name"] for schema in travel.tools]
    required = {s["function"]["name"]: s["function"]["parameters"]["properties"] for s in travel.tools}
    turn = "".join(call(name, **dict.fromkeys(required[name], value)) for name in names) + call(value, x=value)
    messages = travel.reply(rows[0], [turn])
    monkeypatch.undo()
    assert len(messages) == 10 and json.loads(messages[-1]["content"]) == {"error": f"tool '{value}' not found"}
    assert all(message["content"] for message in messages) and not list(tmp_path.iterdir())


def test_wrong_arguments_are_messages():
    trip, _ = made()
    assert json.loads(ask(trip, "query_train_info", destination="x")) == {"error": "'origin' is a required property"}
    assert json.loads(ask(trip, "search_location", place_name=3)) == {"error": "3 is not of type 'string'"}
    assert json.loads(ask(trip, "recommend_attractions", city="", attraction_type=None)) == {
        "error": "None is not of type 'string'"
    }
    wrong = tools.answer(trip.database, SCHEMAS, "search_location", ["a"], True)
    assert json.loads(wrong) == {"error": "['a'] is not of type 'object'"}
    unreadable = tables(right(), "trains", duration="long").database
    facts = right().trip
    route = {"origin": facts["org"], "destination": facts["dest"][0], "depDate": facts["depart_date"]}
    assert "long" in json.loads(tools.answer(unreadable, SCHEMAS, "query_train_info", route, True))["error"]
    assert "Segment 1" in ask(trip, "query_train_info", **route, further="is ignored")


# --- the tools, to the letter -----------------------------------------------------------------------------------------
SMALL = {
    "trains": """origin_city,destination_city,dep_date,seat_class,route_index,segment_index,seat_status,\
arr_station_code,arr_station_name,dep_station_code,dep_station_name,duration,arr_datetime,dep_datetime,train_type,train_no,price
A,B,2026-01-01,Second,2,10,5,CC,Middle West Station,DD,East Station,60,t4,t3,Fast,G2,9
A,B,2026-01-01,Second,2,2,,BB,North Station,CC,Middle Station,50,t2,t1,Slow,G1,x
A,B,2026-01-01,First,10,1,9,BB,North Station,DD,East Station,40,t6,t5,Fast,G3,44.5
""",
    "flights": """origin_city,destination_city,dep_date,seat_class,route_index,segment_index,seat_status,\
arr_station_code,arr_station_name,dep_station_code,dep_station_name,duration,arr_datetime,dep_datetime,airline,flight_no,equip_size,\
equip_type,manufacturer,price
A,B,2026-01-01,Economy,1,1,9,BBB,B Airport,AAA,A Airport,90,t2,t1,Air,FL1,Big,320,Airbus,500
""",
    "hotels": """name,address,latitude,longitude,decoration_time,hotel_star,price,score,brand,services,tags,stock
Inn,Road 1,1.000000,2.000000,2020,3,300,4.5,,Pool;Bar,x|y,1
Motel,Road 2,1.100000,2.100000,2021,2,200,4.0,Ji,,,
""",
    "attractions": """attraction_id,attraction_name,city,address,latitude,longitude,description,rating,opening_time,\
closing_time,closing_dates,min_visit_hours,max_visit_hours,ticket_price,attraction_type
7,Hill,B,Road 3,1.200000,2.200000,High,4.7,Open 24 Hours,Open 24 Hours,None,2,4,60,Nature
8,Lake,B,Road 4,1.300000,2.300000,Wet,,08:00,18:00,"Monday, Friday",1,3,,City
""",
    "locations": "place_name,latitude,longitude,poi_type\nHill,1.200000,2.200000,x\nHill,9.0,9.0,x\n",
    "roads": """origin,destination,distance_meters,duration_minutes,cost
"1.200000,2.200000","1.300000,2.300000",5000,12,15
""",
    "restaurants": """restaurant_id,restaurant_name,latitude,longitude,price_per_person,cuisine,opening_time,\
closing_time,nearby_attraction_name,rating,tags,query_latitude,query_longitude
1,Cook,1.400000,2.400000,80,Food,10:00,22:00,Hill,4.2,Bar;Sofa,1.200000,2.200000
1,Cook,1.400000,2.400000,90,Food,10:00,22:00,Lake,4.2,,1.300000,2.300000
""",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    for table, text in SMALL.items():
        path = folder / FILES[table]
        path.parent.mkdir()
        path.write_text(text.replace("\\\n", ""), encoding="utf-8-sig")
    return read_database(folder)


ROUTE = {"origin": "A", "destination": "B", "depDate": "2026-01-01"}
STAY = {"destination": "B", "checkinDate": "2026-01-01", "checkoutDate": "2026-01-02"}
HILL = {"latitude": "1.200000", "longitude": "2.200000"}


@pytest.mark.parametrize(
    "name,arguments,expected",
    [
        (
            "query_attraction_details",
            {"attraction_name": "Hill"},
            "Attraction ID：7\nAttraction Name：Hill\nCity：B\nAddress：Road 3\n"
            "Coordinates：Latitude 1.200000，Longitude 2.200000\nDescription：High\n"
            "Rating：4.7(average visitor rating)\n"
            "Opening Hours：Open 24 Hours\nClosed Dates：nan\nMinimum Visit Duration：2.0 hours\n"
            "Maximum Visit Duration：4.0 hours\nTicket Price：60.0 RMB\nAttraction Type：Nature",
        ),
        (
            "query_attraction_details",
            {"attraction_name": "Lake"},
            "Attraction ID：8\nAttraction Name：Lake\nCity：B\nAddress：Road 4\n"
            "Coordinates：Latitude 1.300000，Longitude 2.300000\nDescription：Wet\nRating：(average visitor rating)\n"
            "Opening Hours：08:00 to 18:00\nClosed Dates：Monday, Friday\nMinimum Visit Duration：1.0 hours\n"
            "Maximum Visit Duration：3.0 hours\nTicket Price：0 RMB\nAttraction Type：City",
        ),
        (
            "query_attraction_details",
            {"attraction_name": "hill"},
            "Detailed information not found for attraction hill",
        ),
        (
            "recommend_attractions",
            {"city": "anywhere"},
            "Recommended attractions:\n\nHill, High. This is a Nature type attraction\n"
            "Lake, Wet. This is a City type attraction",
        ),
        ("recommend_attractions", {"city": "B", "attraction_type": "Art"}, "No attraction recommendations found"),
        (
            "search_location",
            {"place_name": "Hill"},
            '{\n  "place_name": "Hill",\n  "latitude": "1.200000",\n  "longitude": "2.200000"\n}',
        ),
        (
            "search_location",
            {"place_name": "Hil"},
            "Coordinate information not found for location Hil, please check: 1. Whether the place name comes from "
            "other tool results; 2. Whether the place name is exactly consistent with tool results, no "
            "abbreviation, renaming or additional description allowed",
        ),
        (
            "query_road_route_info",
            {"origin": "1.200000,2.200000", "destination": "1.300000,2.300000"},
            '{\n  "origin": "1.200000,2.200000",\n  "destination": "1.300000,2.300000",\n'
            '  "distance_in_meters": 5000,\n  "duration_in_minutes": 12,\n  "cost": 15\n}',
        ),
        (
            "query_road_route_info",
            {"origin": "1.300000,2.300000", "destination": "1.200000,2.200000"},
            "No transportation information found from 1.300000,2.300000 to 1.200000,2.200000",
        ),
        (
            "query_road_route_info",
            {"origin": "1.20000,2.20000", "destination": "1.30000,2.30000"},  # five decimals
            "Coordinate 1.20000,2.20000 is not in query range, please check:\n1. Whether coordinate comes from valid "
            "tool query result, not manual input or fabrication;\n2. Whether coordinate precision is exactly "
            "consistent with query result, 6 decimal places",
        ),
        (
            "recommend_restaurants",
            {"latitude": "1.20000", "longitude": "2.200000"},
            "No recommended restaurants found near coordinates (1.20000, 2.200000), please check coordinate source",
        ),
        (
            "query_restaurant_details",
            {"restaurant_name": "X"},
            '{\n  "message": "Detailed information not found for restaurant X",\n  "restaurant_name": "X"\n}',
        ),
        (
            "query_hotel_info",
            STAY | {"hotelStar": "5"},
            "No hotel information found in B from 2026-01-01 to 2026-01-02, please check parameters or reduce "
            "constraints",
        ),
        (
            "query_train_info",
            ROUTE | {"depDate": "2026-1-1"},
            "No train information found from A to B on 2026-1-1",
        ),
        ("book_hotel", {}, '{"error": "tool \'book_hotel\' not found"}'),
    ],
)
def test_answers_to_the_letter(small, name, arguments, expected):
    assert tools.answer(small, SCHEMAS, name, arguments, True) == expected


def test_trains_and_flights_to_the_letter(small):
    routes = json.loads(tools.query_train_info(small, ROUTE, True))
    first, second = (route[0] for route in routes)
    assert list(first) == ["Segment 1", "price"] and first["price"] == 44.5  # the route 10 comes before the route 2
    assert first["Segment 1"] == {
        "arrCityName": "B",
        "arrStationCode": "BB",
        "arrStationName": "North Station",
        "depCityName": "A",
        "depStationCode": "DD",
        "depStationName": "East Station",
        "duration": 40,
        "arrDateTime": "t6",
        "depDateTime": "t5",
        "marketingTransportName": "Fast",
        "marketingTransportNo": "G3",
        "seatClassName": "First",
        "Remaining Seats": "9",
    }
    assert list(first["Segment 1"]) == list(second["Segment 2"])
    assert [second[f"Segment {k}"]["marketingTransportNo"] for k in (1, 2)] == ["G2", "G1"]  # "10" before "2"
    assert second["Segment 2"]["depCityName"] == "Middle West" and second["Segment 2"]["Remaining Seats"] == "Available"
    plain = [route[0] for route in json.loads(tools.query_train_info(small, ROUTE, False))]
    assert [plain[0][f"Segment {k}"]["marketingTransportNo"] for k in (1, 2)] == ["G1", "G2"]
    assert plain[0]["price"] == 0  # that of the first segment, which cannot be read
    only = json.loads(tools.query_train_info(small, ROUTE | {"seatClassName": "First"}, True))
    assert len(only) == 1
    (flight,) = json.loads(tools.query_flight_info(small, ROUTE, True))
    assert list(flight) == ["Segment 1", "price"] and flight["price"] == 500
    assert list(flight["Segment 1"])[-3:] == ["equipSize", "equipType", "manufacturer"]
    nothing = ROUTE | {"origin": "C"}
    assert json.loads(tools.query_flight_info(small, nothing, True))["error"].endswith("argument: 'seat'")
    assert tools.query_flight_info(small, nothing, False) == "No flight information found from C to B on 2026-01-01"
    assert "Closed Dates：\n" in tools.query_attraction_details(small, {"attraction_name": "Hill"}, False)


def test_hotels_and_restaurants_to_the_letter(small):
    text = tools.query_hotel_info(small, STAY, True)
    inn, motel = json.loads(text)
    assert text.startswith('[\n  {\n    "name": "Inn",\n    "address": "Road 1",')
    assert list(inn) == [*motel, "services"] and inn["services"] == ["Pool", "Bar"] and inn["brand"] == ""
    assert [h["name"] for h in json.loads(tools.query_hotel_info(small, STAY | {"hotelBrands": "Ji"}, True))] == [
        "Motel"
    ]
    (near,) = json.loads(tools.recommend_restaurants(small, HILL, True))
    details = json.loads(tools.query_restaurant_details(small, {"restaurant_name": "Cook"}, True))
    assert list(details) == ["id", *near] and details["price_per_person"] == near["price_per_person"] == "80"
    assert near["tags"] == ["Bar", "Sofa"] and list(near)[:4] == ["name", "latitude", "longitude", "price_per_person"]


def test_missing_tables_have_texts_of_their_own():
    nothing = Database(dict.fromkeys(FILES))
    for name, arguments, expected in (
        ("query_train_info", ROUTE, "No information found"),
        ("query_flight_info", ROUTE, "No information found, please check input parameters"),
        ("query_hotel_info", STAY, "Database not loaded"),
        ("query_attraction_details", {"attraction_name": "x"}, "Database not loaded"),
        ("recommend_attractions", {"city": "x"}, "Database not loaded"),
        ("search_location", {"place_name": "x"}, "Database not loaded"),
        ("query_road_route_info", {"origin": "x", "destination": "y"}, "Database not loaded"),
        ("recommend_restaurants", HILL, "Database not loaded"),
    ):
        assert tools.answer(nothing, SCHEMAS, name, arguments, True) == expected
    details = json.loads(tools.answer(nothing, SCHEMAS, "query_restaurant_details", {"restaurant_name": "x"}, True))
    assert details == {"message": "Database not loaded", "restaurant_name": "x"}


def test_the_scorer_takes_the_last_row_of_a_restaurant(small):
    assert small.last_restaurants["Cook"]["price_per_person"] == "90"
    assert small.locations["Hill"]["latitude"] == "1.200000"  # and the first one of a location


@pytest.mark.parametrize(
    "text,message",
    [("name,address\nx,y\n", "no column 'price'"), ('name,price\n"x,y\n', "not CSV")],
)
def test_a_damaged_table_is_named(text, message):
    with pytest.raises(InputError, match=message):
        read_table(text, "hotels", "hotels.csv")
    assert read_table(" \n", "hotels", "hotels.csv") == []


# --- the environment --------------------------------------------------------------------------------------------------
def test_a_whole_conversation(prepared):
    folder, travel, rows = prepared
    row = next(row for row in rows if "restaurant" in " ".join(row["meta"]["trip"]["hard_constraints"]))
    trip = row["meta"]["trip"]
    route = {"origin": trip["org"], "destination": trip["dest"][0], "depDate": trip["depart_date"]}
    turns = [f"<think>First.</think>{call('query_train_info', **route)}\n{call('recommend_attractions', city='x')}"]
    messages = travel.reply(row, turns)
    assert [message["role"] for message in messages] == ["tool", "tool"]
    assert "Segment 1" in messages[0]["content"] and messages[1]["content"].startswith("Recommended attractions:")
    assert travel.reply(row, turns) == messages  # a pure function
    cut = travel.score(row, turns)
    assert not cut.correct and cut.share == 0 and cut.extracted is None and not any(cut.parts.values())
    database = read_database(tasks.task_folder(folder, row["meta"]["task"]))
    turns.append(f"<think>Done.</think>Here it is.\n<plan>\n{write_plan(trip, database)}\n</plan>")
    assert travel.reply(row, turns) is None
    score = travel.score(row, turns)
    assert score.correct and score.share == 1 and score.extracted.startswith("Day 1:") and all(score.parts.values())
    assert len(score.parts) == 21 + len(trip["hard_constraints"]) + 1
    missed = next(kind for kind in trip["hard_constraints"] if kind.startswith("restaurant"))
    turns[-1] = f"<plan>{write_plan(trip, database, missed)}\nI hope you like it.</plan>"
    score = travel.score(row, turns)
    assert score.share == 1 - 1 / len(trip["hard_constraints"]) and not score.correct
    assert {name for name, held in score.parts.items() if not held} == {f"wish/{missed}", "every line read"}


def test_texts_that_are_no_plan(prepared):
    """A plan that names days and nothing else costs nothing, so it keeps a budget; hence a task without one."""
    _, travel, rows = prepared
    rows = [row for row in rows if "budget_constraint" not in row["meta"]["trip"]["hard_constraints"]]
    for turn in ("", "<plan></plan>", "<plan>x</plan>", "<plan>Day 1:\nDay 2:</plan>", "Day 1:", "<plan>" * 1000):
        score = travel.score(rows[0], [turn])
        assert not score.correct and score.share == 0
    assert travel.score(rows[0], []).extracted is None
    assert travel.score(rows[0], [f"<plan>x</plan>{call('a')}"]).extracted is None  # it still calls


def test_the_version_names_data_and_settings(prepared, tmp_path):
    folder, travel, _ = prepared
    assert travel.version.startswith("synthetic_trips ") and "DeepPlanning" not in travel.version
    versions = {travel.version, Travel(str(folder), quirks=False).version}
    versions.add(Travel(str(folder), converter={"url": "http://127.0.0.1:1/v1", "model": "reader"}).version)
    versions.add(Travel(str(synthetic.write_trips(tmp_path, trips=5, seed=1))).version)
    assert len(versions) == 4


def test_a_missing_folder_is_one_message(prepared, tmp_path):
    _, travel, rows = prepared
    with pytest.raises(InputError, match=rf"{tmp_path}/none holds no prepared tasks.*data\.prepare deepplanning"):
        Travel(str(tmp_path / "none"))
    (tmp_path / "manifest.json").write_text('{"language": "zh"}')
    with pytest.raises(InputError, match="answer in English only"):
        Travel(str(tmp_path))
    with pytest.raises(InputError, match=r"quirks: .*Expected true or false"):
        Travel(str(tmp_path), quirks="no")
    with pytest.raises(InputError, match=r"id_99 is missing.*data\.prepare"):
        travel.reply(rows[0] | {"meta": rows[0]["meta"] | {"task": 99}}, [call("search_location", place_name="x")])


def test_no_answer_stands_in_a_prompt(prepared):
    _, _, rows = prepared
    for row in rows:
        system, user = (message["content"] for message in row["prompt"])
        assert system == tasks.PROMPT.read_text().strip()
        for kind, wish in row["meta"]["trip"]["hard_constraints"].items():
            for key, gold in wish.items():
                if key.endswith("_no") or (key == "hotel_name"):
                    assert gold not in user and gold not in system, kind


@pytest.mark.parametrize("name", ["qwen3_14b_to_1.7b_deepplanning", "qwen3_32b_to_1.7b_deepplanning"])
def test_the_shipped_pairs_train_and_evaluate_in_the_same_environment(name, prepared):
    config, _ = load_config(f"configs/{name}.json")
    (benchmark,) = read_benchmarks(config).values()
    section = config.data.environment
    assert benchmark.environment == section and benchmark.max_response_tokens == config.rollout.max_response_tokens
    assert (config.data.epochs, config.data.chat_template_args) == (15, {"enable_thinking": True})
    assert (benchmark.k, benchmark.temperature) == (16, 1.0)
    if not Path(section.settings["folder"]).exists():
        with pytest.raises(InputError, match="data/prepared/deepplanning holds no prepared tasks"):
            load(section)
    folder, _, rows = prepared
    travel = load(replace(section, settings={"folder": str(folder)}))
    assert len(checked_messages(travel.reply(rows[0], [call("search_location", place_name="x") * 2]))) == 2
    assert checked_score(travel.score(rows[0], ["no plan"])).extracted is None


# --- the converter ----------------------------------------------------------------------------------------------------
@pytest.fixture
def endpoint():
    """An endpoint of OpenAI's form that gives prepared answers, one a request, and keeps what it was asked."""
    asked, answers = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(
                (self.path, dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )
            body = answers.pop(0)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, answers
    server.shutdown()
    server.server_close()
    thread.join()


def completion(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def test_a_model_can_read_the_plan(prepared, endpoint, monkeypatch):
    folder, _, rows = prepared
    url, asked, answers = endpoint
    monkeypatch.setenv("READER_KEY", "secret")
    travel = Travel(str(folder), converter={"url": url, "model": "reader", "key_variable": "READER_KEY"})
    assert "plans read by reader" in travel.version and "secret" not in travel.version
    trip = rows[0]["meta"]["trip"]
    database = read_database(tasks.task_folder(folder, rows[0]["meta"]["task"]))
    text = write_plan(trip, database)
    answers.append(completion(f"Here:\n<JSON>{json.dumps(parse_plan(text, database.names)[0])}</JSON>"))
    assert travel.score(rows[0], [f"<plan>{text}</plan>"]).correct
    (path, headers, body), *_ = asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "reader" and body["max_tokens"] == 10240 and body["messages"][1]["content"] == text
    assert travel.score(rows[0], ["no plan"]).extracted is None and len(asked) == 1


def test_answers_of_the_converter_are_validated(endpoint):
    url, asked, answers = endpoint
    plan = {"daily_plans": []}
    answers += [
        b"no JSON",
        completion("<JSON>{</JSON>"),
        completion('{"days": 1}'),
        b"[]",
        completion(json.dumps(plan)),
    ]
    assert convert("text", {"url": url, "model": "m"}, pause=0).days == ()
    assert len(asked) == 5 and "Authorization" not in asked[0][1]
    answers += [completion('<JSON>{"daily_plans": 3}</JSON>')] * 2
    with pytest.raises(RunError, match=r"no plan in 2 attempts \(the last time: the plan: daily_plans"):
        convert("text", {"url": url, "model": "m"}, attempts=2, pause=0)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"url": "http://x"}, "model is missing"),
        ({"url": "file:///etc/passwd", "model": "m"}, "begins with http"),
        ({"url": "http://x", "model": "m", "key_variable": "NOT_SET_HERE"}, "NOT_SET_HERE is not set"),
        ({"url": "http://x", "model": "m", "key": "s"}, "unknown setting 'key'"),
    ],
)
def test_wrong_settings_of_the_converter(prepared, settings, message):
    with pytest.raises(InputError, match=message):
        Travel(str(prepared[0]), converter=settings)


# --- prepared files ---------------------------------------------------------------------------------------------------
def source_folder(folder, trips, language="en", extra=()):
    """The three files of the benchmark, made of invented trips; returns the folder."""
    folder.mkdir()
    (folder / f"travel_queries_{language}.json").write_text(json.dumps([trip.task for trip in trips]))
    (folder / f"travel_tool_schema_{language}.json").write_text(json.dumps(SCHEMAS))
    with zipfile.ZipFile(folder / f"database_{language}.zip", "w") as archive:
        for trip in trips:
            synthetic.write_tables(trip.tables, folder / "unpacked" / trip.task["id"])
            for name in FILES.values():
                path = folder / "unpacked" / trip.task["id"] / name
                archive.write(path, f"database_{language}/id_{trip.task['id']}/{name}")
        for member, content in extra:
            archive.writestr(member, content)
    return folder


def some_trips(count):
    return [synthetic.make_trip(number, 0) for number in range(count)]


def test_prepared_tasks(tmp_path, capsys):
    source = source_folder(tmp_path / "source", some_trips(5))
    for out in ("one", "two"):
        command(["deepplanning", "--source", str(source), "--out", str(tmp_path / out)])
    folder = tmp_path / "one/deepplanning"
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert all((folder / file).read_bytes() == (tmp_path / "two/deepplanning" / file).read_bytes() for file in files)
    assert len(files) == 5 * 7 + 4
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 42 and manifest["language"] == "en" and len(manifest["tools"]) == 64
    assert manifest["databases"]["files"] == 35 and manifest["databases"]["tasks without a table"] == {}
    assert set(manifest["source"]["tasks"]) == {
        "travel_queries_en.json",
        "travel_tool_schema_en.json",
        "database_en.zip",
    }
    ids = manifest["ids"]
    assert len(ids["train"]) == 4 and len(ids["test"]) == 1
    assert set(ids["train"]) | set(ids["test"]) == {f"deepplanning-en-{n}" for n in range(5)}
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == ids[name]
        assert [problem.id for problem in read_problems(folder / f"{name}.jsonl", "prompt", "answer")] == ids[name]
    travel = Travel(str(folder))
    assert travel.version.startswith("deepplanning ")
    assert travel.reply(rows[0], [call("recommend_attractions", city="")])[0]["content"].startswith("Recommended")
    other = prepare("deepplanning", str(source), tmp_path / "three", seed=1)
    assert json.loads((other / "manifest.json").read_text())["ids"] != ids


def test_chinese_tasks_have_a_folder_of_their_own(tmp_path):
    source = source_folder(tmp_path / "source", some_trips(5), language="zh")
    folder = prepare("deepplanning", str(source), tmp_path, language="zh")
    assert folder.name == "deepplanning_zh"
    with pytest.raises(InputError, match="--language is for deepplanning"):
        prepare("math500", "none", tmp_path, language="zh")


def test_an_archive_writes_only_where_a_table_belongs(tmp_path):
    extra = [
        ("../../escaped.csv", "x"),
        ("/tmp/../id_0/../../hotels/hotels.csv", "x"),
        ("database_en/id_0/hotels/../../../../escaped.csv", "x"),
        ("__MACOSX/id_0/hotels/hotels.csv", "x"),
        ("database_en/id_0/notes.txt", "x"),
        ("database_en/id_77/hotels/hotels.csv", "x"),  # of no task
    ]
    source = source_folder(tmp_path / "source", some_trips(5), extra=extra)
    with zipfile.ZipFile(source / "database_en.zip", "a") as archive:
        link = zipfile.ZipInfo("database_en/id_0/hotels")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc")
    folder = prepare("deepplanning", str(source), tmp_path / "out")
    found = {
        str(path.relative_to(folder / "databases")) for path in (folder / "databases").rglob("*") if path.is_file()
    }
    assert found == {f"id_{n}/{name}" for n in range(5) for name in FILES.values()}
    assert not list(tmp_path.rglob("escaped.csv"))


@pytest.mark.parametrize("part", ["MOST_FILE", "MOST_TOTAL"])
def test_an_archive_may_not_be_too_large(tmp_path, monkeypatch, part):
    source = source_folder(tmp_path / "source", some_trips(5))
    monkeypatch.setattr(tasks, part, 2000)
    with pytest.raises(InputError, match=r"database_en.zip: .* more than 2 KiB|more than 2 KiB unpacked"):
        prepare("deepplanning", str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_faults_of_a_source_are_named(tmp_path):
    def refused(message):
        with pytest.raises(InputError, match=message):
            prepare("deepplanning", str(source), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    source = tmp_path / "none"
    refused(r"none: no travelplanning_query_en.json or travel_queries_en.json in it.*without --source")
    source = source_folder(tmp_path / "source", some_trips(5), extra=[("id_0/hotels/hotels.csv", "name,price\n")])
    refused("id_0/hotels/hotels.csv stands in it twice")
    archive = source / "database_en.zip"
    whole = archive.read_bytes()
    archive.write_bytes(b"PK" + whole[100:])
    refused("database_en.zip: cannot be unpacked")
    archive.write_bytes(whole.replace(b"origin_city", b"origin-city"))  # the checksum of the member is wrong
    refused("database_en.zip: cannot be unpacked")
    with zipfile.ZipFile(archive, "w") as empty:
        empty.writestr("id_0/hotels/hotels.csv", "address\nx\n")
    refused("id_0/hotels/hotels.csv: no column 'name'")
    with zipfile.ZipFile(archive, "w") as empty:
        empty.writestr("id_0/hotels/hotels.csv", "name,price\nx,1\n")
    refused("no tables of the task 1 in it")
    raw = json.loads((source / "travel_queries_en.json").read_text())
    for change, message in (
        ({"id": "../1"}, "row 1: the id is '../1', expected a number"),
        ({"id": "1"}, "deepplanning-en-1 stands in it twice"),
        ({"meta_info": {"org": "A"}}, "row 1, meta_info: dest is missing"),
    ):
        (source / "travel_queries_en.json").write_text(json.dumps([raw[0] | change, *raw[1:]]))
        refused(message)


def test_tables_that_a_task_lacks_are_counted(tmp_path, capsys):
    source = source_folder(tmp_path / "source", some_trips(5))
    with zipfile.ZipFile(source / "database_en.zip") as archive:
        kept = {i.filename: archive.read(i) for i in archive.infolist() if "id_3/flights" not in i.filename}
    with zipfile.ZipFile(source / "database_en.zip", "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)
    folder = prepare("deepplanning", str(source), tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["databases"]["tasks without a table"] == {"flights": 1}
    assert "1 of 5 tasks have no table of flights" in capsys.readouterr().err


def test_the_hub_is_asked_for_a_pinned_revision(tmp_path, monkeypatch):
    import huggingface_hub

    source = source_folder(tmp_path / "source", some_trips(5))
    asked = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, name, **where: ["README.md", "travel/database_en.zip"]
    )
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *names, **where: asked.append((names, where)) or str(source / "database_en.zip"),
    )
    urls = []

    def urlopen(url, timeout):
        urls.append(url)
        name = "travel_queries_en.json" if "query" in url else "travel_tool_schema_en.json"
        return (source / name).open("rb")

    monkeypatch.setattr(tasks.urllib.request, "urlopen", urlopen)
    with pytest.raises(InputError, match="not that of the pinned commit"):
        prepare("deepplanning", "hub", tmp_path / "out")
    for name, copy in (
        ("travelplanning_query_en.json", "travel_queries_en.json"),
        ("tool_schema_en.json", "travel_tool_schema_en.json"),
    ):
        monkeypatch.setitem(tasks.HASHES, name, tasks.sha256(source / copy))
    folder = prepare("deepplanning", "hub", tmp_path / "out")
    (names, where), *_ = asked
    assert names == ("Qwen/DeepPlanning", "travel/database_en.zip") and re.fullmatch("[0-9a-f]{40}", where["revision"])
    assert all(re.search("/[0-9a-f]{40}/benchmark/deepplanning/travelplanning/", url) for url in urls)
    origin = json.loads((folder / "manifest.json").read_text())["source"]["tasks"]
    assert origin["hub"] == "Qwen/DeepPlanning" and len(origin["database_en.zip"]) == 64

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    with pytest.raises(InputError, match=r"cannot be fetched \(no network\).*--source FOLDER"):
        prepare("deepplanning", "hub", tmp_path / "out")


def test_invented_trips_are_the_same_each_time(tmp_path, capsys):
    one, two = (synthetic.write_trips(tmp_path / name, trips=5) for name in ("one", "two"))
    for path in one.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (two / path.relative_to(one)).read_bytes()
    synthetic.command(["--out", str(tmp_path / "three"), "--trips", "5", "--seed", "1"])
    assert capsys.readouterr().out == f"{tmp_path}/three/synthetic_trips\n"
    manifest = json.loads((tmp_path / "three/synthetic_trips/manifest.json").read_text())
    assert manifest["name"] == "synthetic_trips" and "deepplanning" not in json.dumps(manifest).lower()


def test_databases_are_read_once(prepared, monkeypatch):
    _, travel, rows = prepared
    ask_twice = [call("search_location", place_name="x")]
    travel.reply(rows[1], ask_twice)
    monkeypatch.setattr(database_module, "read_text", None)
    travel.reply(rows[1], ask_twice)


# --- the real tasks ---------------------------------------------------------------------------------------------------
@real
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_real_tasks(language):
    path = Path(DATA) / f"deepplanning/travel_queries_{language}.json"
    assert tasks.sha256(path) == tasks.HASHES[f"travelplanning_query_{language}.json"]
    found = tasks.rows(json.loads(path.read_text()), "deepplanning", language, str(path))
    parts = tasks.split(found, 0.8, 42)
    assert len(found) == 120 and {name: len(rows) for name, rows in parts.items()} == {"train": 96, "test": 24}
    counted = [wishes(row["meta"]["trip"], quirks=True) for row in found]
    assert {kind for wished in counted for kind in wished} == set(ALL_KINDS)
    assert sorted(map(len, counted)) == ([4] * 104 + [5] * 16 if language == "en" else sorted(map(len, counted)))
    for row in found:
        for wish in row["meta"]["trip"]["hard_constraints"].values():
            for gold in (wish.get("hotel_name"), wish.get("outbound_train_no"), wish.get("inbound_flight_no")):
                assert not gold or all(gold not in message["content"] for message in row["prompt"])
    if language == "en":
        assert len(wishes(found[79]["meta"]["trip"], quirks=False)) == 5 and len(counted[79]) == 4
    assert max(len(row["prompt"][0]["content"]) for row in found) < 8000


@real
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_real_tools_have_the_parameters_of_ours(language):
    path = Path(DATA) / f"deepplanning/travel_tool_schema_{language}.json"
    assert tasks.sha256(path) == tasks.HASHES[f"tool_schema_{language}.json"]

    def shape(schemas):
        return [
            (
                s["function"]["name"],
                list(s["function"]["parameters"]["properties"]),
                s["function"]["parameters"]["required"],
            )
            for s in schemas
        ]

    assert shape(json.loads(path.read_text())) == shape(SCHEMAS)
    assert {name for name, _, _ in shape(SCHEMAS)} == set(tools.TOOLS)
