"""The batches of a training run, and the optimiser's steps on them."""
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from harness import distributed
from harness.datasets.batches import Dataset
from harness.datasets.split import Split
from harness.device import fastest_convolutions
from harness.training.average import Average
from harness.training.batch import Batch, Meters, load_batches
from harness.training.options import RunOptions
from harness.training.saving import RunFolder

CHECK_SECONDS = 1.0  # how often the host looks at the loss: for the bar, and for a value that is not finite


class Steps:
    """What a run does with batches: its part that the loop of a training script sees."""

    cfg: RunOptions
    data: Dataset
    train: Split
    device: torch.device
    rank: int
    world_size: int
    batches_per_epoch: int
    epoch: int                     # how many are done
    state: dict[str, Any]          # what a checkpoint restores: model, optimizer, ...
    average: Average | None
    files: RunFolder
    meters: Meters                 # of the last epoch, like the next two
    lr: float
    seconds: float

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, behind a progress bar with the time left."""
        torch.manual_seed((self.cfg.seed * 100_003 + epoch) * 1_009 + self.rank)  # of dropout
        self.meters = Meters(self.data.num_classes, self.device)
        self.lr = self.state["optimizer"].param_groups[0]["lr"]
        started = looked = time.monotonic()
        source = load_batches(self.data, self.train, self.cfg, epoch, self.rank, self.world_size)
        with fastest_convolutions(), tqdm(
                total=self.batches_per_epoch, desc=f"epoch {epoch}/{self.cfg.epochs}", unit="batch",
                leave=False, disable=None if self.rank == 0 else True) as bar:
            for batch in source:
                yield batch
                bar.update()
                if time.monotonic() - looked > CHECK_SECONDS:
                    looked = time.monotonic()
                    self.meters.check_finite(epoch, self.cfg, self.files.path)
                    means = self.meters.means.compute()
                    bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()}, refresh=False)
                if batch.number == self.batches_per_epoch:
                    break
        self.meters.check_finite(epoch, self.cfg, self.files.path)
        self.seconds = time.monotonic() - started

    def ramp(self, batch: Batch, epochs: float) -> float:
        """The fraction, from 0 to 1, of a linear rise over the first `epochs` epochs, at this batch."""
        done = batch.epoch - 1 + (batch.number - 1) / self.batches_per_epoch
        return min(1.0, done / epochs) if epochs else 1.0

    def global_positions(self, batch: Batch) -> Tensor:
        """The positions [B] of this process's examples in the global batch."""
        return self.rank + self.world_size * torch.arange(len(batch.x), device=self.device)

    def on_global_batch(self, function: Callable[..., Tensor], batch: Batch, *arguments: Any) -> Tensor:
        """The rows [B] of this process in function(*arguments) on the examples of all processes.

        So a normalisation of instance weights goes over the global batch. Tensors among the arguments, one
        row per example, are gathered; everything else is handed on.
        """
        return distributed.on_all_rows(function, batch.global_size, *arguments)

    def step(self, loss: Tensor, optimizer: Optimizer, batch: Batch, **metrics: Tensor) -> None:
        """One optimiser step on `loss`, the mean over this process's examples.

        The log averages `metrics`, [B] each. A loss that is not finite is noted on the device; the run
        stops when the host next looks.
        """
        optimizer.zero_grad(set_to_none=True)
        (loss * batch.loss_scale).backward()
        self._update(loss, optimizer, batch, metrics)

    def update(self, loss: Tensor, optimizer: Optimizer, batch: Batch, **metrics: Tensor) -> None:
        """`step` without its backward pass: the gradients are those of losses.mean() * batch.loss_scale."""
        distributed.average_gradients(self.state["model"])
        self._update(loss, optimizer, batch, metrics)

    def _update(self, loss: Tensor, optimizer: Optimizer, batch: Batch, metrics: dict[str, Tensor]) -> None:
        if self.cfg.max_grad_norm:
            grad_norm = nn.utils.clip_grad_norm_(self.state["model"].parameters(), self.cfg.max_grad_norm)
            metrics["grad_norm"] = grad_norm.expand(len(batch.y))
        done = self.epoch + batch.number / self.batches_per_epoch
        warmup = self.cfg.lr_warmup_epochs
        with learning_rate_times(min(1.0, done / warmup) if warmup else 1.0, optimizer):
            optimizer.step()
        if self.average:
            self.average.update_parameters(self.state["model"])
        self.meters.add(batch, loss, metrics)

    def log_weights(self, weights: Tensor, y: Tensor) -> None:
        """Take the instance weights [B] of examples with labels y [B] into the epoch's row of weights.csv."""
        self.meters.weights.add(weights.detach(), y)


@contextmanager
def learning_rate_times(factor: float, optimizer: Optimizer) -> Iterator[None]:
    """The optimiser at `factor` times its scheduled learning rate."""
    scheduled = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= factor
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, scheduled):
            group["lr"] = lr
