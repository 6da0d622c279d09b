"""The common parts of all commands: exit codes, signals, the console, and the arguments `--config` and `--set`.

Messages and progress go to standard error. Standard output carries only the result, such as a run's folder or a table,
so that shell scripts can capture it.
"""

import argparse
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opd import distributed
from opd.console import quiet_libraries, say
from opd.errors import InputError, Interrupted, RunError, first_line

NAME_BYTES = 255  # the longest name of a file or folder that the usual file systems take


class Stop:
    """SIGINT, SIGTERM and SIGHUP ask for a stop at the next safe place; a second one stops at once."""

    def __init__(self) -> None:
        self.signum = 0
        self.when = 0.0

    def __enter__(self) -> None:
        kinds = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            kinds.append(signal.SIGHUP)
        self.previous = {s: signal.signal(s, self._receive) for s in kinds}

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: object) -> None:
        if self.signum:
            if distributed.world_size() > 1 and time.monotonic() - self.when < 5:
                return  # the same signal again, because a scheduler sends it to the launcher and to its processes
            raise KeyboardInterrupt
        self.signum, self.when = signum, time.monotonic()
        say(f"{signal.Signals(signum).name}: stopping after a checkpoint (again: at once)")

    def check(self, together: bool = False) -> None:
        """Raises Interrupted when a signal came. Several processes stop only where all of them call it `together`."""
        if distributed.world_size() > 1 and not together:
            return
        if signum := int(distributed.largest(self.signum)):
            raise Interrupted(signum)


def main(command: Callable[[list[str]], None]) -> None:
    """Runs a command on `sys.argv[1:]` and exits: 0 done, 2 wrong input, 128 + signal when stopped, 1 anything else."""
    try:
        _check_launcher()
        quiet_libraries()
        command(sys.argv[1:])
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # the first process of the machine mostly meets the same error and ends this one
        print(f"error: {error}", file=sys.stderr, flush=True)
        _exit(2)
    except RunError as error:
        print(f"error: {_who()}{error}", file=sys.stderr, flush=True)
        _exit(1)
    except Interrupted as stop:
        say(str(stop))
        _exit(128 + stop.signum)
    except KeyboardInterrupt:
        say("stopped by SIGINT")
        _exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of standard output has ended, as in `| head`, so nothing can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(1)
    except Exception as error:  # the one place where an unexpected error becomes a line that a user can read
        print(f"error: {_who()}{_unexpected(error)}", file=sys.stderr, flush=True)
        _exit(1)
    else:
        _exit(0)


def _who() -> str:
    """The beginning of a message that tells which of several processes speaks."""
    return f"process {os.environ.get('RANK', '0')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _check_launcher() -> None:
    """Refuses a launcher's variable that is no number, because every command reads some of them."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, "0")
        if not (text.isascii() and text.isdigit() and len(text) < 7):
            raise InputError(
                f"the environment variable {name} is {text[:80]!r}, expected the number that a launcher such as "
                "torchrun sets. Remove it to start a single process."
            )


def _unexpected(error: Exception) -> str:
    """One line about an exception that no code expected, with the path of a file that holds its traceback."""
    name = type(error).__name__
    what = f"{name}: {first_line(error)}" if str(error).strip() else name
    report = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="opd-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{sys.orig_argv}\n{report}")
    except OSError as refused:
        room = f"free some room in {tempfile.gettempdir()}"
        return f"{what}. Its traceback could not be written ({refused.strerror}); {room}."
    cause = "the system refused" if isinstance(error, OSError | MemoryError) else "the program did not expect this"
    return f"{what} ({cause}). The traceback is in {path}; files that were complete before stay as they are."


def _exit(code: int) -> None:
    """Ends the process. One of several ends without Python's shutdown, during which gloo's threads can abort it."""
    if distributed.world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def command_line() -> str:
    """The command line that started this process, as a user can type it again."""
    return shlex.join(["python", *sys.orig_argv[1:]])


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `InputError`s."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """As in the base class. It refuses bytes that are no text, because neither JSON nor a message can hold them."""
        for text in sys.argv[1:] if args is None else args:
            try:
                text.encode()  # bytes that are no UTF-8 are half characters in a Python string
            except UnicodeEncodeError:
                raise InputError(
                    f"argument {text[:80]!r} is not UTF-8 text. Type it again, or rename the file that it names."
                ) from None
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        short = message if len(message) <= 300 else f"{message[:300]}..."
        raise InputError(f"{short}. Usage: {' '.join(self.format_usage().split()[1:])}")


def path_argument(text: str) -> Path:
    """The type of arguments that are paths. It refuses a text that no file system takes as a path."""
    if fault := path_fault(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} {fault}")
    return Path(text)


def path_fault(text: str) -> str | None:
    """Why a text cannot be a path, as the end of a sentence; None when it can."""
    if not text:
        return "is empty, expected a path"
    if "\0" in text:
        return "holds a null byte, which no path can"
    if any(len(os.fsencode(part)) > NAME_BYTES for part in text.split("/")) or len(os.fsencode(text)) > 4000:
        return f"is too long for a path, expected names of at most {NAME_BYTES} bytes"
    return None


def number_argument(least: int) -> Callable[[str], int]:
    """The type of arguments that are whole numbers from `least` to 2^31 - 1. Every generator takes these as a seed."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 10 or not least <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"got {text[:80]!r}, expected a whole number from {least} to {2**31 - 1}")
        return int(text)

    return number


seed_argument = number_argument(0)


def address_of(text: str) -> tuple[str, int] | str:
    """(host, port) of a text HOST:PORT; the path of a Unix socket stays as it is. Raises InputError for other texts."""
    if text.startswith("/"):
        return text
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise InputError(
            f"{text[:80]!r} is no address of a vLLM server, expected HOST:PORT, for example 10.0.0.2:8500."
        )
    return host, int(port)


def parser(prog: str, description: str) -> Parser:
    """An argument parser with the two arguments that name a configuration."""
    cli = Parser(prog, description)
    cli.add_argument(
        "--config",
        required=True,
        type=path_argument,
        metavar="FILE",
        help="a pair file, for example configs/qwen3_8b_to_4b.json",
    )
    cli.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one key, for example --set optim.lr=1e-6; repeatable; a value is JSON, else a string",
    )
    return cli
