"""Distances from the adversarial examples that an attack hands over: nothing counts before it is checked."""
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from curves.certified import Layers, certified_distances
from curves.found import Measured
from curves.store import PENDING, Results, saving
from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from harness.errors import UserError
from harness.evaluation import sanity
from losses.margin import misclassified, probability_margin

# Points on a CPU between two times of saving: a larger batch is hardly faster, and a stop loses it.
SAVED_TOGETHER, SAVED_TOGETHER_CERTIFIED = 64, 8


@dataclass(frozen=True)
class Candidates:
    """What an attack hands over for b points, by norm: images [b, ...], and which part found each [b]."""

    x_adv: dict[str, Tensor]
    winner: dict[str, Tensor]


Attack = Callable[[Tensor, Tensor, Tensor], Candidates]  # of x [b, ...], y [b] and which points they are [b]


def norms_of(delta: Tensor) -> dict[str, Tensor]:
    """||delta||_p of each example in float64, by norm: [B, ...] -> [B] each."""
    flat = delta.double().flatten(1)
    return {"linf": flat.abs().amax(dim=1), "l2": flat.norm(dim=1), "l1": flat.abs().sum(dim=1)}


def measure(model: nn.Module, x: Tensor, y: Tensor, norms: tuple[str, ...], attack: Attack) -> Measured:
    """Attack the correctly classified points and keep, in each norm, the closest adversarial example.

    model: in eval mode; x: [B, ...] in [0, 1]; y: [B]. attack(x, y, rows) is called with the correctly
    classified points alone, `rows` [b] being their places in the batch. Each candidate is clamped to [0, 1],
    classified again and measured in all norms, so that one found in any norm counts in every other. Raises
    UserError for a network whose outputs are not finite.
    """
    with torch.no_grad():
        logits = model(x).double()
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the network's outputs are not finite at every point: no distance can be measured")
    clean_margin = probability_margin(logits, y)
    wrong = misclassified(logits, y)
    rows = (~wrong).nonzero().squeeze(1)
    distance = {norm: torch.where(wrong, 0.0, torch.inf).double() for norm in norms}
    x_adv = {norm: x.clone() for norm in norms}
    margin = {norm: clean_margin.clone() for norm in norms}
    winner = {norm: torch.full_like(y, -1) for norm in norms}
    candidates = attack(x[rows], y[rows], rows) if len(rows) else Candidates({}, {})
    for source, candidate in candidates.x_adv.items():
        candidate = candidate.detach().clamp(0.0, 1.0)
        with torch.no_grad():
            found = model(candidate).double()
        value = probability_margin(found, y[rows])
        sizes = norms_of(candidate.double() - x[rows].double())
        adversarial = misclassified(found, y[rows])
        for norm in norms:
            better = (adversarial & (sizes[norm] < distance[norm][rows])).nonzero().squeeze(1)
            for target, new in ((distance, sizes[norm]), (margin, value), (x_adv, candidate),
                                (winner, candidates.winner[source])):
                target[norm][rows[better]] = new[better]
    return Measured(logits.argmax(1), clean_margin, distance, x_adv, margin, winner)


def measure_pending(results: Results, model: nn.Module, points: Split, attack: Attack, batch_size: int,
                    layers: Layers | None, folder: Path) -> None:
    """Measure the points that are pending, and save as they are done.

    attack(x, y, index) is given the points' places in the data set, `index` [b]; layers: the network as
    `affine_layers` reads it, where lower bounds are wanted.
    """
    pending = results.rows(PENDING)
    if layers and len(pending):
        seconds = certificate_seconds(layers, points[slice(0, 1)], results.norms)
        print(f"{results.name}: certificates take up to {seconds:.2g} s a point, for {len(pending):,} points "
              f"{seconds * len(pending) / 60:.1f} minutes", flush=True)
    if points.images.device.type == "cpu":
        batch_size = min(batch_size, SAVED_TOGETHER_CERTIFIED if layers else SAVED_TOGETHER)
    bar = tqdm(total=len(results), initial=len(results) - len(pending), desc=results.name, unit="point",
               disable=None)
    with bar, saving(results, folder) as saved:
        for start in range(0, len(pending), batch_size):
            rows = pending[start:start + batch_size]
            part = points[torch.from_numpy(rows)]
            x, y = to_unit(part.images), part.labels
            found = measure(model, x, y, results.norms,
                            lambda x, y, kept, index=part.index: attack(x, y, index[kept]))
            for norm in results.norms if layers else ():
                bound = certified_distances(layers, x, y, found.distance[norm], norm=norm)
                results.lower(norm)[rows] = bound.numpy()
            results.put(rows, found)
            saved()
            bar.update(len(rows))


def certificate_seconds(layers: Layers, point: Split, norms: tuple[str, ...]) -> float:
    """How long the lower bounds of one point take in all norms, wherever they end."""
    x, started = to_unit(point.images), time.monotonic()
    for norm in norms:
        certified_distances(layers, x, point.labels, torch.ones(1), norm=norm)
    return time.monotonic() - started


def look_at(model: nn.Module, points: Split) -> str:
    """The verdict on a network at the first points that it classifies correctly; prints what fires."""
    part = points[slice(0, sanity.NUM_PROBED)]
    x, y = to_unit(part.images), part.labels
    with torch.no_grad():
        right = ~misclassified(model(x), y)
    findings = [sanity.something_to_probe(int(right.sum()))]
    if right.any():
        looked = sanity.look(model, x[right], y[right], partial(F.cross_entropy, reduction="none"))
        findings += sanity.inspect_look(looked)
    for finding in findings:
        if not finding.ok:
            print(f"suspicious: {finding.rule}: {finding.evidence}")
    return sanity.verdict(findings)


def predicted(model: nn.Module, points: Split, batch_size: int) -> tuple[Tensor, Tensor]:
    """The images of points and the classes that the model gives them."""
    images = to_unit(points.images)
    with torch.no_grad():
        return images, torch.cat([model(x).argmax(1) for x in images.split(batch_size)])


def nearest_of_another_class(x: Tensor, y: Tensor, images: Tensor, pred: Tensor) -> Tensor:
    """For each of x [B, ...] the nearest in l_2 of `images` [M, ...] whose class `pred` [M] is not y [B].

    An adversarial example to begin from where gradients vanish. x itself where every class is y.
    """
    apart = torch.cdist(x.flatten(1), images.flatten(1)).masked_fill(pred == y[:, None], torch.inf)
    distance, nearest = apart.min(dim=1)
    return torch.where(distance.isfinite().view(-1, *[1] * (x.dim() - 1)), images[nearest], x)
