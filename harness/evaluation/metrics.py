"""Accuracies with their intervals, and the averages of a training epoch."""
import math

import torch
from torch import Tensor

Z95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal distribution
WEIGHT_EDGES = tuple(10 ** (k / 10 - 4) for k in range(61))  # of 60 bins of weights, ten a decade from 1e-4


class Means:
    """Averages over an epoch, accumulated on the device without synchronising."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, **values: Tensor) -> None:
        """Add one value per example, [B] each."""
        self.count += len(next(iter(values.values())))
        for name, value in values.items():
            total = value.detach().float().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def compute(self, reduce=lambda values: values) -> dict[str, float]:
        """The means, after `reduce` has summed [*sums, count] over the processes."""
        if not self.sums:
            return {}
        sums = list(self.sums.values())
        count = torch.tensor(float(self.count), device=sums[0].device)
        *sums, count = reduce(torch.stack([*sums, count])).tolist()
        return {name: value / count for name, value in zip(self.sums, sums)}


class WeightStatistics:
    """How an epoch's weights are spread over classes and values; on the device, without synchronising.

    Bin k of the histogram takes WEIGHT_EDGES[k] <= w < WEIGHT_EDGES[k + 1]; what is smaller, zero included,
    goes into the first bin, what is larger into the last.
    """

    def __init__(self, num_classes: int, device: torch.device):
        self.num_classes = num_classes
        self.num_bins = len(WEIGHT_EDGES) - 1
        self.inner_edges = torch.tensor(WEIGHT_EDGES[1:-1], device=device)
        self.totals = torch.zeros(2 * num_classes + self.num_bins, device=device)  # class sums, counts, bins

    def add(self, weights: Tensor, y: Tensor) -> None:
        """Add the weights [B] of examples with labels y [B]."""
        weights = weights.detach().float()
        bins = torch.bucketize(weights, self.inner_edges, right=True)
        places = torch.cat([y, self.num_classes + y, 2 * self.num_classes + bins])
        self.totals.index_add_(0, places, torch.cat([weights, torch.ones_like(weights).repeat(2)]))

    def compute(self, reduce=lambda values: values) -> dict[str, float | None]:
        """One flat row, after `reduce` has summed one tensor over the processes; empty if nothing was added.

        `class_k` is the mean weight of class k, None without examples; `share_k` the part of class k in the
        sum of all weights, in percent, None where that sum is 0 or infinite (the class-weight distribution of
        VIR, Fig. 3); both to six digits. `bin_k` is the number of weights in bin k.
        """
        values = reduce(self.totals.clone()).tolist()
        sums = values[:self.num_classes]
        counts = values[self.num_classes:-self.num_bins]
        bins = values[-self.num_bins:]
        if not any(counts):
            return {}
        total = sum(sums)
        means = [weight / count if count else None for weight, count in zip(sums, counts)]
        shares = [100 * weight / total if 0 < total < math.inf else None for weight in sums]
        columns = {f"{name}_{k}": value and float(f"{value:.6g}")
                   for name, column in (("class", means), ("share", shares))
                   for k, value in enumerate(column)}
        return columns | {f"bin_{k}": int(count) for k, count in enumerate(bins)}


def wilson_interval(accuracy: float, count: float) -> tuple[float, float]:
    """95 % score interval in [0, 1] of a proportion (Wilson, JASA 1927) from `count` trials, whole or not."""
    if count <= 0:
        return 0.0, 1.0
    shrink = 1.0 / (1.0 + Z95**2 / count)
    centre = shrink * (accuracy + Z95**2 / (2 * count))
    half = shrink * Z95 * math.sqrt(accuracy * (1 - accuracy) / count + Z95**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(accuracy: float, variance: float, effective_size: float) -> tuple[float, float]:
    """Wilson's 95 % interval from the number of trials, A (1 - A) / variance, that gives this variance.

    Where the variance is 0, as where all or none are correct, from the effective size.
    """
    trials = accuracy * (1 - accuracy) / variance if variance > 0 else effective_size
    return wilson_interval(accuracy, trials)


def weighted_accuracy(correct: Tensor, margin: Tensor, alpha: float) -> dict[str, object]:
    """Accuracy under an attacker who prefers small margins (Zeng et al., AAAI 2021, Eq. 17-19).

        A = sum_i w_i 1[correct_i] / sum_i w_i,    w_i = exp(-alpha * m_i)

    correct: [N] bool and margin: [N] in [-1, 1], both at the adversarial examples of the whole test set. One
    sum over the set in float64, not a mean of batch means. Returns `accuracy` in [0, 1], its 95 % interval
    `ci95`, the effective sample size `effective_size` = (sum w)^2 / sum w^2 (Kish), and the linearised
    `terms` [N], w (1[correct] - A) / sum w. alpha = 0 is the plain accuracy with its Wilson interval, and the
    accuracy never rises with alpha, since a wrong example's margin is never positive.

    The interval is Wilson's with the number of trials that gives the estimate's variance, the linearised one
    of a ratio (after Korn & Graubard, Survey Methodology 1998), n = A (1 - A) / var, var = sum terms^2; where
    all or none are correct, the effective size. Where only a handful of errors carry a large alpha's weight
    it is too narrow: look at the effective size first.
    """
    correct = correct.double()
    exponent = -alpha * margin.double()
    weights = torch.exp(exponent - exponent.max())  # a common factor cancels
    total = weights.sum()
    accuracy = float((weights * correct).sum() / total)
    effective = float(total**2 / (weights**2).sum())
    terms = weights * (correct - accuracy) / total
    ci95 = interval(accuracy, float((terms**2).sum()), effective)
    return {"accuracy": accuracy, "ci95": ci95, "effective_size": effective, "terms": terms}


def paired_half_width(*pairs: tuple[dict[str, object], dict[str, object]]) -> float:
    """Half the 95 % interval, in [0, 1], of a mean difference of two accuracies on the same N examples.

    pairs: (ours, theirs) of `weighted_accuracy` or `accuracy_at_budget`, one for each seed. Normal, with the
    variance of the mean difference of the linearised terms, so that what both get right or wrong does not
    count: what the examples leave open, not what the seeds do.
    """
    terms = sum(ours["terms"] - theirs["terms"] for ours, theirs in pairs) / len(pairs)
    return Z95 * float((terms**2).sum()) ** 0.5
