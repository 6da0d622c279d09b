"""Files that are whole or not there at all, folders with one writer, and checked reading of files from outside.

Every configuration, problem file and run folder is read through here, so a damaged or foreign file ends in one message
that names the file and the line.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from opd.cli import say
from opd.errors import InputError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # the errors of a file system without locks
DEPTH = 100  # the most levels of nested lists and objects; more would exhaust the stack of code that walks them


class NotJson(InputError):
    """A text is no JSON at all."""


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole or not there at all, and that survives a crash of the machine."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk, so that they survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writable(folder: Path, setting: str, refused: type[OSError] = OSError) -> Iterator[None]:
    """Within it an error `refused` is an InputError that says that `folder` cannot be written, and to set `setting`."""
    try:
        yield
    except refused as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}). Set {setting} to a folder you may write to."
        ) from None


@contextmanager
def readable(path: str | Path, expected: str) -> Iterator[None]:
    """Within it an OSError is an InputError that says that `path` cannot be read, and what was expected there."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Expected {expected}.") from None


@contextmanager
def lock(folder: Path, setting: str, wait: Callable[[], object] | None = None) -> Iterator[None]:
    """Makes this process the only writer of a folder, which need not exist, for the length of the block.

    The operating system holds the lock on the file `.NAME.lock` beside the folder and drops it however the process
    ends. Between machines the lock works if their shared disk passes locks on. The block's end removes the lock's file
    and those parents that were made for it and stayed empty.

    Args:
        setting: the setting with which the user chooses another folder, for the message.
        wait: None refuses a folder that another process writes. A function makes this process wait, and is called
            again and again meanwhile; it may raise to give up.
    Raises:
        InputError: another process writes there, nobody can write there, or the path is that of a file.
    """
    path = Path(os.path.realpath(folder))
    for place in (folder, *path.parents):
        if os.path.lexists(place) and not os.path.isdir(place):
            raise InputError(f"{place} is a file, expected a folder. Set {setting} to another one.")
    if not path.name:
        raise InputError(f"{folder} is the root of the file system. Set {setting} to a folder of its own.")
    path = path.with_name(f".{path.name}.lock")
    made = [parent for parent in path.parents if not os.path.lexists(parent)]
    handle = None
    try:
        with writable(folder, setting):
            handle = _acquire(path, folder, setting, wait)
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)  # before the lock is dropped, so that nobody can lock a file that is gone
            os.close(handle)
        for parent in made:  # the deepest first, as far as they are empty
            with suppress(OSError):
                parent.rmdir()


def is_locked(folder: Path) -> bool:
    """Whether another process writes the folder at the moment, as far as its file system knows locks."""
    path = Path(os.path.realpath(folder))
    try:
        handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR)
    except OSError:
        return False  # nobody has made the lock's file, or it cannot be read: whoever writes there will say why
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two who ask do not meet
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(handle)
    return False


def _acquire(path: Path, folder: Path, setting: str, wait: Callable[[], object] | None) -> int | None:
    """The descriptor that holds the lock; None where the file system knows no locks."""
    waiting, attempts = False, 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError):
            attempts += 1  # another process has just removed the empty parent that it had made
            if attempts == 100:
                raise
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            if error.errno in NO_LOCKS:
                say(f"note: {path.parent} is on a file system without locks, so nothing keeps a second writer away")
                return None
            if error.errno != errno.EWOULDBLOCK:
                raise
            if wait is None:
                raise InputError(
                    f"{folder} is being written by {owner}. Two writers would destroy each other's files: wait until "
                    f"it has ended, or choose another folder ({setting})."
                ) from None
            if not waiting:
                say(f"waiting for {owner}, which writes {folder}")
            waiting = True
            wait()
            time.sleep(0.2)
            continue
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle
        os.close(handle)  # the former owner removed this file before we locked it, so the lock is worth nothing


@contextmanager
def filled(folder: Path, setting: str) -> Iterator[Path]:
    """Gives a new, temporary folder, whose files move into `folder` when the block ends without an error.

    After an error the new files are removed and `folder` stays as it was. The caller holds the lock of `folder`. Raises
    InputError that names `setting` where this process may not write.
    """
    temporary = Path(os.path.realpath(folder))
    temporary = temporary.with_name(f".{temporary.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writable(folder, setting, PermissionError):
            temporary.mkdir(parents=True)
            yield temporary
            folder.mkdir(exist_ok=True)
            for path in sorted(temporary.iterdir()):
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def whole_rows(path: Path, kind: Any) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run's own JSONL file that have the shape of the TypedDict `kind`, and the number of other lines.

    A full disk leaves half a line, and a bad disk leaves bytes that are no text.
    """
    rows, damaged = [], 0
    for line in filter(bytes.strip, path.read_bytes().split(b"\n")):
        try:
            rows.append(check(parse_json(line.decode(), ""), kind, "", ""))
        except (InputError, UnicodeDecodeError):
            damaged += 1
    return rows, damaged


def step_number(path: Path) -> int | None:
    """The number 4 of step_000004 or step_000004.jsonl; None for a name that a run does not give."""
    match = re.fullmatch(r"step_(\d{6,12})", path.name.removesuffix(".jsonl"))
    return int(match[1]) if match else None


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def amount(size: float) -> str:
    """A number of bytes for people to read, such as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def parse_json(text: str, where: str, expected: str = "JSON") -> Any:
    """The value of a JSON text from outside.

    Args:
        where: file and line, for the messages.
        expected: the end of the messages, as in read_text.
    Raises:
        NotJson: the text is not JSON.
        InputError: an object has a key twice, an integer has more digits than Python converts, lists and objects are
            nested deeper than DEPTH, or an escape is half a character, which no file or tokenizer can take.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(mapping := dict(pairs)) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated = next(name for name, count in counts.items() if count > 1)
            raise InputError(f"{where}: key {repeated!r} stands twice in one object. Keep one of them.")
        return mapping

    try:
        value = json.loads(text, object_pairs_hook=unique)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # it refuses half a character
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise NotJson(f"{where}: not JSON ({error.msg}, {line}column {error.colno}). Expected {expected}.") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("ascii", "backslashreplace").decode()
        raise InputError(f"{where}: holds {half}, half of a character (a lone surrogate). Remove it.") from None
    except RecursionError:
        raise InputError(f"{where}: lists and objects are nested too deep, expected at most {DEPTH} levels.") from None
    except ValueError as error:  # an integer beyond sys.get_int_max_str_digits()
        raise InputError(f"{where}: {str(error).split(';')[0]}. Expected a number of fewer digits.") from None
    if text.count("[") + text.count("{") > DEPTH and _depth(value) > DEPTH:
        raise InputError(f"{where}: lists and objects are nested too deep, expected at most {DEPTH} levels.")
    return value


def _depth(value: Any) -> int:
    """How many levels lists and objects are nested. It goes level by level, because recursion would need the stack."""
    level, depth = [value], 0
    while level:
        groups = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level, depth = [child for group in groups for child in group], depth + 1
    return depth


@lru_cache(maxsize=32)
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def check(value: Any, kind: Any, where: str, expected: str) -> Any:
    """Returns the value if it has the shape of the TypedDict `kind`; it may have further keys.

    Raises:
        InputError: it names `where`, the first key that is missing or of another type, and `expected`.
    """
    try:
        _adapter(kind).validate_python(value, strict=True)
        return value
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"]) or "it"
        got = "is missing" if fault["type"] == "missing" else f"is {repr(fault['input'])[:80]} ({fault['msg']})"
        raise InputError(f"{where}: {name} {got}. Expected {expected}.") from None


def refuse_device(path: str | Path, expected: str) -> None:
    """Raises InputError for a device such as /dev/zero and for a pipe, because reading them may never end."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: is a device or a pipe, which may have no end. Expected {expected}.")


def read_text(path: str | Path, expected: str) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors write.

    Raises InputError, whose message ends with `expected`, for example "a JSONL file of problems".
    """
    refuse_device(path, expected)
    try:
        with readable(path, expected):
            return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}). Expected {expected}.") from None


def read_object(path: str | Path, expected: str) -> dict[str, Any]:
    """The object that a JSON file holds. Raises InputError that names the file."""
    value = parse_json(read_text(path, expected), str(path), expected)
    if not isinstance(value, dict):
        raise InputError(f"{path}: {type(value).__name__}, expected {expected}, which is a JSON object.")
    return value


def read_rows(path: str | Path, expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of a JSONL file that is not blank. Raises InputError that names the line."""
    for number, line in enumerate(read_text(path, expected).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            value = parse_json(line, where, expected)
            if not isinstance(value, dict):
                raise InputError(f"{where}: {type(value).__name__}, expected a JSON object.")
            yield number, value
