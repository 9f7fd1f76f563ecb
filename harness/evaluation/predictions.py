"""What a network makes of images, whatever the batch they stand in; the monitor of a training run."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from harness import distributed
from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from harness.errors import RunError, UserError
from harness.training.attack_view import AttackView
from losses.margin import probability_margin

MULTIPLE = 32  # rows: a matrix product takes other kernels for its last few rows, whose rounding differs


@dataclass
class Predictions:
    """What a network makes of each image of a set, [N] each, on the CPU."""

    prediction: Tensor  # class
    loss: Tensor        # cross-entropy
    margin: Tensor      # of the probabilities, positive = correct


class BatchInvariant(nn.Module):
    """A network as attacks see it: the logits of an image do not depend on how many others are in its batch.

    Batches are padded to a multiple of MULTIPLE rows. An output that has no gradient with respect to the
    input gets one of zeros, so that an attack on a network that hides its gradient goes on and fails,
    instead of raising. The network is passed in a faster form where one is recognised and checked.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.view = AttackView(network)

    def forward(self, x: Tensor) -> Tensor:
        spare = -len(x) % MULTIPLE
        logits = self.view(F.pad(x, (0, 0, 0, 0, 0, 0, 0, spare)) if spare else x)[:len(x)]
        if x.requires_grad and not logits.requires_grad:
            logits = logits + 0.0 * x.flatten(1).sum(1, keepdim=True)
        return logits


def observe(model: nn.Module, x: Tensor, y: Tensor) -> Predictions:
    """The model's predictions at x, in float64 from its float32 logits, without a graph.

    Raises UserError for outputs that are not logits [B, K] with a place for every label, and for one that
    is not finite: such a network is never said to be fooled.
    """
    with torch.no_grad():
        logits = model(x).cpu().double()  # [B, K]
    y = y.cpu()
    if logits.ndim != 2 or logits.shape[1] <= int(y.max()):
        raise UserError(f"the network gives outputs of shape {tuple(logits.shape[1:])} where the data set "
                        f"has labels up to {int(y.max())}")
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the network's outputs are not finite: this checkpoint cannot be evaluated")
    loss = F.cross_entropy(logits, y, reduction="none")
    return Predictions(logits.argmax(1), loss, probability_margin(logits, y))


def num_outputs(model: nn.Module, split: Split) -> int:
    """The number of the network's outputs."""
    with torch.no_grad():
        return model(to_unit(split.images[:1])).shape[1]


def held_out_accuracy(model: nn.Module, split: Split, *, attack: Callable[..., Tensor], loss_fn: Callable,
                      batch_size: int = 500) -> dict[str, float]:
    """A_nat and A_rob in percent, one attack an image, in eval mode and float32: a training run's monitor.

    attack(model, x, y, index, restart, loss_fn) -> x_adv. Raises RunError when it gives pixels that are not
    finite.
    """
    training, hits = model.training, {"A_nat": 0, "A_rob": 0}
    model.eval()
    quiet = True if distributed.expected()[0] else None
    with tqdm(total=len(split), desc="held-out images", unit="image", disable=quiet, leave=False) as bar:
        for first in range(0, len(split), batch_size):
            part = split[slice(first, first + batch_size)]
            x, y = to_unit(part.images), part.labels
            x_adv = attack(model, x, y, part.index, 0, loss_fn)
            if spoilt := int((~torch.isfinite(x_adv)).sum()):
                raise RunError(f"the attack gave {spoilt} pixels that are not finite: is the network's "
                               "gradient finite?")
            for metric, images in (("A_nat", x), ("A_rob", x_adv)):
                hits[metric] += int((observe(model, images, y).prediction == y.cpu()).sum())
            bar.update(len(part))
    model.train(training)
    return {metric: 100 * (count / len(split)) for metric, count in hits.items()}
