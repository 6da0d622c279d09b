"""Work in a forked child: it need not import anything again, and its memory, its crash and its time are its own."""

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def in_child(work: Callable[[], Any], seconds: float = 86_400.0) -> dict[str, Any]:
    """Runs `work` in a child: {"value": its result}, or {"error": the reason why there is none}.

    The result travels as JSON. A parent that forks must not have started CUDA or threads of arithmetic.
    """
    sys.stdout.flush(), sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # so that what it starts can be ended with it
        os.close(reading)
        _answer(work, writing)
    os.close(writing)
    text = None
    try:
        with open(reading) as pipe:
            text = _read(pipe, seconds)
    finally:
        if text is None:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if text is None:
        return {"error": f"it did not end within {seconds:.0f} s"}
    return json.loads(text) if text else {"error": f"its process ended with exit code {code}"}


def _answer(work: Callable[[], Any], writing: int) -> None:
    """Writes the result of the work, or its last error, and ends the process."""
    try:
        answer = {"value": work()}
    except BaseException as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    with open(writing, "w") as pipe:
        json.dump(answer, pipe)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def _read(pipe: Any, seconds: float) -> str | None:
    """All that comes through the pipe; None when it is still open after so many seconds."""
    end, parts = time.monotonic() + seconds, []
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        part = os.read(pipe.fileno(), 2**16)
        if not part:
            return b"".join(parts).decode()
        parts.append(part)
