"""Why does a network die?  Trace every step of adversarial training on the embedded digits.

    gradient     its length over all parameters, before it is cut
    silent       part of the units of a layer whose weights have no gradient at all in this step
    spread       standard deviation of the logits over the first 256 training images, mean of the classes: 0
                 when all look the same

    python benchmarks/trace.py                                     # the recipe `digits`
    python benchmarks/trace.py --lr 0.05 --max_grad_norm 0 --epsilon_warmup_epochs 10 --out trace.csv
"""
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

import train_at_mnist
from benchmarks import common, figures
from harness.config import run_script
from harness.datasets.batches import load_dataset, to_unit
from harness.folder import write_csv
from harness.training.batch import Batch
from harness.training.precision import bare
from harness.training.run import Run
from models import build_model


@dataclass(frozen=True)
class Config:
    model: str = "lenet"              # network
    lr: float = 0.1                   # learning rate of SGD
    max_grad_norm: float = 1.0        # gradients longer than this are cut to it; 0 is off
    lr_warmup_epochs: float = 0       # epochs over which the learning rate rises from 0
    epsilon_warmup_epochs: float = 3  # epochs over which epsilon and the step rise from 0
    epochs: int = 5                   # passes over the training set
    seed: int = 2                     # of weights, order and starts
    precision: Literal["auto", "bf16", "float32"] = "float32"  # of training
    out: str | None = None            # CSV file to write, never over another, with the figure beside it


class Traced(Run):
    """A run that notes the loss and the gradient of each step before its update, and the logits after it."""

    trace: tuple[dict[str, float], ...] = ()

    def _update(self, loss: Tensor, optimizer: Optimizer, batch: Batch, metrics: dict[str, Tensor]) -> None:
        model = bare(self.state["model"])
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        length = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        row = {"step": len(self.trace) + 1, "loss": float(loss.detach()), "gradient": float(length)}
        for name, gradient in gradients.items():
            if gradient.ndim > 1:
                silent = (gradient.flatten(1) == 0).all(1)
                row[f"silent {name.removesuffix('.weight')}"] = float(silent.float().mean())
        super()._update(loss, optimizer, batch, metrics)
        with torch.no_grad():
            spread = float(model(to_unit(self.train.images[:256])).std(0).mean())
        self.trace += ({**row, "spread": spread},)


def main(cfg: Config) -> None:
    out = common.out_file(cfg.out)
    with tempfile.TemporaryDirectory() as folder:
        own = {name: value for name, value in asdict(cfg).items() if name != "out"}
        settings = replace(train_at_mnist.RECIPES["digits"], **own, out_dir=folder)
        with Traced(settings, load_dataset("digits", "data", settings.val_size)) as run:
            model = run.build(build_model)
            optimizer = common.sgd(model, settings)
            scheduler = MultiStepLR(optimizer, settings.lr_drop_after, settings.lr_drop_factor)
            for epoch in run.epochs(model, optimizer, scheduler):
                train_at_mnist.train_one_epoch(model, optimizer, run, epoch, settings)
                scheduler.step()
                run.end_epoch(model, lambda *_: {})
    longest = max(run.trace, key=lambda row: row["gradient"])
    print(f"longest gradient {longest['gradient']:.1f}, loss {longest['loss']:.2f}: step {longest['step']} "
          f"of {len(run.trace)}")
    if out:
        write_csv(out, list(run.trace))
        figures.trace(list(run.trace), out.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main, Config)
