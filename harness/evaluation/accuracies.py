"""A_nat, A_rob, A_sa and A_tr, by class and with intervals, from the predictions behind them."""
from collections.abc import Callable

import torch
from torch import Tensor

from harness.datasets.split import Split
from harness.evaluation.budget import at_budgets
from harness.evaluation.chance import metrics_at_chance
from harness.evaluation.metrics import weighted_accuracy, wilson_interval
from harness.evaluation.predictions import Predictions


def accuracies(split: Split, num_classes: int, clean: Predictions, plain: Predictions,
               trained: dict[float, Predictions],
             budgets: tuple[float, ...]) -> tuple[dict, dict[str, Tensor]]:
    """A_nat, A_rob, A_sa and A_tr (Zeng et al., AAAI 2021, Eq. 17-19), and the per-example results.

    A_nat     of `clean`, the predictions without an attack
    A_rob     of `plain`, those at the adversarial examples of the unweighted attack
    A_sa      of `plain` too, weighted by exp(-alpha * margin): one attack serves A_rob and every alpha
    A_tr      of `trained`: alpha -> predictions at the examples of an attack on weight times cross-entropy
    A_sa_kl   A_sa at the alpha that spends each KL budget in nats; `alpha_of_kl` is that alpha

    Returns the accuracies in percent with `ci95` and `effective_size` under the same keys, `loss_kl` and
    `loss_cvar` of `plain`, `class_accuracy` and `confusion` at the examples of A_nat and of A_rob, and
    `at_chance`, those of these two that are no better than a guess; and the per-example results, [N] each:
    `index`, `label`, `prediction`, `prediction_adv`, `margin_adv`, `loss_adv`, `prediction_tr_ALPHA`,
    `margin_tr_ALPHA`.
    """
    y = split.labels.cpu()
    selective = {str(float(alpha)): _measured(plain, y, alpha) for alpha in trained}
    targeted = {str(float(alpha)): _measured(found, y, alpha) for alpha, found in trained.items()}
    limited, more = at_budgets(plain, y, budgets)
    result = summary({"A_nat": _measured(clean, y, 0.0), "A_rob": _measured(plain, y, 0.0), "A_sa": selective,
                      "A_tr": targeted, "A_sa_kl": limited}) | more
    for name, measure in (("class_accuracy", class_accuracy), ("confusion", confusion)):
        result[name] = {"A_nat": measure(clean.prediction, y, num_classes),
                        "A_rob": measure(plain.prediction, y, num_classes)}
    result["at_chance"] = metrics_at_chance(result["confusion"])
    examples = {"index": split.index.cpu(), "label": y, "prediction": clean.prediction,
                "prediction_adv": plain.prediction, "margin_adv": plain.margin, "loss_adv": plain.loss}
    examples |= {f"prediction_tr_{alpha:g}": found.prediction for alpha, found in trained.items()}
    examples |= {f"margin_tr_{alpha:g}": found.margin for alpha, found in trained.items()}
    return result, examples


def _measured(found: Predictions, y: Tensor, alpha: float) -> dict:
    return weighted_accuracy(found.prediction == y, found.margin, alpha)


def summary(measured: dict) -> dict:
    """Nested `weighted_accuracy` results in percent, with `ci95` and `effective_size` of the same names."""

    def pick(entry: dict, take: Callable[[dict], object]) -> object:
        if "accuracy" in entry:
            return take(entry)
        return {name: pick(part, take) for name, part in entry.items()}

    weighted = {name: part for name, part in measured.items() if "accuracy" not in part}
    return {**pick(measured, lambda m: round(100 * m["accuracy"], 4)),
            "ci95": pick(measured, lambda m: percent(m["ci95"])),
            "effective_size": pick(weighted, lambda m: round(m["effective_size"], 1))}


def proportion(correct: Tensor) -> dict:
    """The share of `correct` [N] bool in percent, its 95 % interval, and N."""
    accuracy = float(correct.double().mean())
    return {"accuracy": round(100 * accuracy, 4), "ci95": percent(wilson_interval(accuracy, len(correct))),
            "num_examples": len(correct)}


def percent(interval: tuple[float, float]) -> list[float]:
    """An interval in [0, 1] in percent, to four digits."""
    return [round(100 * bound, 4) for bound in interval]


def class_accuracy(prediction: Tensor, y: Tensor, num_classes: int = 0) -> list[float | None]:
    """Accuracy of each class in percent, None for one without examples; at least `num_classes` entries."""
    num_classes = max(num_classes, int(y.max()) + 1)
    counts = torch.bincount(y, minlength=num_classes).tolist()
    hits = torch.bincount(y[prediction == y], minlength=num_classes).tolist()
    return [round(100 * hit / count, 4) if count else None for hit, count in zip(hits, counts)]


def confusion(prediction: Tensor, y: Tensor, num_classes: int = 0) -> list[list[int]]:
    """Examples of each class (row) that are predicted as each class (column), [K, K]; K >= `num_classes`."""
    num_classes = max(num_classes, int(y.max()) + 1, int(prediction.max()) + 1)
    pairs = torch.bincount(num_classes * y + prediction, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes).tolist()
