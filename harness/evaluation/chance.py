"""Networks at chance: no better than a guess that does not look at the image."""
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from harness.evaluation.metrics import Z95

SOON = 3  # the fewest epochs at chance without a break that are called a collapse


def at_chance(hits: Sequence[float], counts: Sequence[float]) -> bool:
    """Whether hits[k] correct ones of counts[k] examples of class k, [K] each, are no measurable accuracy.

        mean_k hits_k / counts_k  <=  1/K + 1.96 sqrt( mean_k p (1 - p) / counts_k / K ),    p = 1/K

    over the K classes that have examples. Predictions that do not depend on the image have a mean of 1/K
    whatever they are, and however unequal the classes; the second term is 1.96 standard errors of predictions
    that are uniform. With one class there is no chance level: False.
    """
    pairs = [(hit, count) for hit, count in zip(hits, counts) if count]
    if len(pairs) < 2:
        return False
    chance = 1 / len(pairs)
    accuracy = sum(hit / count for hit, count in pairs) / len(pairs)
    variance = sum(chance * (1 - chance) / count for _, count in pairs) / len(pairs) ** 2
    return accuracy < 1 and accuracy <= chance + Z95 * math.sqrt(variance)


def metrics_at_chance(confusions: dict[str, list[list[int]]]) -> list[str]:
    """The metrics whose confusion matrix (rows: true class) is at chance."""
    return [metric for metric, rows in confusions.items()
            if at_chance([row[k] for k, row in enumerate(rows)], [sum(row) for row in rows])]


class ClassCounts:
    """Correct examples and all examples of each class, accumulated on the device without synchronising."""

    def __init__(self, num_classes: int, device: torch.device):
        self.counts = torch.zeros(2, num_classes, dtype=torch.int64, device=device)

    def add(self, correct: Tensor, y: Tensor) -> None:
        """Add a batch: correct [B] bool, y [B]."""
        self.counts.index_add_(1, y, torch.stack([correct, torch.ones_like(correct)]).long())

    def at_chance(self, reduce=lambda values: values) -> bool:
        """`at_chance` of all that was added, after `reduce` has summed over the processes."""
        return at_chance(*reduce(self.counts.clone()).tolist())


def collapsed_since(at_chance_for: Sequence[int], epochs: int, warmup_epochs: float = 0,
                    ended: bool = False) -> int | None:
    """The epoch since which a run of `epochs` epochs has collapsed; None while it has not.

    at_chance_for: of each epoch so far, how many epochs up to it were at chance without a break. A run has
    collapsed once it has been at chance for a tenth of its epochs after having been above, or for half of
    them without ever having been above, since some networks learn late; for SOON epochs at least, and not
    before the learning rate's warm-up is over. At the end of a run SOON epochs are enough.
    """
    done, streak = len(at_chance_for), at_chance_for[-1] if at_chance_for else 0
    if ended:
        return done - streak + 1 if streak >= SOON else None
    patience = max(SOON, epochs // 10 if 0 in at_chance_for else epochs // 2)
    return done - streak + 1 if min(streak, done - warmup_epochs) >= patience else None
