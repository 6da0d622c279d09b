"""The token map: a page that shows which tokens of a run's responses count, and why.

    python -m tip.tokens RUN [RUN ...] --out tokens.html [--rollouts N]

The page is one file and needs no network. It reads the token dumps that runs of tip.train wrote (log.token_dump_every).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from opd.cli import Parser, main, number_argument, path_argument, say
from opd.errors import InputError
from opd.files import amount, check, refuse_device, step_number, write_whole
from opd.record import dump
from opd.record.metrics import read_metrics
from tip.results.token_map import Packer

LARGE = 300 * 2**20  # bytes of a page that browsers open slowly


class Marked(TypedDict):
    """The columns of tip that the page needs; `keep/<rule>@<retention>` stand beside them."""

    quadrant: list[int]
    score: list[float]


def dumped_updates(run_dir: Path) -> list[Path]:
    """The token dumps of a run, the earliest first."""
    paths = (path for path in (run_dir / "tokens").glob("step_*.jsonl") if step_number(path) is not None)
    return sorted(paths, key=step_number)


def page_of(runs: Mapping[str, Path], title: str, rollouts: int | None = None) -> str:
    """The page of some runs, by the names that it gives them.

    Args:
        rollouts: of each update only the first so many; None shows all.
    Raises:
        InputError: a run has no token dump, or one that cannot be read or lacks the columns of tip.
    """
    packer = Packer()
    for name, folder in runs.items():
        paths = dumped_updates(folder)
        if not paths:
            raise InputError(
                f"{folder}: no token dumps in it. Train with tip.train and log.token_dump_every above 0, for example "
                "--set log.token_dump_every=10."
            )
        packer.add(name, ((step_number(path), _rows(path, rollouts)) for path in paths), _thresholds(folder))
    return packer.page(title)


def _rows(path: Path, rollouts: int | None) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(islice(dump.rows(path), rollouts), 1):
        if "quadrant" not in row:
            raise InputError(
                f"{path}: no quadrants in it, because opd.train wrote it. Train with tip.train, which does the same "
                "with --set tip.rule=all."
            )
        where = f"{path}, rollout {number}"
        check(row, Marked, where, "a token dump of tip.train")
        for name, column in row.items():
            if name.startswith("keep/"):
                check(column, list[int], f"{where}: {name[:80]}", "a token dump of tip.train")
        yield row


def _thresholds(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Number of an update -> the thresholds of its quadrants, where they were logged."""
    names = ("tip/threshold_entropy", "tip/threshold_divergence")
    return {int(row["step"]): tuple(row[n] for n in names) for row in read_metrics(run_dir) if row.keys() >= set(names)}


def names_of(folders: Sequence[Path]) -> dict[str, Path]:
    """The runs by the shortest ends of their paths that tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = {"/".join(folder.parts[-parts:]): folder for folder in folders}
        if len(names) == len(folders):
            return names
    raise InputError("the same run folder is given twice. Give each once.")


def command(arguments: list[str]) -> None:
    cli = Parser("python -m tip.tokens", "Writes a page that shows which tokens count, from the token dumps of runs.")
    cli.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="run folder")
    cli.add_argument("--out", required=True, type=path_argument, metavar="FILE", help="the page, tokens.html")
    cli.add_argument(
        "--rollouts", type=number_argument(1), metavar="N", help="only the first N dumped rollouts of each update"
    )
    options = cli.parse_args(arguments)
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
