"""The result of an evaluation, from a whole record."""
from torch import Tensor

from attacks.catalogue import Attack
from harness.evaluation import sanity
from harness.evaluation.accuracies import accuracies
from harness.evaluation.attack_record import AttackRecord
from harness.evaluation.attacking import Columns, Task
from harness.evaluation.predictions import Predictions, num_outputs
from harness.evaluation.verdict import certify, judge, probe
from harness.evaluation.worst_case import columns_of, summary_of, worst_case


def result_of(record: AttackRecord, task: Task, attacks: dict[str, Attack], columns: Columns,
              alphas: tuple[float, ...], budgets: tuple[float, ...],
              seed: int) -> tuple[dict, dict[str, Tensor]]:
    """The figures of a whole record, whether to believe them, and the per-example results behind them."""
    rows, y, num_classes = record.rows, task.split.labels.cpu(), num_outputs(task.model, task.split)
    trained = {alpha: predictions_of(rows[f"A_tr_{alpha:g}"]) for alpha in dict.fromkeys(alphas)}
    clean, plain = predictions_of(rows["clean"]), predictions_of(rows["A_rob"])
    result, examples = accuracies(task.split, num_classes, clean, plain, trained, budgets)
    if columns:
        result["attacks"], standing = columns_of(record, y, attacks, columns)
        worst = worst_case(rows, y)
        result["worst_case"] = summary_of(worst, y, tuple(trained), budgets, num_classes)
        result["worst_case"]["attacks"] = list(attacks)
        examples |= {"prediction_worst": worst.prediction, "margin_worst": worst.margin}
        examples |= {f"correct_{name}": stands for name, stands in standing.items()}
    certificate, probed = certify(rows, attacks, task.epsilon), probe(task, record, seed)
    findings = judge(probed, rows, y, attacks, result, certificate.broken(task.epsilon))
    result |= {"verdict": sanity.verdict(findings), "evidence": sanity.as_plain(findings), "probe": probed}
    return result | {"certificate": certificate.as_plain(task.epsilon)}, examples


def predictions_of(row: dict[str, Tensor]) -> Predictions:
    """A row of the record."""
    return Predictions(row["prediction"], row["loss"], row["margin"])
