"""Where raw rows come from: a file of the user's, or the Hugging Face hub at a pinned revision."""

import random
from dataclasses import dataclass
from pathlib import Path

from opd.errors import InputError
from opd.sources import EXPECTED, digest, read_source

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub."""

    repository: str
    subset: str | None
    revision: str


def read_rows(source: str, split: str, hub: Hub) -> tuple[list[dict], dict[str, str]]:
    """Raw rows in their order, and where they are from (for a manifest).

    Args:
        source: "hub", or a file or folder of problems as in opd.sources.
        split: of the hub's data set.
    Raises:
        InputError: the source cannot be read.
    """
    if source == "hub":
        name = f"hub:{hub.repository}{f':{hub.subset}' if hub.subset else ''}@{hub.revision}/{split}"
        try:
            rows = read_source(name)
        except InputError as error:
            raise InputError(f"{error} For example --source FILE.") from None
        origin = {"hub": hub.repository, "revision": hub.revision, "split": split}
    else:
        rows, origin = read_source(source), {"file": Path(source).name, "sha256": digest(source)}
    if not rows:
        raise InputError(f"{source}: no problems in it. Expected {EXPECTED}.")
    return [row.fields for row in rows], origin


def cut(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """A random share of the rows, and the others, both in their order. Raises InputError where one has no row."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = int(share * len(rows))
    if rows and not 0 < count < len(rows):
        raise InputError(f"--split {share} of {len(rows)} problems leaves a file without any. Choose another share.")
    return [rows[i] for i in sorted(order[:count])], [rows[i] for i in sorted(order[count:])]


def need(row: dict, names: tuple[str, ...], where: str) -> dict:
    """The row, if it has these fields. Raises InputError naming what is missing."""
    missing = [name for name in names if name not in row]
    if missing:
        raise InputError(f"{where}: no field {missing[0]!r}; it has {str(sorted(row))[:300]}. Expected {EXPECTED}.")
    return row


def text_of(row: dict, name: str, where: str) -> str:
    """A field that must hold a text (numbers are taken as one), stripped. Raises InputError otherwise."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise InputError(f"{where}: field {name!r} is {str(value)[:80]!r}, expected a text.")
    return str(value).strip()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
