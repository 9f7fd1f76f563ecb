"""One training batch, and what an epoch measures on its batches."""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness import distributed
from harness.datasets.batches import Dataset, training_batches
from harness.datasets.split import Split
from harness.errors import RunError
from harness.evaluation.chance import ClassCounts
from harness.evaluation.metrics import Means, WeightStatistics
from harness.training.collapse import shorter_steps
from harness.training.options import RunOptions


@dataclass(frozen=True)
class Batch:
    """This process's examples of one training step.

    loss_scale is this process's part of the global batch times the number of processes. It is 1 unless
    torchrun splits a batch unevenly. The mean over the examples of all processes is the mean over all
    processes of loss_scale * losses.mean().
    """

    x: Tensor            # [B, C, H, W] in [0, 1]
    y: Tensor            # [B] int64
    index: Tensor        # [B] int64, in the data set
    epoch: int           # from 1
    number: int          # in the epoch, from 1
    loss_scale: float
    global_size: int     # examples of all processes


def load_batches(data: Dataset, split: Split, cfg: RunOptions, epoch: int, rank: int,
                 world_size: int) -> Iterator[Batch]:
    """This process's examples of each batch of an epoch over `split`, augmented as `cfg` says."""
    source = training_batches(split, cfg.batch_size, cfg.seed, epoch, crop_padding=cfg.crop_padding,
                              padding_mode=cfg.padding_mode, flip=cfg.flip, rank=rank, world_size=world_size,
                              extra=data.extra, extra_fraction=getattr(cfg, "extra_fraction", 0.0))
    for number, (x, y, index, loss_scale) in enumerate(source, 1):
        yield Batch(x, y, index, epoch, number, loss_scale, round(len(x) * world_size / loss_scale))


class Meters:
    """What an epoch measures, on the device: the host reads it about once a second, and at the end."""

    def __init__(self, num_classes: int, device: torch.device):
        self.means = Means()
        self.weights = WeightStatistics(num_classes, device)
        self.class_counts = ClassCounts(num_classes, device)
        self.bad_step = torch.full((), -1, device=device)  # the first step whose loss is not finite

    @torch.no_grad()
    def add(self, batch: Batch, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Take in a step: its mean loss, and values [B] of its examples."""
        is_first = (self.bad_step < 0) & ~torch.isfinite(loss)
        self.bad_step = torch.where(is_first, batch.number, self.bad_step)
        self.means.add(loss=loss.expand(len(batch.y)), **metrics)
        if "A_rob" in metrics:
            self.class_counts.add(metrics["A_rob"], batch.y)

    def check_finite(self, epoch: int, cfg: RunOptions, folder: Path) -> None:
        """Raise RunError if the loss of a step so far was not finite."""
        step = int(self.bad_step)
        if step >= 0:
            raise RunError(f"the loss is not finite at epoch {epoch}, step {step}: try {shorter_steps(cfg)} "
                           f"or a smaller --lr; what was saved before is intact in {folder}")

    def log_columns(self) -> dict[str, float]:
        """The means over all processes as columns of log.csv, accuracies in percent."""
        means = self.means.compute(distributed.total)
        percent = {name: 100.0 if name.startswith("A_") else 1.0 for name in means}
        return {f"train_{name}": percent[name] * value for name, value in means.items()}
