"""What attacks and proofs find about points, as the store takes it."""
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """What is known of each of B points, by norm where norms differ.

    pred [B]: predicted class; distance [B]: the smallest, 0 where misclassified, inf where nothing was found;
    x_adv [B, ...]: the adversarial example there, the clean point in both of those cases; margin [B]: at it,
    float64; winner [B]: which attack found it, -1 for none or unknown.
    """

    pred: Tensor
    clean_margin: Tensor
    distance: dict[str, Tensor]
    x_adv: dict[str, Tensor]
    margin: dict[str, Tensor]
    winner: dict[str, Tensor]


@dataclass(frozen=True)
class Exact:
    """The bracket of one point's distance, and the x_adv that proves its upper end; None where misclassified.

    `status` is "exact" where upper / lower <= 1 + rel_gap, "open" where time ran out, and "misclassified"
    with distance 0. The margin at x_adv is 0 up to the solver's tolerance.
    """

    lower: float
    upper: float
    status: str
    x_adv: np.ndarray | None
    rounds: int
