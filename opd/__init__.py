"""On-policy distillation of language models. Read step.py, then loss.py, then hooks.py."""

from opd.commands import COMMANDS
from opd.entry import answer_help

answer_help(COMMANDS)  # of `python -m opd.NAME --help`, before the imports of that module, which take seconds
