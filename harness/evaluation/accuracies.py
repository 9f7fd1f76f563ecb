"""A_nat, A_rob, A_sa and A_tr of an evaluation, by class and with intervals, from the predictions behind them."""
from collections.abc import Callable

import torch
from torch import Tensor

from harness.datasets.batches import Split
from harness.evaluation.chance import metrics_at_chance
from harness.evaluation.metrics import weighted_accuracy, wilson_interval
from harness.evaluation.predictions import Predictions


def accuracies(split: Split, num_classes: int, clean: Predictions, plain: Predictions, trained: dict[float, Predictions],
               ) -> tuple[dict, dict[str, Tensor]]:
    """A_nat, A_rob, A_sa and A_tr (Zeng et al., AAAI 2021, Eq. 17-19), and the per-example results behind them.

    A_nat     of `clean`, the predictions without an attack
    A_rob     of `plain`, those at the adversarial examples of the unweighted attack
    A_sa      of `plain` too, weighted by exp(-alpha * margin): one attack serves A_rob and every alpha
    A_tr      of `trained`, alpha -> predictions at the examples of an attack that maximises weight times cross-entropy

    Returns the accuracies in percent with `ci95` and `effective_size` under the same keys, `class_accuracy` and `confusion` at the
    examples of A_nat and of A_rob, and `at_chance`, those of these two that are no better than a guess; and the per-example results,
    `label`, `prediction`, `prediction_adv`, `margin_adv`, `loss_adv` and `prediction_tr_ALPHA`, `margin_tr_ALPHA`, all [N].
    """
    y = split.labels.cpu()
    result = summary({"A_nat": _measured(clean, y, 0.0), "A_rob": _measured(plain, y, 0.0),
                      "A_sa": {str(float(alpha)): _measured(plain, y, alpha) for alpha in trained},
                      "A_tr": {str(float(alpha)): _measured(found, y, alpha) for alpha, found in trained.items()}})
    for name, measure in (("class_accuracy", class_accuracy), ("confusion", confusion)):
        result[name] = {metric: measure(found.prediction, y, num_classes) for metric, found in (("A_nat", clean), ("A_rob", plain))}
    result["at_chance"] = metrics_at_chance(result["confusion"])
    examples = {"index": split.index.cpu(), "label": y, "prediction": clean.prediction, "prediction_adv": plain.prediction,
                "margin_adv": plain.margin, "loss_adv": plain.loss}
    examples |= {f"prediction_tr_{alpha:g}": found.prediction for alpha, found in trained.items()}
    examples |= {f"margin_tr_{alpha:g}": found.margin for alpha, found in trained.items()}
    return result, examples


def _measured(found: Predictions, y: Tensor, alpha: float) -> dict:
    return weighted_accuracy(found.prediction == y, found.margin, alpha)


def summary(measured: dict) -> dict:
    """Nested `weighted_accuracy` results as percentages under their names, with `ci95` and `effective_size` beside them."""

    def pick(entry: dict, take: Callable) -> object:
        return take(entry) if "accuracy" in entry else {name: pick(part, take) for name, part in entry.items()}

    return {**pick(measured, lambda m: round(100 * m["accuracy"], 4)),
            "ci95": pick(measured, lambda m: [round(100 * bound, 4) for bound in m["ci95"]]),
            "effective_size": pick({k: measured[k] for k in ("A_sa", "A_tr")}, lambda m: round(m["effective_size"], 1))}


def proportion(correct: Tensor) -> dict:
    """The share of `correct` [N] bool in percent, its 95 % interval, and N."""
    accuracy = float(correct.double().mean())
    low, high = wilson_interval(accuracy, len(correct))
    return {"accuracy": round(100 * accuracy, 4), "ci95": [round(100 * low, 4), round(100 * high, 4)], "num_examples": len(correct)}


def class_accuracy(prediction: Tensor, y: Tensor, num_classes: int = 0) -> list[float | None]:
    """Accuracy of each class in percent, None for a class without examples; at least `num_classes` entries."""
    num_classes = max(num_classes, int(y.max()) + 1)
    counts, hits = torch.bincount(y, minlength=num_classes), torch.bincount(y[prediction == y], minlength=num_classes)
    return [round(100 * hit / count, 4) if count else None for hit, count in zip(hits.tolist(), counts.tolist())]


def confusion(prediction: Tensor, y: Tensor, num_classes: int = 0) -> list[list[int]]:
    """The number of examples of each true class (row) predicted as each class (column), [K, K]; K is at least `num_classes`."""
    num_classes = max(num_classes, int(y.max()) + 1, int(prediction.max()) + 1)
    return torch.bincount(num_classes * y + prediction, minlength=num_classes**2).view(num_classes, num_classes).tolist()
