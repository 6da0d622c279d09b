"""Token importance in on-policy distillation: which response tokens count. Plugs into opd's patch point."""

from opd.entry import answer_help
from tip.commands import COMMANDS

answer_help(COMMANDS)  # of `python -m tip.NAME --help`, before the imports of that module, which take seconds
