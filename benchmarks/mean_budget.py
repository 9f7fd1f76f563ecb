"""Hold the curves under a mean budget against the first-order attack on it, on the same network and points.

W-PGD (Bai, He, Jiang & Obloj, "Wasserstein distributional robustness of neural networks", NeurIPS 2023)
moves all images at once, within (mean_i ||x'_i - x_i||^2)^(1/2) <= epsilon (p = 2). Steepest ascent of a loss
J under that constraint moves each image in proportion to its gradient's dual norm:

    x' <- project(x' + step h(g) ||g||_* / (mean_i ||g_i||_*^2)^(1/2)),    g_i = grad_x J(x'_i),

h(g) the steepest direction of unit norm. J is their best, the rectified DLR loss: it is 0 for a broken image,
which then costs no more. The lowest accuracy of all iterates counts. It is an upper bound of the worst one,
as is that of `generate_robustness_curves.py budget`; the lower of two bounds is the better.

    python benchmarks/mean_budget.py --results runs/curves/at --out runs/first_order.json
"""
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

import numpy as np
import torch
from torch import Tensor, nn

from attacks.dlr import dlr_loss
from attacks.frozen import frozen
from attacks.geometry import dual_norm_of, norm_of, per_example, steepest
from benchmarks import common
from curves import store
from curves.budget import Knapsack
from curves.models import reopen
from curves.points import pick
from harness.config import run_script
from harness.datasets.batches import to_unit
from harness.device import choose_device
from harness.errors import UserError
from losses.margin import misclassified
from models import build_model

COLUMNS = (("norm", "norm", "<6"), ("epsilon", "mean_budget", ">9.4f"), ("knapsack, %", "ours", ">13.2f"),
           ("one radius, %", "one_radius", ">15.2f"), ("W-PGD, %", "first_order", ">10.2f"),
           ("it spends", "spent", ">11.4f"),
           ("nearer than the curve says", "nearer", ">28"))


@dataclass(frozen=True)
class Config:
    results: str | None = None            # folder with the distances.npz of one model
    norms: tuple[Literal["linf", "l2"], ...] = ("linf", "l2")  # of the perturbation
    leaving: tuple[float, ...] = (0.9, 0.75, 0.5, 0.25, 0.1)  # accuracies whose mean budgets are taken
    num_steps: int = 50                   # of W-PGD
    reach: float = 1.875                  # W-PGD: sum of its steps, in epsilons [their code]
    batch_size: int = 250                 # images at a time
    out: str | None = None                # JSON file to write, never over another
    device: str = "auto"                  # auto, cpu, or an accelerator by its name in torch


def rectified_dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The DLR loss where the image is right, 0 where it is wrong."""
    return dlr_loss(logits, y).clamp(max=0)


def first_order(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, norm: str, num_steps: int = 50,
                reach: float = 1.875, batch_size: int = 250,
                loss_fn: Callable[[Tensor, Tensor], Tensor] = rectified_dlr) -> Tensor:
    """The iterate of W-PGD (p = 2) that breaks most of x [N, C, H, W], all N within one mean budget."""
    delta, best, most = torch.zeros_like(x), x, -1
    for _ in range(num_steps):
        gradient, broken = _gradient(model, x + delta, y, loss_fn, batch_size)
        if broken > most:
            best, most = x + delta, broken
        sizes = dual_norm_of(gradient, norm)
        mean = sizes.double().square().mean().sqrt().clamp(min=1e-30)
        lengths = (reach * epsilon / num_steps * sizes.double() / mean).float()
        delta = delta + per_example(lengths, x) * steepest(gradient, norm)
        delta = (x + shrink(delta, epsilon, norm)).clamp(0, 1) - x
    _, broken = _gradient(model, x + delta, y, loss_fn, batch_size)
    return x + delta if broken > most else best


def shrink(delta: Tensor, epsilon: float, norm: str) -> Tensor:
    """Perturbations [N, ...], all made smaller by the factor that brings `spent` to at most epsilon."""
    sizes = norm_of(delta, norm)
    factor = min(1.0, epsilon / max(spent(sizes), 1e-30))
    if norm == "linf":
        bound = per_example(factor * sizes, delta)
        return delta.clamp(-bound, bound)
    return factor * delta


def spent(sizes: Tensor) -> float:
    """(mean_i size_i^2)^(1/2) of the norms of perturbations [N]."""
    return float(sizes.double().square().mean().sqrt())


def _gradient(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor],
              batch_size: int) -> tuple[Tensor, int]:
    """The gradient of the loss at x, and how many are wrong there."""
    gradients, broken = [], 0
    for images, labels in zip(x.split(batch_size), y.split(batch_size)):
        images = images.detach().requires_grad_()
        logits = model(images)
        gradients += torch.autograd.grad(loss_fn(logits, labels).sum(), images)
        broken += int(misclassified(logits, labels).sum())
    return torch.cat(gradients), broken


def compare(model: nn.Module, x: Tensor, y: Tensor, results: store.Results, norm: str, accuracy: float,
            cfg: Config) -> dict[str, object] | None:
    """One row: both at the mean budget that leaves this accuracy by the knapsack, None where none does."""
    knapsack = Knapsack(results.upper(norm))
    epsilon = knapsack.budget(accuracy, 2.0)
    if not epsilon:
        return None
    started = time.monotonic()
    x_adv = first_order(model, x, y, epsilon=epsilon, norm=norm, num_steps=cfg.num_steps, reach=cfg.reach,
                        batch_size=cfg.batch_size)
    with torch.no_grad():
        wrong = torch.cat([misclassified(model(images), labels)
                           for images, labels in zip(x_adv.split(cfg.batch_size), y.split(cfg.batch_size))])
    sizes = norm_of(x_adv - x, norm).cpu()
    known = torch.from_numpy(results.upper(norm))
    ours, one_radius = (100 * float(knapsack.accuracy([epsilon], order)[0]) for order in (2.0, np.inf))
    return {"norm": norm, "mean_budget": epsilon, "ours": ours, "one_radius": one_radius,
            "first_order": 100 * (1 - float(wrong.double().mean())), "spent": spent(sizes),
            "nearer": int((wrong.cpu() & (sizes.double() < known - 1e-6)).sum()),
            "seconds": time.monotonic() - started}


def main(cfg: Config) -> None:
    if not cfg.results:
        raise UserError("name a folder that generate_robustness_curves.py compute wrote with --results")
    out, (results, *others) = common.out_file(cfg.out), store.find((cfg.results,))
    if others:
        raise UserError(f"{cfg.results} holds {1 + len(others)} models: name the folder of one")
    device, subject = choose_device(cfg.device, wide=True), reopen(results.about, build_model)
    points, rows = pick(subject.split, results.columns["index"]).to(device), []
    x, y = to_unit(points.images), points.labels
    print(common.head(COLUMNS))
    with frozen(subject.model.to(device).eval()) as model:
        for norm, accuracy in product((norm for norm in cfg.norms if norm in results.norms), cfg.leaving):
            if row := compare(model, x, y, results, norm, accuracy, cfg):
                rows.append(row)
                print(common.line(COLUMNS, row), flush=True)
                common.write_json(out, {"rows": rows, "about": results.about, "num_examples": len(x),
                                        "num_steps": cfg.num_steps, "reach": cfg.reach,
                                        **common.facts(device)})


if __name__ == "__main__":
    run_script(main, Config)
