"""The commands of data: what `python -m data.NAME` takes."""

from pathlib import Path

from opd.arguments import Parser, number_argument, path_argument, seed_argument
from opd.entry import Command

NAMES = ("dapo_math_17k", "math500", "aime24", "aime25", "gsm8k", "deepplanning")
OUT = Path("data/prepared")


def _take_set(cli: Parser) -> None:
    cli.add_argument("name", choices=NAMES)
    cli.add_argument(
        "--source",
        type=path_argument,
        default="hub",
        help="hub (default), a file, or for gsm8k and deepplanning a folder",
    )
    cli.add_argument("--out", type=path_argument, default=OUT, metavar="DIR", help=f"default: {OUT}")
    cli.add_argument("--seed", type=seed_argument, default=42, metavar="N", help="default 42")
    cli.add_argument("--language", choices=("en", "zh"), default="en", help="of deepplanning's tasks (default: en)")


def _take_trips(cli: Parser) -> None:
    cli.add_argument("--out", type=path_argument, default=OUT, metavar="DIR", help=f"default: {OUT}")
    cli.add_argument("--trips", type=number_argument(5), default=20, metavar="N", help="default 20, at least 5")
    cli.add_argument("--seed", type=seed_argument, default=0, metavar="N", help="default 0")


def _take_evaluation(cli: Parser) -> None:
    cli.add_argument("file", type=path_argument, help="JSONL file of an evaluation")


def _take_files(cli: Parser) -> None:
    cli.add_argument("train", type=path_argument, help="JSONL file")
    cli.add_argument("evaluation", nargs="+", type=path_argument, help="JSONL files")
    cli.add_argument("--field", default="prompt", help="field with the problem (default: prompt)")
    cli.add_argument(
        "--out", type=path_argument, help="write every overlapping pair, with both texts, to this JSONL file"
    )


def _take_pair(cli: Parser) -> None:
    cli.add_argument("--task", choices=("chain", "addition", "planning"), default="chain", help="default: chain")
    cli.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the pair")
    cli.add_argument("--seed", type=seed_argument, default=0, metavar="N", help="default 0")


def _take_smollm2(cli: Parser) -> None:
    cli.add_argument("--gsm8k", default="hub", metavar="FOLDER|hub", help="folder with train.jsonl and test.jsonl")
    cli.add_argument("--out", type=path_argument, default=Path("outputs/smollm2"), metavar="DIR")


COMMANDS = {
    "prepare": Command(
        "data.prepare",
        "Makes training and evaluation files of one schema.",
        "python -m data.prepare math500",
        _take_set,
    ),
    "deepplanning.synthetic": Command(
        "data.deepplanning.synthetic",
        "Invents trips with known answers, in the form of DeepPlanning's.",
        "python -m data.deepplanning.synthetic --trips 20",
        _take_trips,
    ),
    "deepplanning.scores": Command(
        "data.deepplanning.scores",
        "Scores an evaluation on travel tasks by the benchmark and by the paper.",
        "python -m data.deepplanning.scores outputs/mine/eval/step_000100/deepplanning.jsonl",
        _take_evaluation,
    ),
    "contamination": Command(
        "data.contamination",
        "Counts the training problems that overlap evaluation problems.",
        "python -m data.contamination train.jsonl test.jsonl",
        _take_files,
    ),
    "tiny.build": Command(
        "data.tiny.build",
        "Trains an embedded pair.",
        "python -m data.tiny.build --out outputs/pair --task addition",
        _take_pair,
    ),
    "smollm2": Command(
        "data.smollm2",
        "Makes a teacher and a student from SmolLM2, for the demonstration.",
        "python -m data.smollm2 --out outputs/smollm2",
        _take_smollm2,
    ),
}
