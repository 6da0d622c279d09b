"""The commands of opd: what `opd NAME` and `python -m opd.NAME` take."""

from opd.arguments import Parser, number_argument, path_argument, take_config
from opd.entry import Command, enter

PAIR = "configs/qwen3_8b_to_4b.json"


def take_training(cli: Parser) -> None:
    """Adds the arguments that all training commands share."""
    take_config(cli)
    cli.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|DIR",
        help="auto: continue an existing run of the same config; none: refuse one; DIR: from that checkpoint",
    )
    cli.add_argument("--dry-run", action="store_true", help="check everything, print plan and config; start nothing")
    cli.add_argument("--verbose", action="store_true", help="print the resolved configuration before the run")


def _take_evaluation(cli: Parser) -> None:
    take_config(cli)
    cli.add_argument("--model", required=True, type=path_argument, metavar="DIR", help="checkpoint folder or hub name")
    cli.add_argument("--benchmark", action="append", metavar="NAME", help="instead of the config's; repeatable")
    cli.add_argument("--limit", type=number_argument(1), metavar="N", help="only the first N problems of each")
    cli.add_argument("--out", type=path_argument, metavar="DIR", help="default: OUTPUT_DIR/eval/<the model's name>")


def _take_two_runs(cli: Parser) -> None:
    cli.add_argument("a", type=path_argument, metavar="RUN")
    cli.add_argument("b", type=path_argument, metavar="RUN")


def _take_merge(cli: Parser) -> None:
    cli.add_argument("run", type=path_argument, metavar="RUN", help="a run with student.lora, or a checkpoint of one")
    cli.add_argument("--out", required=True, type=path_argument, metavar="DIR", help="a new folder for the plain model")


def _take_address(cli: Parser, key: str) -> None:
    cli.add_argument("--listen", required=True, metavar="HOST:PORT", help=f"where trainers connect ({key})")


def _take_teacher_server(cli: Parser) -> None:
    take_config(cli)
    _take_address(cli, "teacher.servers")


def _take_server(cli: Parser) -> None:
    _take_address(cli, "rollout.servers")
    cli.add_argument(
        "--child-of",
        type=number_argument(1),
        metavar="PID",
        help="end after one trainer, or with that process; the server itself uses it",
    )


def _take_key(cli: Parser) -> None:
    cli.add_argument("key", nargs="?", metavar="KEY", help="a section or a key, such as optim.lr; none: all")


COMMANDS = {
    "train": Command(
        "opd.train",
        "On-policy distillation on every response token.",
        f"python -m opd.train --config {PAIR} --set run_name=all",
        take_training,
    ),
    "evaluate": Command(
        "opd.evaluate",
        "Evaluate one model on a config's benchmarks.",
        f"python -m opd.evaluate --config {PAIR} --model Qwen/Qwen3-4B --limit 50",
        _take_evaluation,
    ),
    "compare": Command(
        "opd.compare",
        "Is one run better than another on the same problems? B minus A.",
        "python -m opd.compare outputs/all outputs/half",
        _take_two_runs,
    ),
    "merge": Command(
        "opd.merge",
        "Merges the adapters of a student into a plain checkpoint.",
        "python -m opd.merge outputs/adapted --out outputs/merged",
        _take_merge,
    ),
    "launch": Command(
        "opd.launch",
        "Starts a command on all GPUs; its module comes first, for example opd.train.",
        f"python -m opd.launch opd.train --config {PAIR}",
        take_config,
    ),
    "doctor": Command(
        "opd.doctor",
        "Checks a configuration and this machine before a run.",
        f"python -m opd.doctor --config {PAIR}",
        take_config,
    ),
    "vllm-server": Command(
        "opd.vllm_server",
        "Generates for trainers, with vLLM.",
        "OPD_VLLM_KEY=SECRET python -m opd.vllm_server --listen 0.0.0.0:8500",
        _take_server,
    ),
    "teacher-server": Command(
        "opd.teacher_server",
        "Holds a teacher and sends its hidden states to trainers.",
        f"OPD_TEACHER_KEY=SECRET python -m opd.teacher_server --config {PAIR} --listen 0.0.0.0:8600",
        _take_teacher_server,
    ),
    "config": Command(
        "opd.keys",
        "Explains the keys of a pair file.",
        "python -m opd.keys rollout.truncated",
        _take_key,
    ),
}


def run() -> None:
    """The entry point `opd`."""
    enter("opd", "On-policy distillation of language models.", COMMANDS)
