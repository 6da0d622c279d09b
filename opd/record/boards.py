"""The boards on which the metrics of a run are looked at: TensorBoard, and Weights & Biases.

metrics.jsonl is the truth. A board has the same names and numbers, and histograms and texts beside them.
"""

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from opd.cli import say
from opd.config import Config
from opd.errors import InputError, RunError, first_line
from opd.files import write_whole
from opd.record import Board
from opd.record.metrics import read_metrics

WITHOUT = 'set WANDB_MODE=offline, which sends nothing, or take wandb out: --set log.to=["tensorboard"]'


def check_boards(config: Config) -> None:
    """Refuses a board that cannot be used, before anything is written. Raises InputError."""
    if "wandb" not in config.log.to:
        return
    os.environ.setdefault(
        "WANDB_ERROR_REPORTING", "false"
    )  # wandb would report faults and usage, with or without a login
    try:
        from wandb import login, setup  # slow to import, and only needed here
    except ImportError:
        raise InputError(
            "log.to names wandb, which is not installed. Install it with pip install wandb, or take it out: "
            '--set log.to=["tensorboard"]'
        ) from None
    try:
        if setup().settings.mode == "online":
            login()
    except Exception as error:  # no key, a wrong one, no network, a wrong WANDB_MODE: wandb has many kinds
        raise InputError(
            f"log.to names wandb, which cannot log in ({first_line(error)}). Run wandb login, {WITHOUT}."
        ) from None


def open_boards(config: Config, settings: Mapping[str, Any], last_step: int) -> list[Board]:
    """The boards that log.to names, without what they hold of updates after `last_step`, which are made again.

    `settings` is the configuration that the run records. Raises RunError where a board does not open.
    """
    kinds = {"tensorboard": lambda: TensorBoard(config, last_step), "wandb": lambda: Wandb(config, settings, last_step)}
    return [kinds[name]() for name in config.log.to]


class TensorBoard:
    """Implements Board. Its files lie in RUN/tensorboard."""

    def __init__(self, config: Config, last_step: int):
        self.writer = SummaryWriter(config.run_dir / "tensorboard", purge_step=last_step + 1)

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        for name, number in metrics.items():
            self.writer.add_scalar(name, number, step)

    def text(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(name, text, step)

    def histogram(self, name: str, column: Tensor, step: int) -> None:
        self.writer.add_histogram(name, column, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Implements Board. Its files lie in RUN/wandb, and a run that continues continues the same run of wandb.

    A process that was killed may have lost its last seconds, so a run that continues writes its metrics again. Where
    wandb has a step already, it leaves the same numbers out.
    """

    def __init__(self, config: Config, settings: Mapping[str, Any], last_step: int):
        import wandb  # slow to import, and only needed here

        self.table, self.bins = wandb.Table, wandb.Histogram
        (config.run_dir / "wandb").mkdir(exist_ok=True)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "opd"),
                dir=config.run_dir,
                id=run_id(config.run_dir / "wandb" / "run_id"),
                name=config.run_name,
                config=dict(settings),
                resume="allow",
                allow_val_change=True,
                settings=wandb.Settings(console="off", disable_code=True, disable_git=True, silent=True),
            )
        except Exception as error:  # as in check_boards
            raise RunError(
                f"wandb does not start ({first_line(error)}). Start the same command again, {WITHOUT}."
            ) from None
        say(f"wandb: {self.run.url or f'offline, in {self.run.dir}'}")
        for row in read_metrics(config.run_dir) if last_step else ():
            self.scalars(row, row.pop("step"))

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self.run.log({name: self.table(columns=["text"], data=[[text]])}, step=step)

    def histogram(self, name: str, column: Tensor, step: int) -> None:
        self.run.log({name: self.bins(column.numpy())}, step=step)

    def close(self) -> None:
        self.run.finish()


def run_id(path: Path) -> str:
    """The id that wandb knows a run by. It is drawn once and kept in the run's folder."""
    text = path.read_text(errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch("[0-9a-f]{16}", text):
        text = secrets.token_hex(8)
        write_whole(path, text + "\n")
    return text
