"""The commands of data: what `python -m data.NAME` takes."""

import argparse
import re
from contextlib import suppress
from pathlib import Path

from opd.arguments import Parser, number_argument, path_argument, seed_argument, take_config
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
    cli.add_argument(
        "--split",
        type=_share,
        metavar="SHARE",
        help="share of the problems to train on, for example 0.8; the others are held out. dapo_math_17k and "
        "deepplanning: default 0.8",
    )
    cli.add_argument(
        "--split-seed", "--seed", type=seed_argument, default=42, metavar="N", dest="seed", help="default 42"
    )
    cli.add_argument("--language", choices=("en", "zh"), default="en", help="of deepplanning's tasks (default: en)")


def _share(text: str) -> float:
    if not re.fullmatch(r"0\.\d{1,9}", text) or not float(text):
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, expected a share between 0 and 1, for example 0.8")
    return float(text)


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
    cli.add_argument(
        "--task",
        choices=("chain", "addition", "planning", "planning_absolute", "hinted"),
        default="chain",
        help="default: chain",
    )
    cli.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the pair")
    cli.add_argument("--seed", type=seed_argument, default=0, metavar="N", help="default 0")


def _take_smollm2(cli: Parser) -> None:
    cli.add_argument(
        "--out", type=path_argument, default=Path("outputs/smollm2"), metavar="DIR", help="default: outputs/smollm2"
    )


def _rate(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"got {text[:80]!r}, expected a learning rate between 0 and 1, for example 1e-6")


def _take_grpo(cli: Parser) -> None:
    take_config(cli)
    cli.add_argument("--model", metavar="PATH", help="the model to start from; default: teacher.path")
    cli.add_argument("--out", type=path_argument, metavar="DIR", help="default: OUTPUT_DIR/RUN_NAME-grpo-teacher")
    cli.add_argument("--lr", type=_rate, default=1e-6, metavar="RATE", help="learning rate; default: 1e-6")
    cli.add_argument(
        "--steps", type=number_argument(1), metavar="N", help="updates; default: one pass over the problems"
    )
    cli.add_argument(
        "--micro-batch", type=number_argument(1), default=8, metavar="N", help="responses in one pass; default: 8"
    )
    cli.add_argument("--vllm", action="store_true", help="vLLM samples, beside the trainer on each GPU")
    cli.add_argument("--deepspeed", type=path_argument, metavar="FILE", help="a DeepSpeed file of transformers")


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
    "grpo_teacher": Command(
        "data.grpo_teacher",
        "Trains a teacher by GRPO, with TRL; scripts/train_teacher_grpo.sh starts it.",
        "python -m data.grpo_teacher --config configs/tiny.json --set rollout.n=8 --steps 100",
        _take_grpo,
    ),
    "smollm2": Command(
        "data.smollm2",
        "Makes a teacher and a misled student from SmolLM2, on word problems.",
        "python -m data.smollm2 --out outputs/smollm2",
        _take_smollm2,
    ),
}
