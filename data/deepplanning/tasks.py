"""DeepPlanning's travel tasks (QwenLM/Qwen-Agent, Apache-2.0) as problems, with the databases that their tools read.

The tasks and the tools' descriptions stand in the benchmark's repository, and the databases on its hub page. Answers
stand in a row's `meta` and never in its prompt.
"""

import hashlib
import re
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from data.deepplanning.database import FILES, read_table
from data.sources import cut, need, text_of
from opd.cli import say
from opd.errors import InputError, first_line
from opd.files import amount, check, parse_json, read_text, sha256
from opd.sources import read_source

LANGUAGES = ("en", "zh")
HUB, REVISION = "Qwen/DeepPlanning", "213876cce679f993a476d01042e13d111c0e3648"
CODE = "QwenLM/Qwen-Agent/31a4d36d123688581a9e9744427272b33ce940e0/benchmark/deepplanning/travelplanning"
RAW = f"https://raw.githubusercontent.com/{CODE}"
HASHES = {  # SHA-256 of the files of that commit
    "travelplanning_query_en.json": "60455bb30bd624b7b2faf436431203ad3df5a16f42a064e70f48e195c5c993c0",
    "travelplanning_query_zh.json": "c9ecc754851db6a42e376b2720ae07a9711e6f6ff4d8b235d5de71932e066e97",
    "tool_schema_en.json": "8cdd4a8d5b266b93edd48ee1f73044226290461635cdf794481232fcc739a7d6",
    "tool_schema_zh.json": "a3a2baf0f2c0d9ba2517d9ecfbda6e05e195bea3090ac66f9d9538d434a18cbb",
}
QUERIES = ("travelplanning_query_{}.json", "travel_queries_{}.json")  # the names under which a file is looked for
SCHEMAS = ("tool_schema_{}.json", "travel_tool_schema_{}.json")
ARCHIVES = ("database_{}.zip",)
PROMPT = Path(__file__).with_name("prompt.txt")
TOOLS, DATABASES = "tools.json", "databases"  # in the folder of prepared tasks
TRAIN_SHARE = 0.8  # of the tasks, as in the paper, which names neither language nor seed
MEMBER = re.compile(rf"(?:.*/)?id_(\d{{1,6}})/({'|'.join(map(re.escape, FILES.values()))})")
MOST_FILE, MOST_TOTAL = 64 * 2**20, 8 * 2**30  # bytes of a file and of all files of an archive, unpacked
MOST_DOWNLOAD = 16 * 2**20


class TripFacts(TypedDict):
    """What the scorer needs to know of a trip. There is more in it."""

    org: str
    dest: list[str]
    days: int
    people_number: int
    room_number: int
    hard_constraints: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """What the tasks of a language are made of."""

    rows: list[dict[str, Any]]
    tools: str  # the tools' descriptions, as a JSON text
    archive: Path  # of the databases
    origin: Mapping[str, str]


def read_tasks(
    source: str, language: str, share: float, seed: int
) -> tuple[dict[str, list[dict]], dict[str, Any], Callable[[Path], dict[str, Any]]]:
    """Train and test rows, where they are from, and what writes tools and databases beside them.

    Args:
        source: "hub", or a folder with the three files.
        share: of the tasks that are for training.
        seed: of the split.
    Raises:
        InputError: a file is missing or malformed.
    """
    files = _downloaded(language) if source == "hub" else _in_folder(Path(source), language)
    splits = split(rows(files.rows, "deepplanning", language, source), share, seed)
    ids = {name: [row["id"] for row in found] for name, found in splits.items()}

    def write_more(folder: Path) -> dict[str, Any]:
        (folder / TOOLS).write_text(files.tools, encoding="utf-8")
        wanted = {row["meta"]["task"] for found in splits.values() for row in found}
        about = {"language": language, "ids": ids, "tools": sha256(folder / TOOLS)}
        return about | unpack(files.archive, wanted, folder)

    return splits, {"tasks": files.origin}, write_more


def _in_folder(folder: Path, language: str) -> Source:
    def find(names: tuple[str, ...]) -> Path:
        paths = [folder / name.format(language) for name in names]
        for path in paths:
            if path.is_file():
                return path
        raise InputError(
            f"{folder}: no {' or '.join(path.name for path in paths)} in it. Expected the tasks and the tools' "
            f"descriptions of the benchmark's repository, and database_{language}.zip of the hub's {HUB}. "
            "They are fetched without --source."
        )

    queries, schemas, archive = (find(names) for names in (QUERIES, SCHEMAS, ARCHIVES))
    tools = read_text(schemas, "the JSON list of the tools")
    parse_json(tools, str(schemas))
    origin = {path.name: sha256(path) for path in (queries, schemas, archive)}
    return Source([row.fields for row in read_source(queries)], tools, archive, origin)


def _downloaded(language: str) -> Source:
    from huggingface_hub import HfApi, hf_hub_download  # slow to import, and not needed for a folder

    archive = ARCHIVES[0].format(language)
    try:
        names = HfApi().list_repo_files(HUB, repo_type="dataset", revision=REVISION)
        place = next((name for name in names if name.rpartition("/")[2] == archive), archive)
        path = Path(hf_hub_download(HUB, place, repo_type="dataset", revision=REVISION))
        queries = _fetch("data", QUERIES[0].format(language))
        tools = _fetch("tools", SCHEMAS[0].format(language))
    except InputError:
        raise
    except Exception as error:  # network, login, a moved repository: the clients have many kinds
        raise InputError(
            f"the tasks of {HUB} cannot be fetched ({first_line(error)}). Check the network and your login, or name a "
            "folder with copies of the files: --source FOLDER."
        ) from None
    origin = {"hub": HUB, "revision": REVISION, "code": CODE, archive: sha256(path)}
    return Source(parse_json(queries, "the tasks"), tools, path, origin)


def _fetch(place: str, name: str) -> str:
    """The text of a file of the benchmark's repository, if its content is that of the pinned commit."""
    with urllib.request.urlopen(f"{RAW}/{place}/{name}", timeout=60) as response:
        content = response.read(MOST_DOWNLOAD)
    if hashlib.sha256(content).hexdigest() != HASHES[name]:
        raise InputError(f"{RAW}/{place}/{name}: its content is not that of the pinned commit. Try again later.")
    return content.decode()


def rows(raw: list[dict], name: str, language: str, where: str) -> list[dict]:
    """Raw rows (id, query, meta_info) as {id, prompt, answer, source, meta}.

    The environment judges a plan by meta.trip, so there is no answer in words.
    """
    system = PROMPT.read_text(encoding="utf-8").strip()
    found = []
    for position, row in enumerate(raw, 1):
        place = f"{where}, row {position}"
        need(row, ("id", "query", "meta_info"), place)
        task = text_of(row, "id", place)
        if not re.fullmatch(r"\d{1,6}", task, re.A):
            raise InputError(f"{place}: the id is {task[:80]!r}, expected a number.")
        trip = check(row["meta_info"], TripFacts, f"{place}, meta_info", "what the benchmark says of a trip")
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": text_of(row, "query", place)}]
        found.append(
            {
                "id": f"{name}-{language}-{task}",
                "prompt": prompt,
                "answer": "",
                "source": name,
                "meta": {"language": language, "task": int(task), "trip": trip},
            }
        )
    if twice := [task for task, count in Counter(row["id"] for row in found).items() if count > 1]:
        raise InputError(f"{where}: the id {twice[0]} stands in it twice. Remove one of the rows.")
    return found


def split(found: list[dict], share: float, seed: int) -> dict[str, list[dict]]:
    """A share of the tasks for training and the others for testing, both in their order."""
    return dict(zip(("train", "test"), cut(found, share, seed), strict=True))


def task_folder(folder: Path, task: int) -> Path:
    """Where the tables of a task lie in a folder of prepared tasks."""
    return folder / DATABASES / f"id_{int(task)}"


# --- the databases ----------------------------------------------------------------------------------------------------
def unpack(path: Path, wanted: Collection[int], folder: Path) -> dict[str, Any]:
    """Writes the tables of the wanted tasks from an archive; returns what the manifest says of them.

    An archive's own paths are never written to: a file counts only if its name is that of a table of a task, and it
    goes to the place that follows from both. Raises InputError for an archive that is damaged, too large, or lacks a
    task, and for a table that cannot be read.
    """
    digests: dict[str, str] = {}
    total = 0
    for name, table, content in _members(path, wanted):
        if name in digests:
            raise InputError(f"{path}: {name} stands in it twice. Fetch the archive again.")
        total += len(content)
        if total > MOST_TOTAL:
            raise InputError(f"{path}: more than {amount(MOST_TOTAL)} unpacked. Fetch the archive again.")
        target = folder / DATABASES / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        read_table(read_text(target, "a CSV file"), table, f"{path}, {name}")
        digests[name] = hashlib.sha256(content).hexdigest()
    return _describe(digests, total, wanted, path)


def _members(path: Path, wanted: Collection[int]) -> Iterator[tuple[str, str, bytes]]:
    """Name, table and content of every table of a wanted task. The limit holds whatever the archive says of sizes."""
    tables = {file: table for table, file in FILES.items()}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                match = MEMBER.fullmatch(member.filename)
                if not match or "__MACOSX" in member.filename or int(match[1]) not in wanted:
                    continue
                name = f"id_{int(match[1])}/{match[2]}"
                with archive.open(member) as file:
                    content = file.read(MOST_FILE + 1)
                if len(content) > MOST_FILE:
                    raise InputError(
                        f"{path}: {name} unpacks to more than {amount(MOST_FILE)}. Fetch the archive again."
                    )
                yield name, tables[match[2]], content
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be unpacked ({first_line(error)}). Fetch the archive again.") from None


def _describe(digests: Mapping[str, str], total: int, wanted: Collection[int], path: Path) -> dict[str, Any]:
    tasks = {name.partition("/")[0] for name in digests}
    if missing := sorted(task for task in wanted if f"id_{task}" not in tasks):
        raise InputError(
            f"{path}: no tables of the task {missing[0]} in it, expected id_{missing[0]}/{FILES['hotels']}."
        )
    lacking = Counter(table for table, file in FILES.items() for task in tasks if f"{task}/{file}" not in digests)
    for table, count in lacking.items():
        say(f"note: {count} of {len(tasks)} tasks have no table of {table}, and their tools will say so")
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return {
        "databases": {
            "files": len(digests),
            "bytes": total,
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "tasks without a table": dict(sorted(lacking.items())),
        }
    }
