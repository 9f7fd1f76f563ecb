"""Accuracy under attack: per-example records in float32, and A_nat, A_rob, A_sa and A_tr from them.

An attack here is a function (model, x, y, index, restart, loss_fn) -> x_adv whose random start depends on (index, restart) alone, so that
an example's verdict does not depend on the batch it stands in.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from harness.errors import RunError, UserError
from harness.evaluation.chance import metrics_at_chance
from harness.evaluation.metrics import weighted_accuracy
from losses.margin import probability_margin


@dataclass
class Record:
    """What the model does to each example of a set, [N] each, on the CPU: predicted class, cross-entropy, probability margin."""

    prediction: Tensor
    loss: Tensor
    margin: Tensor


@dataclass
class Certificate:
    """That every adversarial example measured lies in its ball and box: the extremes over all of them."""

    max_perturbation: float = 0.0
    min_pixel: float = 1.0
    max_pixel: float = 0.0
    non_finite: int = 0

    def add(self, x: Tensor, x_adv: Tensor) -> None:
        """Take a batch and its adversarial examples into account."""
        finite = torch.isfinite(x_adv)
        self.non_finite += int((~finite).sum())
        self.max_perturbation = max(self.max_perturbation, float((x_adv - x).abs().nan_to_num(0.0, 0.0, 0.0).max()))
        self.min_pixel, self.max_pixel = min(self.min_pixel, float(x_adv.min())), max(self.max_pixel, float(x_adv.max()))

    def broken(self, epsilon: float) -> str:
        """What is wrong with the adversarial examples, in words; empty when nothing is."""
        faults = []
        if self.max_perturbation > epsilon + 1e-6 * max(1.0, epsilon):
            faults.append(f"a perturbation of {self.max_perturbation:.6f} exceeds epsilon {epsilon:.6f}")
        if self.min_pixel < 0 or self.max_pixel > 1:
            faults.append(f"pixels reach [{self.min_pixel:.6f}, {self.max_pixel:.6f}] outside [0, 1]")
        if self.non_finite:
            faults.append(f"{self.non_finite} pixels are not finite")
        return ", ".join(faults)


def observe(model: nn.Module, x: Tensor, y: Tensor) -> Record:
    """The model's prediction, cross-entropy and probability margin (positive = correct) at x, without a graph."""
    with torch.no_grad():
        logits, y = model(x).cpu().double(), y.cpu()
    if logits.ndim != 2 or logits.shape[1] <= int(y.max()):
        raise UserError(f"the network gives outputs of shape {tuple(logits.shape[1:])} where the data set has labels up to {int(y.max())}")
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the network's outputs are not finite: this checkpoint cannot be evaluated")
    return Record(logits.argmax(1), F.cross_entropy(logits, y, reduction="none"), probability_margin(logits, y))


def num_outputs(model: nn.Module, split: Split) -> int:
    """The number of the network's outputs.  Raises UserError when it does not take the images of `split`."""
    with torch.no_grad():
        try:
            return model(to_unit(split.images[:1])).shape[1]
        except (RuntimeError, IndexError, TypeError) as error:
            shape, reason = "x".join(map(str, split.images.shape[1:])), str(error).splitlines()[0]
            raise UserError(f"the network does not take images of {shape}, or gives no logits [B, K] ({reason})") from error


def record_clean(model: nn.Module, split: Split, batch_size: int) -> Record:
    """The record of the clean images."""
    return _joined([observe(model, to_unit(part.images), part.labels) for part in _parts(split, batch_size)])


def record_attack(model: nn.Module, split: Split, batch_size: int, attack: Callable, loss_fn: Callable, num_restarts: int,
                  certificate: Certificate, bar: tqdm) -> Record:
    """The record at the worst of `num_restarts` independent attacks on each example: the one of largest cross-entropy."""
    records = []
    for part in _parts(split, batch_size):
        x, worst = to_unit(part.images), None
        for restart in range(num_restarts):
            x_adv = attack(model, x, part.labels, part.index, restart, loss_fn)
            certificate.add(x, x_adv)
            if certificate.non_finite:
                raise RunError(f"the attack gave {certificate.non_finite} pixels that are not finite: is the network's gradient finite?")
            found = observe(model, x_adv, part.labels)
            worst = found if worst is None else _where(~(found.loss < worst.loss), found, worst)
            bar.update(len(part))
        records.append(worst)
    return _joined(records)


def evaluate(model: nn.Module, split: Split, *, attack: Callable, cross_entropy: Callable, weighted: Callable[[float], Callable],
             alphas: tuple[float, ...], num_restarts: int, batch_size: int) -> tuple[dict, dict[str, Tensor], Certificate]:
    """A_nat, A_rob, A_sa and A_tr of a model in eval mode (Zeng et al., AAAI 2021, Eq. 17-19).

    A_rob     accuracy at the adversarial examples of the unweighted attack, which maximises `cross_entropy`
    A_sa      those same examples, weighted by exp(-alpha * margin): one attack serves A_rob and every alpha
    A_tr      the same weighting at the examples of an attack that maximises `weighted(alpha)`, weight times cross-entropy

    Returns the accuracies in percent with `ci95` and `effective_size` under the same keys, `class_accuracy` and `confusion` at the
    examples of A_nat and of A_rob, and `at_chance`, those of these two that are no better than a guess; the per-example results (`label`,
    `prediction`, `prediction_adv`, `margin_adv`, `loss_adv`, all [N]);
    and the certificate.
    """
    alphas = tuple(dict.fromkeys(alphas))
    certificate, num_classes = Certificate(), num_outputs(model, split)
    total = len(split) * num_restarts * (1 + len(alphas))
    with tqdm(total=total, unit="attack", unit_scale=True, disable=None, leave=False) as bar:
        clean = record_clean(model, split, batch_size)

        def under(loss_fn: Callable, name: str) -> Record:
            bar.set_description(name)
            return record_attack(model, split, batch_size, attack, loss_fn, num_restarts, certificate, bar)

        plain = under(cross_entropy, "A_rob")
        trained = {alpha: under(weighted(alpha), f"A_tr({alpha:g})") for alpha in alphas}
    return *accuracies(split, num_classes, clean, plain, trained), certificate


def accuracies(split: Split, num_classes: int, clean: Record, plain: Record, trained: dict[float, Record],
               ) -> tuple[dict, dict[str, Tensor]]:
    """`evaluate`'s result and per-example results from the records of the clean images, of A_rob's attack, and of A_tr's at each alpha."""
    y, alphas = split.labels.cpu(), tuple(trained)
    result = summary({"A_nat": weighted_accuracy(clean.prediction == y, clean.margin, 0.0),
                      "A_rob": weighted_accuracy(plain.prediction == y, plain.margin, 0.0),
                      "A_sa": {str(a): weighted_accuracy(plain.prediction == y, plain.margin, a) for a in map(float, alphas)},
                      "A_tr": {str(float(a)): weighted_accuracy(r.prediction == y, r.margin, a) for a, r in trained.items()}})
    for name, measure in (("class_accuracy", class_accuracy), ("confusion", confusion)):
        result[name] = {metric: measure(record.prediction, y, num_classes) for metric, record in (("A_nat", clean), ("A_rob", plain))}
    result["at_chance"] = metrics_at_chance(result["confusion"])
    examples = {"index": split.index.cpu(), "label": y, "prediction": clean.prediction, "prediction_adv": plain.prediction,
                "margin_adv": plain.margin, "loss_adv": plain.loss}
    examples |= {f"prediction_tr_{alpha:g}": record.prediction for alpha, record in trained.items()}
    examples |= {f"margin_tr_{alpha:g}": record.margin for alpha, record in trained.items()}
    return result, examples


def summary(measured: dict) -> dict:
    """Nested `weighted_accuracy` results as percentages under their names, with `ci95` and `effective_size` beside them."""

    def pick(entry: dict, take: Callable) -> object:
        return take(entry) if "accuracy" in entry else {name: pick(part, take) for name, part in entry.items()}

    return {**pick(measured, lambda m: round(100 * m["accuracy"], 4)),
            "ci95": pick(measured, lambda m: [round(100 * bound, 4) for bound in m["ci95"]]),
            "effective_size": pick({k: measured[k] for k in ("A_sa", "A_tr")}, lambda m: round(m["effective_size"], 1))}


def class_accuracy(prediction: Tensor, y: Tensor, num_classes: int = 0) -> list[float | None]:
    """Accuracy of each class in percent, None for a class without examples; at least `num_classes` entries."""
    num_classes = max(num_classes, int(y.max()) + 1)
    counts, hits = torch.bincount(y, minlength=num_classes), torch.bincount(y[prediction == y], minlength=num_classes)
    return [round(100 * hit / count, 4) if count else None for hit, count in zip(hits.tolist(), counts.tolist())]


def confusion(prediction: Tensor, y: Tensor, num_classes: int = 0) -> list[list[int]]:
    """The number of examples of each true class (row) predicted as each class (column), [K, K]; K is at least `num_classes`."""
    num_classes = max(num_classes, int(y.max()) + 1, int(prediction.max()) + 1)
    return torch.bincount(num_classes * y + prediction, minlength=num_classes**2).view(num_classes, num_classes).tolist()


def held_out_accuracy(model: nn.Module, split: Split, *, attack: Callable, loss_fn: Callable, batch_size: int = 500) -> dict[str, float]:
    """A_nat and A_rob in percent, one attack an example, in eval mode and float32: the monitor of a training run."""
    training, labels = model.training, split.labels.cpu()
    model.eval()
    with tqdm(total=len(split), desc="held-out images", unit="image", disable=None, leave=False) as bar:
        clean = record_clean(model, split, batch_size)
        attacked = record_attack(model, split, batch_size, attack, loss_fn, 1, Certificate(), bar)
    model.train(training)
    return {name: 100 * float((record.prediction == labels).double().mean()) for name, record in (("A_nat", clean), ("A_rob", attacked))}


def _parts(split: Split, batch_size: int) -> list[Split]:
    return [split[slice(first, first + batch_size)] for first in range(0, len(split), batch_size)]


def _where(choose: Tensor, left: Record, right: Record) -> Record:
    return Record(*(torch.where(choose, a, b) for a, b in zip(vars(left).values(), vars(right).values())))


def _joined(records: list[Record]) -> Record:
    return Record(*(torch.cat(column) for column in zip(*(vars(record).values() for record in records))))
