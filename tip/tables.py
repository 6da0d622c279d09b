"""Tables of the paper as data: configs/tables/NAME.json -> the arms that are trained, panel by panel.

A figure that is drawn from a table's runs is a view of it: a file with a title and the name of that table as `source`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd.config import ROOT, Config, read_json_object
from opd.errors import InputError
from tip.rules import RULES

TABLES = ROOT / "configs" / "tables"


def other_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an arm sets besides rule and retention, by the last word of each key."""
    return {k.rpartition(".")[2]: v for k, v in settings.items() if k not in ("tip.rule", "tip.retention")}


@dataclass(frozen=True)
class Arm:
    settings: dict[str, Any]  # KEY -> VALUE of --set

    @property
    def overrides(self) -> list[str]:
        """The settings as arguments of --set."""
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]

    @property
    def label(self) -> str:
        """`soft_or 0.2 normalization=quantile`: rule, retention where the rule has one, whatever else it sets."""
        rest = other_settings(self.settings)
        rule = self.settings["tip.rule"]
        words = [rule, "1.0" if rule == "all" else f"{self.settings['tip.retention']:g}" if self.selects else ""]
        return " ".join([*filter(None, words), *(f"{k}={v}" for k, v in rest.items())])

    @property
    def selects(self) -> bool:
        return RULES[self.settings["tip.rule"]].mechanic != "weights"

    @property
    def slug(self) -> str:
        return self.label.replace(" ", "-").replace("=", "-")


@dataclass(frozen=True)
class Table:
    name: str  # of its file: "table5"
    title: str
    paper: str | None  # the paper's table with values for these arms (data/paper/tables.json)
    baselines: tuple[str, ...]  # labels of the arms that others are compared with
    every_evaluation: bool  # a block for each evaluated step, else for the last alone
    panels: tuple[tuple[str, tuple[Arm, ...]], ...]
    conversations: bool = False  # its arms need an environment that answers the student between its turns
    note: str = ""  # shown where the paper's values are not, because the pair is another

    @property
    def arms(self) -> list[Arm]:
        return [arm for _, arms in self.panels for arm in arms]


def folder_of(config: Config) -> Path:
    """Where the runs of all tables of a pair lie."""
    return Path(config.output_dir) / f"{config.run_name}-reproduce"


def read_table(name: str) -> Table:
    """Reads configs/tables/<name>.json. Raises InputError when there is none, or when it is not one."""
    known = sorted(p.stem for p in TABLES.glob("*.json"))
    if name not in known:
        raise InputError(f"there is no table {name[:80]!r}; there are {', '.join(known)}.")
    path = TABLES / f"{name}.json"
    content = read_json_object(path)
    try:
        if "source" in content:
            content = read_json_object(TABLES / f"{content.pop('source')}.json") | content
        panels = tuple((p["title"], tuple(Arm(a) for a in p["arms"])) for p in content.pop("panels"))
        table = Table(name=name, panels=panels, **content | {"baselines": tuple(content["baselines"])})
        labels = [arm.label for arm in table.arms]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a table ({error}). See the other files of its folder.") from None
    if len(set(labels)) < len(labels) or not set(table.baselines) <= set(labels):
        raise InputError(f"{path}: an arm stands twice, or one of baselines {list(table.baselines)} is no arm.")
    return table


def at_rate(table: Table, rate: float, rate_of_pair: float) -> Table:
    """The table with this learning rate in every arm.

    An arm does not set the rate that the pair file has anyway, so that its runs serve the plain table as well.
    """
    if rate == rate_of_pair:
        return table
    arm_of = {arm.label: Arm(arm.settings | {"optim.lr": rate}) for arm in table.arms}
    return replace(
        table,
        title=f"{table.title}, learning rate {rate:g}",
        baselines=tuple(arm_of[label].label for label in table.baselines),
        panels=tuple((title, tuple(arm_of[arm.label] for arm in arms)) for title, arms in table.panels),
    )


def only(table: Table, labels: list[str]) -> Table:
    """The table with these arms and its baselines alone. Raises InputError for a label that it does not have."""
    known = [arm.label for arm in table.arms]
    if unknown := [label for label in labels if label not in known]:
        raise InputError(f"--arms: {table.name} has no arm {unknown[0][:80]!r}; its arms are {', '.join(known)}.")
    wanted = {*labels, *table.baselines}
    panels = ((title, tuple(arm for arm in arms if arm.label in wanted)) for title, arms in table.panels)
    return replace(table, panels=tuple((title, arms) for title, arms in panels if arms))
