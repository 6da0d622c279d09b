"""The folder of a run. `identity.py` says whether two runs are the same; `folder.py` where a run continues and how it
ended. `record.py` writes each update with `metrics.py` and `dump.py`. `boards.py` shows the metrics while it runs.
`checkpoint.py` saves what a run continues from.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Board(Protocol):
    """Shows the metrics of a run. Only the first process has one. A step is the number of an update."""

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        """Shows numbers by name."""

    def text(self, name: str, text: str, step: int) -> None:
        """Shows a text as it is. A model may have written it, so no part of it is taken for HTML."""

    def histogram(self, name: str, column: Tensor, step: int) -> None:
        """Shows how the numbers of a column are distributed."""

    def close(self) -> None:
        """Writes what is left, and takes nothing more."""
