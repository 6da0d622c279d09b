from data.commands import COMMANDS
from opd.entry import answer_help

answer_help(COMMANDS)  # of `python -m data.NAME --help`, before the imports of that module, which take seconds
