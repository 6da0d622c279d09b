"""The token map: a page that shows which tokens of a run's responses count, and why.

    python -m tip.tokens RUN [RUN ...] --out tokens.html [--rollouts N]

The page is one file and needs no network. It reads the token dumps that runs of tip.train wrote (log.token_dump_every).
"""

from collections.abc import Sequence
from pathlib import Path

from opd.cli import main, say
from opd.errors import InputError
from opd.files import amount, refuse_device, write_whole
from tip.commands import COMMANDS
from tip.results.token_map import page_of

LARGE = 300 * 2**20  # bytes of a page that browsers open slowly


def names_of(folders: Sequence[Path]) -> dict[str, Path]:
    """The runs by the shortest ends of their paths that tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = {"/".join(folder.parts[-parts:]): folder for folder in folders}
        if len(names) == len(folders):
            return names
    raise InputError("the same run folder is given twice. Give each once.")


def command(arguments: list[str]) -> None:
    options = COMMANDS["tokens"].parser().parse_args(arguments)
    refuse_device(options.out, "a page to write")
    names = names_of([folder.absolute() for folder in options.runs])
    page = page_of(names, f"Token map of {', '.join(names)}", options.rollouts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, page)
    size = len(page.encode())
    if size > LARGE:
        say(f"warning: the page has {amount(size)}, which browsers open slowly. Show fewer rollouts: --rollouts N.")
    print(options.out)


if __name__ == "__main__":
    main(command)
