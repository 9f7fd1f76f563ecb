"""The distances of a batch of points from the adversarial examples that an attack hands over: nothing counts before it is checked again."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NORMS = ("linf", "l2", "l1")


@dataclass(frozen=True)
class Measured:
    """What is known of each of B points: predicted class [B], and by norm the smallest distance [B] (0 where misclassified, inf where
    nothing was found), the adversarial example there [B, ...] (the clean point in both of those cases), its margin [B] in float64, and
    which attack found it [B], -1 for none or unknown."""

    pred: Tensor
    clean_margin: Tensor
    distance: dict[str, Tensor]
    x_adv: dict[str, Tensor]
    margin: dict[str, Tensor]
    winner: dict[str, Tensor]


@dataclass(frozen=True)
class Candidates:
    """What an attack hands over for b points: by norm images [b, ...], and which of its parts each is from [b]; -1 for none."""

    x_adv: dict[str, Tensor]
    winner: dict[str, Tensor]


def norms_of(delta: Tensor) -> dict[str, Tensor]:
    """||delta||_p of each example in float64, by norm: [B, ...] -> [B] each."""
    flat = delta.double().flatten(1)
    return {"linf": flat.abs().amax(dim=1), "l2": flat.norm(dim=1), "l1": flat.abs().sum(dim=1)}


def measure(model: nn.Module, x: Tensor, y: Tensor, norms: tuple[str, ...], attack: Callable[[Tensor, Tensor, Tensor], Candidates],
            margin_of: Callable[[Tensor, Tensor], Tensor], misclassified: Callable[[Tensor, Tensor], Tensor]) -> Measured:
    """Attack the correctly classified points and keep, in each of `norms`, the closest adversarial example of all that came back.

    model: in eval mode; x: [B, ...] in [0, 1]; y: [B]. attack(x, y, rows) -> Candidates is called with the correctly classified
    points alone, `rows` [b] being their places in the batch. margin_of(logits, y) -> [B] is the margin, misclassified(logits, y)
    -> [B] bool whether y has lost (`losses.margin`). Each candidate is clamped to [0, 1], classified again and measured in all norms,
    so that one found in any norm counts in every other.
    """
    with torch.no_grad():
        logits = model(x).double()
    pred, clean_margin = logits.argmax(1), margin_of(logits, y)
    wrong = misclassified(logits, y)
    distance = {norm: torch.where(wrong, 0.0, torch.inf).double() for norm in norms}
    x_adv, margin = {norm: x.clone() for norm in norms}, {norm: clean_margin.clone() for norm in norms}
    rows = (~wrong).nonzero().squeeze(1)
    winner = {norm: torch.full_like(y, -1) for norm in norms}
    candidates = attack(x[rows], y[rows], rows) if len(rows) else Candidates({}, {})
    for source, candidate in candidates.x_adv.items():
        candidate = candidate.detach().clamp(0.0, 1.0)
        with torch.no_grad():
            found = model(candidate).double()
        value, sizes = margin_of(found, y[rows]), norms_of(candidate.double() - x[rows].double())
        adversarial = misclassified(found, y[rows])
        for norm in norms:
            better = adversarial & (sizes[norm] < distance[norm][rows])
            distance[norm][rows[better]], margin[norm][rows[better]] = sizes[norm][better], value[better]
            x_adv[norm][rows[better]], winner[norm][rows[better]] = candidate[better], candidates.winner[source][better]
    return Measured(pred, clean_margin, distance, x_adv, margin, winner)


def nearest_of_another_class(x: Tensor, y: Tensor, images: Tensor, pred: Tensor) -> Tensor:
    """For each of x [B, ...] the image of `images` [M, ...] nearest in l_2 whose prediction `pred` [M] is not y [B]: an adversarial example
    to begin from where gradients vanish.  x itself where every prediction is y."""
    apart = torch.cdist(x.flatten(1), images.flatten(1)).masked_fill(pred == y[:, None], torch.inf)
    distance, nearest = apart.min(dim=1)
    return torch.where(distance.isfinite().view(-1, *[1] * (x.dim() - 1)), images[nearest], x)
