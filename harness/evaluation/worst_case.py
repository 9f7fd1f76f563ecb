"""Accuracy under each column of strong attacks, and at the worst case over all that a record holds.

A column is one attack or an ensemble, which breaks an example when a member does.
"""
import torch
from torch import Tensor

from attacks.catalogue import Attack
from harness.evaluation.accuracies import class_accuracy, confusion, percent, proportion
from harness.evaluation.attack_record import AttackRecord, broken
from harness.evaluation.budget import at_budgets
from harness.evaluation.metrics import weighted_accuracy
from harness.evaluation.predictions import Predictions


def columns_of(record: AttackRecord, y: Tensor, attacks: dict[str, Attack],
               columns: dict[str, tuple[str, ...]]) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """Column -> accuracy in percent with interval, count, settings, seconds; column -> who stands, [N] bool.

    A column whose attack sees the first images only says how many those are, and is about them.
    """
    correct, facts, standing = record.rows["clean"]["prediction"] == y, {}, {}
    for name, members in columns.items():
        standing[name] = correct & ~torch.stack([broken(record.rows[member], y) for member in members]).any(0)
        count = min(attacks[member].limit or len(y) for member in members)
        settings = attacks[name].settings if name in attacks else {"members": list(members)}
        seconds = round(sum(record.seconds[member] for member in members), 1)
        facts[name] = proportion(standing[name][:count]) | {"settings": settings, "seconds": seconds}
    return facts, standing


def worst_case(rows: dict[str, dict[str, Tensor]], y: Tensor) -> Predictions:
    """Of all that is recorded of an example, clean image included, what has the lowest margin.

    A misclassification comes before all else. A_rob's and A_tr's attacks go on to their last step on every
    example, PGD's columns on those that these leave. The members of an ensemble are done at their first
    success: where only they succeed the margin is just below 0, an upper bound on the lowest.
    """
    margins = [row["margin"].nan_to_num(torch.inf) for row in rows.values()]  # NaN where it was not attacked
    margins = torch.stack(margins)  # [attacks, N]
    hits = torch.stack([broken(row, y) for row in rows.values()])
    lowest = torch.where(hits.any(0) & ~hits, torch.inf, margins).argmin(0, keepdim=True)
    fields = (torch.stack([row[key] for row in rows.values()]) for key in ("prediction", "loss", "margin"))
    return Predictions(*(field.gather(0, lowest).squeeze(0) for field in fields))


def summary_of(worst: Predictions, y: Tensor, alphas: tuple[float, ...], budgets: tuple[float, ...],
               num_classes: int) -> dict:
    """Accuracy, A_sa at each alpha and KL budget, accuracy per class and confusion at the worst case.

    A_tr is A_sa here: the adversary of lowest margin is the one that maximises the weighted loss as well.
    """
    correct = worst.prediction == y
    weighted = {str(float(alpha)): weighted_accuracy(correct, worst.margin, alpha) for alpha in alphas}
    limited, more = at_budgets(worst, y, budgets)
    found = proportion(correct) | more
    for metric, measured, size in (("A_sa", weighted, "effective_size"),
                                   ("A_sa_kl", limited, "A_sa_kl_effective_size")):
        found[metric] = {name: round(100 * entry["accuracy"], 4) for name, entry in measured.items()}
        found[f"{metric}_ci95"] = {name: percent(entry["ci95"]) for name, entry in measured.items()}
        found[size] = {name: round(entry["effective_size"], 1) for name, entry in measured.items()}
    return found | {
        "class_accuracy": class_accuracy(worst.prediction, y, num_classes),
        "confusion": confusion(worst.prediction, y, num_classes)}
