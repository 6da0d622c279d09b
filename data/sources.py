"""Where raw rows come from: a file of the user's, or the Hugging Face hub at a pinned revision."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from opd.errors import InputError, first_line
from opd.files import parse_json, read_text

KINDS = "a .jsonl, .json or .parquet file of problems"
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
        source: "hub", or a .jsonl, .json or .parquet file.
        split: of the hub's data set.
    Raises:
        InputError: the source cannot be read.
    """
    if source == "hub":
        from datasets import load_dataset  # slow to import, and not needed for a file

        try:
            rows = load_dataset(hub.repository, hub.subset, split=split, revision=hub.revision).to_list()
        except Exception as error:  # network, authentication, a moved repository: the hub's client has many kinds
            raise InputError(
                f"{hub.repository}: cannot be downloaded ({str(error)[:200]}). Check the network and "
                "HF_HUB_OFFLINE, or give a file: --source FILE."
            ) from None
        return rows, {"hub": hub.repository, "revision": hub.revision, "split": split}
    path = Path(source)
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            data = path.read_bytes()
            rows = parquet.read_table(path).to_pylist()
        else:
            text, data = read_text(source, KINDS), path.read_bytes()
            lines = (
                [(source, text)]
                if path.suffix == ".json"
                else [(f"{source}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            )
            rows = [parse_json(line, where, KINDS) for where, line in lines]
            rows = rows[0] if path.suffix == ".json" else rows
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}). Expected {KINDS}.") from None
    except ValueError as error:
        raise InputError(f"{source}: cannot be read ({first_line(error)}). Expected {KINDS}.") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{source}: expected a non-empty list of JSON objects, in {KINDS}.")
    return rows, {"file": path.name, "sha256": hashlib.sha256(data).hexdigest()}


def need(row: dict, names: tuple[str, ...], where: str) -> dict:
    """The row, if it has these fields. Raises InputError naming what is missing."""
    missing = [name for name in names if name not in row]
    if missing:
        raise InputError(f"{where}: no field {missing[0]!r}; it has {str(sorted(row))[:300]}. Expected {KINDS}.")
    return row


def text_of(row: dict, name: str, where: str) -> str:
    """A field that must hold a text (numbers are taken as one), stripped. Raises InputError otherwise."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise InputError(f"{where}: field {name!r} is {str(value)[:80]!r}, expected a text.")
    return str(value).strip()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
