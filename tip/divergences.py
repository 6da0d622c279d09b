"""The divergences of student and teacher that can be the axis d of a token (tip.axis), and what they are called."""

import math
from dataclasses import dataclass

from torch import Tensor

from opd.hooks import TokenStats

AXIS = "tip.axis"  # in the needs of a rule it stands for the field of TokenStats that tip.axis names


@dataclass(frozen=True)
class Divergence:
    """A field of TokenStats that measures how far student and teacher are apart."""

    title: str
    formula: str
    unit: str  # empty: a share
    largest: float | None  # None: it has no bound

    def shown(self, number: float) -> str:
        """A value of it with its unit, to three digits."""
        return f"{number:.3f} {self.unit}".rstrip()


DIVERGENCES = {
    "reverse_kl": Divergence("reverse KL", "KL(student || teacher)", "nats", None),
    "forward_kl": Divergence("forward KL", "KL(teacher || student)", "nats", None),
    "jsd": Divergence("JSD", "JSD(student, teacher)", "nats", math.log(2)),  # for every beta; it is reached at 0.5
    "total_variation": Divergence("total variation", "1/2 sum |student - teacher|", "", 1.0),
}


def fields_of(needs: frozenset[str], axis: str) -> frozenset[str]:
    """The needs of a rule with AXIS replaced by the field that it stands for."""
    return frozenset(axis if name == AXIS else name for name in needs)


def divergence_of(stats: TokenStats, axis: str) -> Tensor:
    """The divergence that is the axis, (N,), neither clipped nor mapped."""
    return vars(stats)[axis]
