"""The common parts of all commands: exit codes and the last message. Their arguments are in opd.arguments.

Messages and progress go to standard error. Standard output carries only the result, such as a run's folder or a table,
so that shell scripts can capture it.
"""

import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

from opd.console import quiet_libraries, say
from opd.errors import InputError, Interrupted, RunError, first_line


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
    distributed = sys.modules.get("opd.distributed")  # which a command of one process need not import
    if distributed is not None and distributed.world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def command_line() -> str:
    """The command line that started this process, as a user can type it again."""
    return shlex.join(["python", *sys.orig_argv[1:]])
