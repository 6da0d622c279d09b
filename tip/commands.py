"""The commands of tip: what `tip NAME` and `python -m tip.NAME` take."""

from opd.arguments import Parser, number_argument, path_argument, seed_argument, take_config
from opd.commands import take_training
from opd.entry import Command, enter

SMALL_STUDENT = 2_000_000  # parameters up to which an analysis takes single-token gradients by default


def _take_analysis(cli: Parser) -> None:
    take_config(cli)
    cli.add_argument(
        "--prompts", type=number_argument(1), default=64, metavar="N", help="prompts answered and scored (64)"
    )
    cli.add_argument(
        "--oracle-tokens",
        type=number_argument(0),
        metavar="N",
        help=f"tokens whose own gradient is taken (1024 up to {SMALL_STUDENT:,} student parameters, else 0)",
    )
    cli.add_argument(
        "--teacher-topk",
        type=_numbers,
        default=(),
        metavar="8,32",
        help="also: what is left if the teacher shows so many of its likeliest ids, or only the sampled token",
    )
    cli.add_argument("--out", type=path_argument, metavar="DIR", help="default: output_dir/<run_name>-analysis")


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, each once, the smallest first."""
    return tuple(sorted(set(map(number_argument(1), text.split(",")))))


def _take_table(cli: Parser) -> None:
    take_config(cli)
    which = cli.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", metavar="N", help="3, 4, 5, 6, 7, 8, main, axis or another file of configs/tables")
    which.add_argument("--figure", metavar="N", help="1, 3 or 4")
    cli.add_argument("--seeds", default="0", metavar="0,1,2", help="default 0")
    cli.add_argument(
        "--jobs",
        type=number_argument(1),
        default=1,
        metavar="N",
        help="seeds (or arms) at a time, in processes of their own",
    )
    cli.add_argument(
        "--rates", metavar="A,B,C", help="every arm at each of these learning rates, for example 1e-4,3e-4,1e-3"
    )
    cli.add_argument("--arms", metavar="A,B", help="only these arms, by the labels of --dry-run, and the baselines")
    cli.add_argument("--dry-run", action="store_true", help="print arms, and plan of the first; start nothing")
    cli.add_argument("--verbose", action="store_true", help="print the resolved configuration of each run before it")
    cli.add_argument(
        "--only-seed", type=seed_argument, metavar="N", help="run this seed's arms here and write no table"
    )
    cli.add_argument("--only-arm", metavar="A", help="with --only-seed: this arm of it alone")


def _take_runs(cli: Parser) -> None:
    cli.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="run folder")


def _take_report(cli: Parser) -> None:
    _take_runs(cli)
    cli.add_argument(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="also write table.md, .csv, .json, figures, report.html and the token map there",
    )
    cli.add_argument("--example", action="store_true", help="also one problem's responses before and after")


def _take_tokens(cli: Parser) -> None:
    _take_runs(cli)
    cli.add_argument("--out", required=True, type=path_argument, metavar="FILE", help="the page, tokens.html")
    cli.add_argument(
        "--rollouts", type=number_argument(1), metavar="N", help="only the first N dumped rollouts of each update"
    )


COMMANDS = {
    "train": Command(
        "tip.train",
        "On-policy distillation on selected tokens.",
        "python -m tip.train --config configs/tiny.json --set tip.rule=soft_or --set tip.retention=0.5",
        take_training,
    ),
    "analyze": Command(
        "tip.analyze",
        "Compares all rules on the same tokens, without training.",
        "python -m tip.analyze --config configs/tiny.json --prompts 64",
        _take_analysis,
    ),
    "reproduce": Command(
        "tip.reproduce",
        "Runs the arms of a table of the paper over seeds, then writes the table.",
        "python -m tip.reproduce --table 5 --config configs/tiny.json --seeds 0,1,2 --jobs 2",
        _take_table,
    ),
    "report": Command(
        "tip.report",
        "One table of finished runs.",
        "python -m tip.report outputs/all outputs/half --out outputs/report",
        _take_report,
    ),
    "tokens": Command(
        "tip.tokens",
        "Writes a page that shows which tokens count, from the token dumps of runs.",
        "python -m tip.tokens outputs/half --out tokens.html",
        _take_tokens,
    ),
}


def run() -> None:
    """The entry point `tip`."""
    enter("tip", "Token importance in on-policy distillation: which response tokens count.", COMMANDS)
