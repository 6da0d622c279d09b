"""Entry points. A command is described before anything heavy is imported, so `--help` is fast."""

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opd.arguments import Parser
from opd.cli import main
from opd.errors import InputError

HELP = {"-h", "--help"}


@dataclass(frozen=True)
class Command:
    """A command, which is the function `command` of a module."""

    module: str
    summary: str
    example: str
    take_arguments: Callable[[Parser], None]

    def parser(self) -> Parser:
        parser = Parser(f"python -m {self.module}", self.summary, self.example)
        self.take_arguments(parser)
        return parser


def answer_help(commands: Mapping[str, Command]) -> None:
    """Answers `python -m MODULE --help` for these commands, and exits.

    A package calls it while Python looks for the module in it, because the module's own imports take seconds. It does
    nothing for any other command line.
    """
    if sys.argv[0] != "-m" or not HELP & set(sys.argv[1:]):
        return
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    for command in commands.values():
        if command.module == module:
            command.parser().print_help()
            sys.exit(0)


def enter(program: str, about: str, commands: Mapping[str, Command]) -> None:
    """Runs the command that `sys.argv[1]` names, with the rest as its arguments."""

    def command(arguments: list[str]) -> None:
        if not arguments or arguments[0] in HELP:
            width = max(map(len, commands))
            lines = [f"  {name:{width}}  {command.summary}" for name, command in commands.items()]
            print("\n".join([f"usage: {program} COMMAND [...]", "", about, "", *lines, ""]))
            print(f"{program} COMMAND --help shows the arguments of a command and an example.")
            return
        name, *rest = arguments
        if name not in commands:
            near = difflib.get_close_matches(name, commands, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise InputError(f"{program} has no command {name[:80]!r}, expected one of {', '.join(commands)}{hint}")
        if HELP & set(rest):
            commands[name].parser().print_help()
        else:
            os.execv(sys.executable, [sys.executable, "-m", commands[name].module, *rest])

    main(command)
