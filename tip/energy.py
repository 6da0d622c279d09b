"""How much of the loss's gradient each quadrant holds, and whether the loss sees confident mistakes at all.

The gradient of KL(P_S || P_T) in the student's logits is p (log p/q - KL). Where the student is sure it is nearly 0,
however large the divergence is. The gradient of KL(P_T || P_S) is p - q, which is largest there. The energy of a token
is the squared L2 norm of the gradient of its loss.

Shapes: N tokens of the update.
"""

from torch import Tensor

from opd.hooks import TokenStats
from tip import taxonomy
from tip.taxonomy import Quadrants

FIELDS = {"reverse_kl": "reverse_kl_energy", "forward_kl": "forward_kl_energy"}  # loss.divergence -> its energy
MOST = 0.5  # share of the divergence from which on Q3 is what there is to learn
UNSEEN = (
    0.01  # share of the energy: a student that learnt nothing had 0.4 %, and the embedded one has 1.2 % as it learns
)


def needs(divergence: str) -> frozenset[str]:
    """The fields of TokenStats that `of_loss` reads; none for a divergence whose energy no field holds."""
    return frozenset(FIELDS.values()) if divergence in FIELDS else frozenset()


def of_loss(stats: TokenStats, forward_share_N: Tensor | None, divergence: str) -> Tensor:
    """The energy of each token, (N,) float64, whatever its weight: no selection makes up for a gradient of 0.

    With a share f of forward KL it is (1 - f)^2 E + f^2 E_forward. The product of the two gradients is left out,
    because no field holds it.
    """
    energy_N = vars(stats)[FIELDS[divergence]].double()
    if forward_share_N is None:
        return energy_N
    f_N = forward_share_N.double()
    return (1 - f_N).square() * energy_N + f_N.square() * stats.forward_kl_energy.double()


def describe(energy_N: Tensor, quadrants: Quadrants) -> dict[str, float]:
    """The share of each quadrant in the sum of energy."""
    return {f"tip/energy_q{q}": taxonomy.covered(energy_N, quadrants.quadrant == q) for q in (1, 2, 3, 4)}


def warnings(energy_N: Tensor, d_N: Tensor, quadrants: Quadrants) -> dict[str, str]:
    """Kind -> message, where Q3 holds most of the divergence `d_N` and next to none of the energy.

    It tells of this update alone. The embedded students begin like that, and reverse KL does get them out in time.
    """
    mass, energy = (taxonomy.covered(column_N, quadrants.quadrant == 3) for column_N in (d_N, energy_N))
    if mass < MOST or energy >= UNSEEN:
        return {}
    return {
        "unseen_mistakes": f"confident mistakes (Q3) hold {100 * mass:.0f} % of the divergence and "
        f"{100 * energy:.1f} % of the energy of the loss's gradient, so the student learns them slowly or not at all, "
        "whichever tokens are kept. Set tip.mixture=total_variation, or loss.divergence=forward_kl."
    }
