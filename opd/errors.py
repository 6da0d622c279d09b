"""The three ways in which a command ends early, each with its own exit code (opd.cli.main)."""

import signal


class InputError(Exception):
    """The user's input is wrong; exit code 2. The text says what, what was got, what was expected and what to do."""


class RunError(Exception):
    """The run cannot go on although its configuration is right; exit code 1."""


class Interrupted(Exception):
    """A signal asked the run to stop and the work is safely on disk; exit code 128 + `signum`."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def first_line(error: BaseException) -> str:
    """The first line of an exception's text: at most 300 characters that any terminal can show."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return text.encode("utf-8", "backslashreplace").decode()
