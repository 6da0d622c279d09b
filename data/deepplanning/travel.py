"""The environment: it answers a model's tool calls and judges the plan with which the model ends.

A configuration names it as data.deepplanning.travel:Travel. It is a pure function of a task and of what the model has
said, and it reads the prepared folder, which `python -m data.prepare deepplanning` writes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.deepplanning import tools
from data.deepplanning.calls import Call, parse_calls
from data.deepplanning.checks import Case
from data.deepplanning.constraints import wishes
from data.deepplanning.convert import convert, read_endpoint
from data.deepplanning.database import Database, read_database
from data.deepplanning.plan import parse_plan, plan_text, read_plan
from data.deepplanning.scores import judge
from data.deepplanning.tasks import TOOLS, task_folder
from opd.errors import InputError
from opd.files import check, parse_json, read_object, read_text, sha256
from opd.rollout.environment import Score

RULES = 1  # goes up when the same turns get another reply or score


class Travel:
    """DeepPlanning's travel tasks, or invented ones in the same form.

    Args:
        folder: of prepared tasks.
        quirks: whether tools and scorer do what the original's code does where its documentation says otherwise.
        converter: {"url", "model", "key_variable"} of an endpoint whose model turns plans into JSON, as in the
            original; None reads plans by fixed rules.
    Raises:
        InputError: the folder is missing, or its tasks are in Chinese, for which the tools have no answers here.
    """

    def __init__(self, folder: str, quirks: bool = True, converter: Mapping[str, Any] | None = None):
        self.folder = Path(check(folder, str, "folder", "the folder of prepared tasks, as a text"))
        check(quirks, bool, "quirks", "true or false")
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise InputError(
                f"{self.folder} holds no prepared tasks, because {path.name} is missing. Run: python -m data.prepare "
                "deepplanning. Or invent tasks: python -m data.deepplanning.synthetic"
            )
        manifest = read_object(path, "the manifest of prepared tasks")
        if manifest.get("language") != "en":
            raise InputError(
                f"{path}: the tasks are not in English, and the tools answer in English only. Prepare those."
            )
        self.quirks, self.endpoint = quirks, converter and read_endpoint(converter)
        self.tools = parse_json(read_text(self.folder / TOOLS, "the tools"), str(self.folder / TOOLS))
        ways = [
            f"travel {RULES}",
            "with quirks" if quirks else "without quirks",
            f"plans read by {self.endpoint['model']}" if self.endpoint else "plans read by rules",
        ]
        self.version = f"{manifest.get('name')} {sha256(path)[:12]}, {', '.join(ways)}"

    def reply(self, problem: Mapping[str, Any], turns: Sequence[str]) -> list[dict[str, str]] | None:
        """The tools' answers to the last turn, one message for each call; None for a turn that calls none."""
        calls = parse_calls(turns[-1])
        if not calls:
            return None
        database = self._database(problem)
        return [{"role": "tool", "content": self._answer(database, call)} for call in calls]

    def score(self, problem: Mapping[str, Any], turns: Sequence[str]) -> Score:
        """The verdict on the plan in the last turn. A turn that still calls a tool has none."""
        trip = problem["meta"]["trip"]
        text = plan_text(turns[-1]) if turns and not parse_calls(turns[-1]) else None
        case, unread = self._case(problem, text) if text else (None, [])
        verdict = judge(case, wishes(trip, self.quirks), bool(text) and not unread)
        return Score(bool(verdict.personalized), verdict.share, text, verdict.parts)

    def _database(self, problem: Mapping[str, Any]) -> Database:
        return read_database(task_folder(self.folder, problem["meta"]["task"]))

    def _answer(self, database: Database, call: Call) -> str:
        if call.fault:
            return tools.error(call.fault)
        return tools.answer(database, self.tools, call.name, call.arguments, self.quirks)

    def _case(self, problem: Mapping[str, Any], text: str) -> tuple[Case, list[str]]:
        """The case of a plan, and its lines that could not be read."""
        database = self._database(problem)
        if self.endpoint:
            return Case(convert(text, self.endpoint), problem["meta"]["trip"], database), []
        plan, unread = parse_plan(text, database.names)
        return Case(read_plan(plan), problem["meta"]["trip"], database), unread
