"""What arguments of commands can be: paths, whole numbers, addresses, and the two that name a configuration.

Nothing here imports torch, so `--help` answers at once.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opd.errors import InputError

NAME_BYTES = 255  # the longest name of a file or folder that the usual file systems take


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `InputError`s."""

    def __init__(self, prog: str, description: str, example: str):
        form, epilog = argparse.RawDescriptionHelpFormatter, f"example:\n  {example}"
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=form, allow_abbrev=False)

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
        raise InputError(f"{text[:80]!r} is no address of a server, expected HOST:PORT, for example 10.0.0.2:8500.")
    return host, int(port)


def take_config(cli: Parser) -> None:
    """Adds the two arguments that name a configuration."""
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
