"""On-policy distillation with token selection: builds TipWeighter and hands it to opd.

python -m tip.train --config configs/tiny.json --set tip.rule=soft_or --set tip.retention=0.5
"""

from opd.cli import main
from opd.config import load_config
from opd.train import start
from tip.commands import COMMANDS
from tip.config import SECTIONS, check_rollouts
from tip.diagnostics import TipObserver
from tip.frozen import with_frozen_pair
from tip.weighter import TipWeighter


def command(arguments: list[str]) -> None:
    options = COMMANDS["train"].parser().parse_args(arguments)
    config, sections = load_config(options.config, options.overrides, SECTIONS)
    check_rollouts(sections["tip"], config)
    weighter = TipWeighter(sections["tip"])
    config = with_frozen_pair(config, sections["tip"])
    start(config, weighter, sections, options, TipObserver(weighter, config.loss.divergence))


if __name__ == "__main__":
    main(command)
