"""Where problems come from: JSONL, JSON, CSV and parquet files, folders of them, and data sets of the Hugging Face hub.

Nothing is unpickled, and no code of a data set runs: `datasets` has no loading scripts since its version 4.
"""

import csv
import hashlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import InputError, first_line
from opd.files import NotJson, parse_json, read_rows, read_text, readable, refuse_device, sha256

EXPECTED = "a .jsonl, .json, .csv or .parquet file of problems, a folder of such files, or hub:OWNER/NAME@REVISION"
HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)(?::([^@]+))?(?:@([^/]+)(?:/(.+))?)?")  # name, configuration, revision, split
MAGIC = {  # how files of other kinds begin, what they are, and what to do
    b"\x1f\x8b": "is compressed with gzip. Unpack it: gunzip FILE",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd. Unpack it: unzstd FILE",
    b"BZh": "is compressed with bzip2. Unpack it: bunzip2 FILE",
    b"PK\x03\x04": "is a zip archive. Unpack it: unzip FILE",
    b"PAR1": "is a parquet file. Let its name end in .parquet",
    b"ARROW1": "is an Arrow file. Load it with the datasets library, and save it with to_parquet",
}


@dataclass(frozen=True)
class Row:
    """A row of a source."""

    where: str  # the file and the line, or the source and the number of the row, for messages
    name: str  # the same within the source
    fields: dict[str, Any]


def read_source(source: str | Path) -> list[Row]:
    """All rows of a source, in order: of a file, of a folder's files by name, or of hub:OWNER/NAME[:CONFIG]@REVISION.

    The kind of a file is that of its name's end. A file of any other name is read as JSONL. Raises InputError that
    names the source, and file and line or row where there is one.
    """
    if str(source).startswith("hub:"):
        return list(_rows(str(source), _read_hub(str(source))))
    path = Path(source)
    if not path.is_dir():
        return list(_read_file(path))
    return [Row(r.where, f"{file.name}:{r.name}", r.fields) for file in _files(path) for r in _read_file(file)]


def digest(source: str) -> str:
    """What tells the content of a source: SHA-256 of the file or of all files of the folder, or the hub's revision.

    Raises InputError where the source cannot be read.
    """
    if source.startswith("hub:"):
        return _parse_hub(source)[2]
    path = Path(source)
    refuse_device(path, EXPECTED)
    with readable(source, EXPECTED):
        if not path.is_dir():
            return sha256(path)
        names = "".join(f"{file.name} {sha256(file)}\n" for file in _files(path))
    return hashlib.sha256(names.encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    """The files of problems that stand in a folder itself."""
    with readable(folder, EXPECTED):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS and path.is_file())
    if not files:
        raise InputError(
            f"{folder}: no file in this folder ends in {', '.join(READERS)}. Name the files, or another one."
        )
    return files


def _read_file(path: Path) -> Iterator[Row]:
    refuse_device(path, EXPECTED)
    reader = READERS.get(path.suffix.lower(), _read_jsonl)
    with readable(path, EXPECTED), path.open("rb") as file:
        start = file.read(8)
    for magic, what in MAGIC.items():
        if start.startswith(magic) and not (magic == b"PAR1" and reader is _read_parquet):
            raise InputError(f"{path}: this {what.replace('FILE', str(path))}.")
    return reader(path)


def _rows(source: str | Path, fields: list[Any]) -> Iterator[Row]:
    for number, row in enumerate(fields, 1):
        where = f"{source}, row {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where}: {type(row).__name__}, expected an object with the fields of a problem.")
        yield Row(where, str(number), row)


def _read_jsonl(path: Path) -> Iterator[Row]:
    expected = "a JSONL file of problems"
    if read_text(path, expected).lstrip().startswith("["):
        raise InputError(
            f"{path}: this is a JSON list, and a JSONL file holds one object per line. Let its name end in .json."
        )
    for number, row in read_rows(path, expected):
        yield Row(f"{path}, line {number}", str(number), row)


def _read_json(path: Path) -> Iterator[Row]:
    """The objects of a list, or of the one list in an object. Many files of JSON lines are named .json as well."""
    expected = "a JSON list of problems, or an object with one list"
    try:
        value = parse_json(read_text(path, expected), str(path), expected)
    except NotJson as error:
        if "(Extra data" not in str(error):
            raise
        return _read_jsonl(path)
    if isinstance(value, dict):
        lists = {name: part for name, part in value.items() if isinstance(part, list)}
        if len(lists) != 1:
            names = f"the lists {str(list(lists))[:200]}" if lists else "no list"
            raise InputError(f"{path}: the object in it has {names}. Expected {expected}.")
        (value,) = lists.values()
    if not isinstance(value, list):
        raise InputError(f"{path}: {type(value).__name__}, expected {expected}.")
    return _rows(path, value)


def _read_csv(path: Path) -> Iterator[Row]:
    """The rows under a header. Every field is a text."""
    csv.field_size_limit(sys.maxsize)  # the default refuses a prompt of 128 KiB
    reader = csv.reader(io.StringIO(read_text(path, "a CSV file of problems")), strict=True)
    try:
        header, *rows = [fields for fields in reader if fields] or [[]]
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: not CSV ({error}). Expected fields in double quotes."
        ) from None
    if len(set(header)) < len(header):
        raise InputError(f"{path}: the header names a field twice: {str(header)[:200]}. Rename one.")
    if len(header) == 1 and (other := re.search("[;\t]", header[0])):
        raise InputError(f"{path}: the header is {header[0][:80]!r}. Expected commas between fields, not {other[0]!r}.")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise InputError(
                f"{path}, row {number}: {len(row)} fields, and the header has {len(header)}. Mend the row."
            )
    return _rows(path, [dict(zip(header, row, strict=True)) for row in rows])


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet  # slow to import, and not needed for other files

    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except (OSError, ValueError, ArrowException) as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}). Expected a parquet file of problems."
        ) from None
    return _rows(path, _without_nulls(rows))


def _without_nulls(value: Any) -> Any:
    """A value of an Arrow table without the nulls of its structures, which stand for keys that a row does not have."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _parse_hub(source: str) -> tuple[str, str | None, str, str | None]:
    """Name, configuration, revision and split of a data set. Raises InputError."""
    match = HUB.fullmatch(source)
    if match is None:
        raise InputError(
            f"{source[:200]}: expected hub:OWNER/NAME[:CONFIG]@REVISION[/SPLIT], for example "
            "hub:openai/gsm8k:main@e53f048856ff4f594e959d75785d2c2d37b678ee/train."
        )
    name, subset, revision, split = match.groups()
    if revision in (None, "main"):
        raise InputError(
            f"{source}: expected a revision that stays, a commit or a tag, so that the run can be repeated. Write "
            f"hub:{name}@COMMIT, with a commit from the history of the data set's files."
        )
    if Path(name).exists():
        raise InputError(f"{source}: {name} is a folder here, which has no revision. Name the folder without hub:.")
    return name, subset, revision, split


def _read_hub(source: str) -> list[Any]:
    name, subset, revision, split = _parse_hub(source)
    from datasets import load_dataset  # slow to import, and not needed for a file

    try:
        found = load_dataset(name, subset, split=split, revision=revision)
        splits = found if split is None else {split: found}
        if len(splits) == 1:
            return _without_nulls(next(iter(splits.values())).to_list())
    except Exception as error:  # network, authentication, a moved repository: the hub's client has many kinds
        raise InputError(
            f"{source}: cannot be read ({first_line(error)}). Check name, revision and split, the network, your login, "
            "and HF_HUB_OFFLINE; or name a local copy of its files."
        ) from None
    raise InputError(
        f"{source}: the data set has the splits {list(splits)}. Choose one: {source}/{next(iter(splits))}."
    )
