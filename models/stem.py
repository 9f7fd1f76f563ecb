"""The first layers of a network as a local map: what a change of a few pixels can reach, and what it leaves as it was."""
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stem:
    """A network as rest(layers(pad(x))), pad with `padding` zeros on each side, where one place of the map sees few pixels.

    Place (i, j) of layers(z) is a function of the pixels z[stride i : stride i + reach, stride j : stride j + reach] alone, the same for
    every place, so that layers can be applied to a part of an image. A network offers it as its property `stem`.
    """
    layers: Callable[[Tensor], Tensor]  # [B, C, H', W'] -> [B, K, (H' - reach) // stride + 1, (W' - reach) // stride + 1]
    rest: Callable[[Tensor], Tensor]    # that map of a whole image -> logits; leaves its argument as it is
    reach: int
    stride: int
    padding: int
