"""Accuracy under attack: closed forms on a linear model, records independent of batches, the worst restart,
the certificate; the report."""
import json
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from attacks.catalogue import weighted_attacks
from attacks.pgd import cross_entropy, pgd_by_index
from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from harness.errors import UserError
from harness.evaluation import report
from harness.evaluation.accuracies import class_accuracy, confusion, summary
from harness.evaluation.attack_record import AttackRecord
from harness.evaluation.attacking import Task, run
from harness.evaluation.metrics import weighted_accuracy
from harness.evaluation.pipeline import measured_before
from harness.evaluation.predictions import BatchInvariant, held_out_accuracy, observe
from harness.evaluation.result import predictions_of, result_of
from harness.evaluation.subject import CHECKPOINTS, Ball, Subject, find_checkpoints
from harness.evaluation.verdict import certify
from losses.margin import margin_weights

ALPHAS = (0.0, 1.0, 2.0)
EPSILON = 0.1
SIZE = (1, 2, 4)


class Linear(nn.Module):
    """Logits (0, w x + b): the worst point of the ball is x - epsilon sign(w) for class 1,
    x + epsilon sign(w) for class 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -2.0, 1.0, 4.0, -1.0, 2.0, -3.0, 0.5]))
        self.b = -float(self.w.detach().sum()) / 2

    def forward(self, x):
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


class Pixels(nn.Module):
    """The pixels, ten times, as the logits: an attack on it says outright what the logits are to be."""

    def forward(self, x):
        return 10 * x.flatten(1)


def split_of(count, shape=SIZE, low=30, high=226, classes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(low, high, (count, *shape), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(classes, (count,), generator=generator), 1000 + torch.arange(count))


def linear_split():
    """Images that the linear model gets right four times in five;
    no pixel comes closer than epsilon to 0 or 1."""
    split = split_of(60)
    right = Linear()(to_unit(split.images)).argmax(1)
    return Split(split.images, torch.where(torch.arange(60) % 5 > 0, right, 1 - right), split.index)


def weighted(alpha):
    return lambda logits, y: margin_weights(logits, y, alpha) * cross_entropy(logits, y)


def recorded(model, split, attacks, epsilon=1.0, batch_size=16):
    """The record of attacks on every image, and the task."""
    task = Task(BatchInvariant(model.eval()), split, epsilon, "linf", batch_size)
    with tempfile.TemporaryDirectory() as folder:
        record = AttackRecord(Path(folder), {}, len(split))
        run(record, task, attacks, {})
    return record, task


def evaluate(model, split, *, attack, cross_entropy=cross_entropy, weighted=weighted, alphas=(),
             budgets=(0.2,), num_restarts=1, batch_size=4, epsilon=1.0):
    """The result, the per-example results and the certificate of an evaluation."""
    attacks = weighted_attacks(attack, cross_entropy, weighted, alphas, num_restarts)
    record, task = recorded(model, split, attacks, epsilon, batch_size)
    result, examples = result_of(record, task, attacks, {}, alphas, budgets, 0)
    return result, examples, certify(record.rows, attacks, epsilon)


def evaluated(model, split, *, batch_size=16, num_restarts=2, alphas=ALPHAS, budgets=(0.2,), **options):
    options = {"epsilon": EPSILON, "step_size": 0.05, "num_steps": 6} | options
    return evaluate(model, split, attack=partial(pgd_by_index, seed=0, **options), alphas=alphas,
                    budgets=budgets, num_restarts=num_restarts, batch_size=batch_size,
                    epsilon=options["epsilon"])


def attacked(model, split, attack, num_restarts=1, batch_size=4, epsilon=1.0):
    """The predictions and the certificate of any attack (x, y, index, restart) -> x_adv."""
    def ours(model, x, y, index, restart, loss_fn):
        return attack(x, y, index, restart)

    attacks = weighted_attacks(ours, cross_entropy, None, (), num_restarts)
    record, _ = recorded(model, split, attacks, epsilon, batch_size)
    return predictions_of(record.rows["A_rob"]), certify(record.rows, attacks, epsilon)


def probability_margin(score, y):
    """tanh(score / 2), the probability margin of class 1 where the logits are (0, score),
    turned towards y."""
    return np.tanh(score / 2) * (2 * y - 1)


# A linear model, whose adversary is known

def closed_form(split, epsilon):
    """Margins of the linear model in NumPy, at the images and at the worst points of their balls."""
    model = Linear()
    w, y = model.w.detach().double().numpy(), split.labels.numpy()
    score = (split.images.double().numpy() / 255).reshape(len(split), -1) @ w + model.b
    worst = score - epsilon * np.abs(w).sum() * (2 * y - 1)
    return probability_margin(score, y), probability_margin(worst, y)


def accuracy(margin, alpha):
    weights = np.exp(-alpha * margin)
    return 100 * (weights * (margin > 0)).sum() / weights.sum()


def test_the_accuracies_of_a_linear_model_are_those_of_its_closed_form():
    split = linear_split()
    clean, worst = closed_form(split, EPSILON)
    assert 20 < accuracy(worst, 0) < accuracy(clean, 0) - 10
    result, _, certificate = evaluated(Linear(), split)
    assert result["A_nat"] == pytest.approx(accuracy(clean, 0), abs=1e-4)
    assert result["A_rob"] == pytest.approx(accuracy(worst, 0), abs=1e-4)
    # weight times cross-entropy falls with the margin as the cross-entropy does:
    # both attacks end at one point
    for alpha in ALPHAS:
        for metric in ("A_sa", "A_tr"):
            assert result[metric][str(alpha)] == pytest.approx(accuracy(worst, alpha), abs=2e-3)
    assert certificate.broken(EPSILON) == ""
    assert certificate.max_perturbation == pytest.approx(EPSILON, abs=1e-6)


def test_the_examples_are_those_behind_the_accuracies():
    split = linear_split()
    clean, worst = closed_form(split, EPSILON)
    _, examples, _ = evaluated(Linear(), split, alphas=(1.5,))
    y = split.labels
    assert torch.equal(examples["label"], y) and torch.equal(examples["index"], split.index)
    assert (np.array_equal(examples["prediction"] == y, clean > 0)
            and np.array_equal(examples["prediction_adv"] == y, worst > 0))
    np.testing.assert_allclose(examples["margin_adv"], worst, atol=1e-5)
    np.testing.assert_allclose(examples["loss_adv"], np.logaddexp(0, -2 * np.arctanh(worst)), atol=1e-5)
    np.testing.assert_allclose(examples["margin_tr_1.5"], worst, atol=1e-5)
    assert torch.equal(examples["prediction_tr_1.5"], examples["prediction_adv"])


def test_at_alpha_0_the_selective_accuracy_is_the_robust_one():
    result, *_ = evaluated(Linear(), linear_split())
    assert result["A_sa"]["0.0"] == result["A_tr"]["0.0"] == result["A_rob"]
    assert result["ci95"]["A_sa"]["0.0"] == result["ci95"]["A_rob"]
    assert result["effective_size"]["A_sa"]["0.0"] == 60
    assert result["A_sa"]["2.0"] < result["A_sa"]["1.0"] < result["A_rob"]


def test_without_an_attack_the_robust_accuracy_is_the_natural_one():
    result, _, certificate = evaluated(Linear(), linear_split(), epsilon=0.0, num_steps=1)
    assert result["A_rob"] == result["A_nat"] == 80 and certificate.max_perturbation == 0


def test_the_result_is_plain_values_with_an_interval_around_every_accuracy():
    result, *_ = evaluated(Linear(), linear_split())
    result = json.loads(json.dumps(result))
    for metric in ("A_nat", "A_rob"):
        low, high = result["ci95"][metric]
        assert 0 <= low < result[metric] < high <= 100
    for metric in ("A_sa", "A_tr"):
        assert (list(result[metric]) == list(result["ci95"][metric])
                == list(result["effective_size"][metric]) == ["0.0", "1.0", "2.0"])
    assert (list(result["A_sa_kl"]) == list(result["ci95"]["A_sa_kl"])
            == list(result["effective_size"]["A_sa_kl"]) == list(result["alpha_of_kl"]) == ["0.2"])


def test_the_accuracy_at_a_budget_is_a_sa_at_the_alpha_that_is_given_beside_it():
    split, budgets = linear_split(), (0.0, 0.05, 0.2, 9.0)
    result, *_ = evaluated(Linear(), split, budgets=budgets)
    worst = closed_form(split, EPSILON)[1]
    for budget in ("0.05", "0.2"):
        alpha = result["alpha_of_kl"][budget]
        assert result["A_sa_kl"][budget] == pytest.approx(accuracy(worst, alpha), abs=2e-3)
        low, high = result["ci95"]["A_sa_kl"][budget]
        assert low < result["A_sa_kl"][budget] < high
    assert result["A_sa_kl"]["0.0"] == result["A_rob"] and result["alpha_of_kl"]["0.0"] == 0
    assert result["ci95"]["A_sa_kl"]["0.0"] == result["ci95"]["A_rob"]
    assert (result["A_sa_kl"]["9.0"], result["alpha_of_kl"]["9.0"]) == (0, None)  # all on the worst example


def test_the_losses_worst_means_are_at_the_examples_of_a_rob():
    result, examples, _ = evaluated(Linear(), linear_split(), budgets=(0.0, 0.2, 9.0))
    loss = examples["loss_adv"]
    assert result["loss_kl"]["0.0"] == pytest.approx(float(loss.mean()), abs=1e-6)
    assert result["loss_kl"]["9.0"] == pytest.approx(float(loss.max()), abs=1e-6)
    assert result["loss_kl"]["0.0"] < result["loss_kl"]["0.2"] < result["loss_kl"]["9.0"]
    assert result["loss_cvar"] == {"0.1": pytest.approx(float(loss.topk(6).values.mean()), abs=1e-6),
                                   "0.01": result["loss_kl"]["9.0"]}


def test_an_alpha_given_twice_or_as_a_whole_number_is_attacked_and_named_once():
    asked = []
    result, *_ = evaluate(Linear(), split_of(5), attack=lambda model, x, *_: x, weighted=asked.append,
                          alphas=(1, 1.0))
    assert list(result["A_sa"]) == list(result["A_tr"]) == ["1.0"] and asked == [1]


def test_no_alphas_leave_the_plain_accuracies():
    result, *_ = evaluated(Linear(), linear_split(), alphas=())
    assert result["A_sa"] == result["A_tr"] == {} and result["A_nat"] == 80


def test_each_accuracy_is_measured_at_the_examples_of_its_own_attack():
    split = linear_split()
    wrong = (torch.arange(60) % 3 == 0).view(-1, 1, 1, 1)

    # the weighted one fools every third example, the other none
    def attack(model, x, y, index, restart, loss_fn):
        target = torch.where(wrong.flatten(), 1 - y, y) if loss_fn == "weighted" else y
        return (model.network.w.sign().view(1, *SIZE) * (2 * target - 1).view(-1, 1, 1, 1) + 1).detach() / 2

    result, examples, _ = evaluate(Linear(), split, attack=attack, cross_entropy="plain",
                                   weighted=lambda alpha: "weighted",
                                   alphas=(0.0,), num_restarts=1, batch_size=60)
    assert ((result["A_nat"], result["A_rob"], result["A_sa"]["0.0"], result["A_tr"]["0.0"])
            == (80, 100, 100, pytest.approx(66.6667)))
    assert torch.equal(examples["prediction_tr_0"] != split.labels, wrong.flatten())
    assert torch.equal(examples["margin_tr_0"] < 0, wrong.flatten()) and (examples["margin_adv"] > 0).all()


def test_one_unweighted_attack_serves_every_alpha_and_each_alpha_has_its_own():
    calls = []

    def attack(model, x, y, index, restart, loss_fn):
        calls.append((loss_fn, restart, len(x)))
        return x

    evaluate(Linear(), split_of(5), attack=attack, cross_entropy="plain", weighted=lambda alpha: alpha,
             alphas=(1.0, 2.0), num_restarts=3, batch_size=4)
    expected = [(loss_fn, restart, size)
                for loss_fn in ("plain", 1.0, 2.0) for restart in range(3) for size in (4, 1)]
    assert sorted(calls, key=str) == sorted(expected, key=str)


def test_a_summary_is_in_percent():
    entry = weighted_accuracy(torch.tensor([True, True, False]), torch.tensor([0.5, 0.2, -0.1]), 0.0)
    found = summary({"A_nat": entry, "A_rob": entry, "A_sa": {"0.0": entry}, "A_tr": {}})
    assert (found["A_nat"] == 66.6667
            and found["ci95"]["A_sa"]["0.0"] == [round(100 * bound, 4) for bound in entry["ci95"]])
    assert found["effective_size"] == {"A_sa": {"0.0": 3.0}, "A_tr": {}}


# Batches and restarts

def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def pushed(split, batch_size, num_restarts=2, seed=5):
    """The network's predictions under a PGD of two big steps, in which the start shows in the end."""
    attack = partial(pgd_by_index, network(), seed=seed, epsilon=0.3, step_size=0.2, num_steps=2,
                     loss_fn=cross_entropy)
    return attacked(network(), split, attack, num_restarts, batch_size)[0]


def test_the_record_does_not_depend_on_the_batch_size():
    split = split_of(20, classes=3)
    records = {(size, seed): pushed(split, size, seed=seed)
               for size, seed in ((1, 5), (7, 5), (20, 5), (20, 6))}
    for size in (1, 7):
        assert torch.equal(records[size, 5].prediction, records[20, 5].prediction)
        torch.testing.assert_close(records[size, 5].loss, records[20, 5].loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(records[size, 5].margin, records[20, 5].margin, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(records[20, 6].loss, records[20, 5].loss, rtol=1e-3)


def test_the_accuracies_do_not_depend_on_the_batch_size():
    split = split_of(20, classes=3)
    first, *others = (evaluated(network(), split, batch_size=size, epsilon=0.3, step_size=0.2, num_steps=2)[0]
                      for size in (20, 1, 7))
    for result in others:
        assert result["A_rob"] == first["A_rob"] and result["class_accuracy"] == first["class_accuracy"]
        assert list(result["A_sa"].values()) == pytest.approx(list(first["A_sa"].values()), abs=1e-3)
        assert list(result["A_tr"].values()) == pytest.approx(list(first["A_tr"].values()), abs=1e-3)


def test_the_record_of_an_example_is_that_of_the_example_alone():
    split, rows = split_of(9, classes=3), torch.tensor([7, 2, 4])
    torch.testing.assert_close(pushed(split[rows], 9).loss, pushed(split, 9).loss[rows], rtol=1e-5, atol=1e-6)


def test_of_the_restarts_the_one_of_largest_cross_entropy_counts_for_each_example():
    points = torch.tensor([[[0.9, 0.1, 0.1], [0.2, 0.5, 0.1], [0.5, 0.4, 0.1]],    # restart 0: images a, b, c
                           [[0.1, 0.9, 0.1], [0.2, 0.9, 0.1], [0.5, 0.4, 0.1]],    # restart 1
                           [[0.4, 0.5, 0.1], [0.5, 0.4, 0.1], [0.6, 0.1, 0.1]]])   # restart 2
    split = Split(torch.zeros(3, 1, 1, 3, dtype=torch.uint8), torch.tensor([0, 1, 0]), torch.arange(3))
    record, _ = attacked(Pixels(), split,
                         lambda x, y, index, restart: points[restart][index].view(-1, 1, 1, 3),
                         3, batch_size=2)
    expected = observe(Pixels(), torch.stack([points[1][0], points[2][1], points[0][2]]), split.labels)
    assert record.prediction.tolist() == [1, 0, 0]
    assert torch.equal(record.loss, expected.loss) and torch.equal(record.margin, expected.margin)


def test_the_cross_entropy_decides_even_where_another_restart_is_misclassified():
    right = torch.tensor([0.42, 0.41, 0.41])  # correct, with a large cross-entropy: three classes alike
    wrong = torch.tensor([0.60, 0.61, 0.00])  # misclassified, with a smaller one
    split = Split(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.tensor([0]), torch.arange(1))
    for order in ((right, wrong), (wrong, right)):
        record, _ = attacked(Pixels(), split,
                             lambda x, y, index, restart, order=order: order[restart].view(1, 1, 1, 3),
                             num_restarts=2)
        assert record.prediction.tolist() == [0]
        assert float(record.loss) == pytest.approx(float(observe(Pixels(), right[None], split.labels).loss))


def test_more_restarts_never_lower_the_loss():
    one, five = (pushed(split_of(20, classes=3), 20, restarts).loss for restarts in (1, 5))
    assert (five >= one).all() and (five > one + 1e-3).any()


def test_the_margin_is_that_of_the_probabilities_and_positive_where_correct():
    x, y = torch.tensor([[0.3, 0.1, 0.2], [0.3, 0.1, 0.2], [0.0, 0.9, 0.1]]), torch.tensor([0, 1, 1])
    p = np.exp(10 * x.double().numpy())
    p /= p.sum(1, keepdims=True)
    found = observe(Pixels(), x, y)
    np.testing.assert_allclose(found.loss, -np.log([p[0, 0], p[1, 1], p[2, 1]]), rtol=1e-5)
    np.testing.assert_allclose(found.margin, [p[0, 0] - p[0, 2], p[1, 1] - p[1, 0], p[2, 1] - p[2, 2]],
                               rtol=1e-5)
    assert found.prediction.tolist() == [0, 0, 1]


def test_the_clean_record_is_that_of_the_images_in_0_to_1():
    split = split_of(10, (1, 1, 3), classes=3)
    record, _ = recorded(Pixels(), split, {}, batch_size=4)
    assert torch.equal(record.rows["clean"]["loss"], observe(Pixels(), split.images / 255, split.labels).loss)


# The certificate

@pytest.mark.parametrize(("attack", "part"), (
    (lambda x, *_: x + 0.11, "a perturbation of 0.11"), (lambda x, *_: x - 0.11, "a perturbation of 0.11"),
    (lambda x, y, index, restart: x + 0.2 * ((index == 1003) & (restart == 1)).view(-1, 1, 1, 1),
     "a perturbation of 0.2"),
    (lambda x, *_: x.clamp(min=0.95) + 0.1, "outside [0, 1]"),
    (lambda x, *_: x.clamp(max=0.05) - 0.1, "outside [0, 1]")))
def test_the_certificate_finds_an_attack_that_leaves_its_ball_or_box(attack, part):
    _, certificate = attacked(Linear(), split_of(6), attack, num_restarts=2, epsilon=EPSILON)
    assert part in certificate.broken(EPSILON)


def test_a_certificate_of_an_attack_in_its_ball_and_box_is_clear():
    split = split_of(6, low=0, high=256)
    _, certificate = attacked(Linear(), split, lambda x, *_: (x + EPSILON).clamp(0, 1), epsilon=EPSILON)
    assert certificate.broken(EPSILON) == "" and certificate.max_pixel == 1.0
    assert (certificate.max_perturbation == pytest.approx(EPSILON, abs=1e-6)
            and certificate.broken(EPSILON - 1e-4))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_the_certificate_counts_what_is_not_finite(value):
    def attack(x, y, index, restart):
        x_adv = x + 0.05
        x_adv[1, 0, 0, 2] = x_adv[3, 0, 1, 1] = value
        return x_adv

    _, certificate = attacked(Linear(), split_of(4), attack, num_restarts=2, epsilon=EPSILON)
    assert (certificate.broken(EPSILON) == "2 adversarial examples are not finite"
            and certificate.non_finite == 2)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_broken_attack_is_not_blamed_on_the_checkpoint(value):
    def attack(model, x, y, index, restart, loss_fn):
        return torch.full_like(x, value)

    result, _, certificate = evaluate(network(), split_of(6, classes=3), attack=attack)
    assert (certificate.broken(EPSILON) and not result["certificate"]["ok"]
            and "certificate" in result["verdict"])


# Classes, and networks that do not fit

def test_the_accuracy_of_each_class_is_a_percentage_and_none_where_there_is_no_example():
    y, prediction = torch.tensor([0, 0, 0, 2, 2, 3]), torch.tensor([0, 1, 0, 2, 2, 1])
    assert class_accuracy(prediction, y) == [66.6667, None, 100.0, 0.0]


def test_a_prediction_beyond_the_labels_counts_as_wrong():
    assert class_accuracy(torch.tensor([0, 7]), torch.tensor([0, 0])) == [50.0]


def test_every_class_of_the_network_has_its_place_in_the_class_accuracies():
    # of the network's three classes the last is missing, as in the first few test images
    split = split_of(12, classes=2)
    result, *_ = evaluated(network(), split, alphas=())
    assert len(result["class_accuracy"]["A_nat"]) == 3 and result["class_accuracy"]["A_rob"][2] is None


def test_the_confusions_are_counted_by_true_class_and_predicted_class():
    y, prediction = torch.tensor([0, 0, 0, 2, 2, 3]), torch.tensor([0, 1, 0, 2, 0, 1])
    assert confusion(prediction, y) == [[2, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0]]
    assert (confusion(prediction, y, 5)
            == [[2, 1, 0, 0, 0], [0] * 5, [1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0] * 5])
    assert confusion(torch.tensor([2]), torch.tensor([0]), 2) == [[0, 0, 1], [0] * 3, [0] * 3]


def test_the_confusions_of_an_evaluation_agree_with_its_examples_and_accuracies():
    split = split_of(200, classes=3)
    result, examples, _ = evaluated(network(), split, alphas=(), epsilon=0.3, step_size=0.2, num_steps=2)
    assert json.loads(json.dumps(result["confusion"])) == result["confusion"]
    for metric, name in (("A_nat", "prediction"), ("A_rob", "prediction_adv")):
        expected = np.zeros((3, 3), int)
        np.add.at(expected, (split.labels.numpy(), examples[name].numpy()), 1)
        counts = np.array(result["confusion"][metric])
        assert (np.array_equal(counts, expected)
                and counts.sum(1).tolist() == torch.bincount(split.labels).tolist())
        assert (result["class_accuracy"][metric]
                == pytest.approx((100 * counts.diagonal() / counts.sum(1)).tolist(), abs=1e-4))
        assert result[metric] == pytest.approx(100 * counts.trace() / 200)
    assert result["confusion"]["A_nat"] != result["confusion"]["A_rob"]


def test_every_output_of_the_network_has_its_place_in_the_confusions():
    result, *_ = evaluated(network(), split_of(12, classes=2), alphas=())
    assert all(np.shape(result["confusion"][metric]) == (3, 3) for metric in ("A_nat", "A_rob"))


@pytest.mark.parametrize("model",
                         (nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), nn.Flatten(0), nn.Identity()))
def test_a_network_with_too_few_outputs_is_refused(model):
    split = split_of(6, classes=3, seed=1)
    assert int(split.labels.max()) == 2
    with pytest.raises(UserError, match="labels up to 2"):
        observe(BatchInvariant(model), to_unit(split.images), split.labels)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_network_whose_outputs_are_not_finite_is_refused(value):
    model = network()
    with torch.no_grad():
        model[3].bias[1] = value
    with pytest.raises(UserError, match="not finite"):
        evaluated(model, split_of(6))


# The monitor of a training run

class Watched(nn.Module):
    """A linear model that notes its mode at every call."""

    def __init__(self):
        super().__init__()
        self.linear, self.modes = Linear(), set()

    def forward(self, x):
        self.modes.add((self.training, self.linear.training))
        return self.linear(x)


@pytest.mark.parametrize("training", (True, False))
def test_the_held_out_accuracies_are_measured_in_eval_mode_and_the_mode_comes_back(training):
    model, split = Watched().train(training), linear_split()
    attack = partial(pgd_by_index, seed=0, epsilon=EPSILON, step_size=0.05, num_steps=6)
    found = held_out_accuracy(model, split, attack=attack, loss_fn=cross_entropy, batch_size=25)
    clean, worst = closed_form(split, EPSILON)
    assert found == {"A_nat": pytest.approx(accuracy(clean, 0)), "A_rob": pytest.approx(accuracy(worst, 0))}
    assert model.modes == {(False, False)} and {module.training for module in model.modules()} == {training}


# The report

def subject_of(name, epoch, path=None, **contents):
    architecture = {"name": "lenet", "num_classes": 2, "in_channels": 1, "mean": None, "std": None}
    contents = {"epoch": epoch, "architecture": architecture} | contents
    return Subject(name, path, contents, network(), split_of(4), ("a", "b"), "toy", "data", "lenet")


def test_the_checkpoints_of_a_run_come_in_their_order(tmp_path):
    with pytest.raises(UserError, match=r"no last\.pt or best\.pt"):
        find_checkpoints(str(tmp_path), 1)
    for name in ("best_ema", "best", "last_ema", "last", "other"):
        (tmp_path / f"{name}.pt").touch()
    assert ([name for name, _ in find_checkpoints(str(tmp_path), 1)]
            == ["last", "best", "last_ema", "best_ema"])
    (tmp_path / "best.pt").unlink()
    assert find_checkpoints(str(tmp_path), 1) == [(name, tmp_path / f"{name}.pt")
                                                  for name in ("last", "last_ema", "best_ema")]


def test_weights_are_measured_once_and_their_averages_once():
    results = {"last": {"epoch": 5}}
    assert (measured_before(subject_of("best", 5), results)
            and not measured_before(subject_of("best", 3), results))
    assert not measured_before(subject_of("last_ema", 5), results)
    results["last_ema"] = {"epoch": 5}
    assert (measured_before(subject_of("best_ema", 5), results)
            and not measured_before(subject_of("best_ema", 4), results))
    # foreign files do not say
    assert not measured_before(subject_of("best", None), {"last": {"epoch": None}})


def test_the_description_names_the_classes_and_what_the_training_was(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"weights")
    cfg = SimpleNamespace(alphas=(1.0,), kl_budgets=(0.2,), num_steps=1, num_restarts=1, start="clean",
                          arch="lenet", seed=0, batch_size=32)

    def described(**contents):
        subject = subject_of("last", 5, tmp_path / "last.pt", **contents)
        return report.describe(subject, Ball("linf", 0.1, 0.01), cfg, 10, torch.device("cpu"), 1.0)

    config = {"script": "train_at_mnist", "lr": 0.1, "lr_drop_after": (6, 8)}
    assert (described(config=config)["training"] == config
            and described(config=config)["classes"] == ["a", "b"])
    assert described()["training"] is None and described(architecture=None, config=config)["training"] is None


def test_a_row_of_a_matrix_is_a_line_of_the_json_and_nothing_is_lost():
    value = {"matrix": [[10, 0, 3], [1, None, -2.5e-07]], "pair": [0.5, 1],
             "names": ["a [1,  2]", 'say "[", ]', "b\n  c", "d\\"],
             "empty": [], "command": "x [\n 1,\n 2\n] [3,  4]",
             "deep": {"list": [{"a": [1, 2]}, [[], [True]]]}}
    text = report.dumps(value)
    assert json.loads(text) == value and list(json.loads(text)) == list(value)
    lines = text.splitlines()
    assert {"    [10, 0, 3],", "    [1, null, -2.5e-07]", '  "pair": [0.5, 1],'} <= set(lines)
    assert f'  "names": {json.dumps(value["names"])},' in lines
    counts = torch.randint(20, (200, 200), generator=torch.Generator().manual_seed(0)).tolist()
    text = report.dumps({"confusion": {"A_nat": counts, "A_rob": counts}})
    assert (json.loads(text)["confusion"]["A_rob"] == counts and len(text.splitlines()) == 400 + 8
            and len(text) < 400_000)


def results_of(*names):
    """Results and examples as an evaluation script hands them over."""
    found = {}
    for epoch, name in enumerate(names, 7):
        torch.manual_seed(epoch)
        result, examples, _ = evaluated(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), split_of(20, classes=3),
                                        alphas=(1.0,))
        threat = {"norm": "linf", "epsilon": EPSILON, "num_steps": 6, "step_size": 0.05, "start": "uniform",
                  "num_restarts": 2}
        about = {"epoch": epoch, "dataset": "toy", "classes": ["a", "b", "c"], "num_examples": 20,
                 "threat_model": threat}
        found[name] = result | about, examples
    return ({name: result for name, (result, _) in found.items()},
            {name: examples for name, (_, examples) in found.items()})


@pytest.mark.rendered
def test_a_result_is_written_with_the_examples_and_figures_of_every_checkpoint(tmp_path, capsys):
    results, examples = results_of(*CHECKPOINTS)
    report.write(tmp_path / "eval.json", results, examples)
    stems = ("eval", "eval_best", "eval_last_ema", "eval_best_ema")
    ends = (".npz", ".png", "_confusion.png")
    assert ({path.name for path in tmp_path.iterdir()}
            == {"eval.json", *(stem + end for stem in stems for end in ends)})
    written = json.loads((tmp_path / "eval.json").read_text())
    assert written == results["last"] | {name: results[name] for name in CHECKPOINTS[1:]}
    for stem, name in zip(stems, CHECKPOINTS):
        assert np.array_equal(np.load(tmp_path / f"{stem}.npz")["prediction_adv"],
                              examples[name]["prediction_adv"])
    assert len({(tmp_path / f"{stem}_confusion.png").read_bytes() for stem in stems}) == 4
    assert "written: " in capsys.readouterr().out


@pytest.mark.parametrize(("there", "whole_run", "expected"), (
    ((), True, "eval.json"), (("eval.json",), True, "eval-2.json"), (("eval_best.npz",), True, "eval-2.json"),
    (("eval_last.npz",), True, "eval.json"), ((), False, "eval_best.json"),
    (("eval_best.json",), False, "eval_best-2.json"),
    (("eval_best.npz",), False, "eval_best-2.json"), (("eval_best_ema.npz",), False, "eval_best.json")))
def test_neither_a_result_nor_its_examples_are_overwritten(tmp_path, there, whole_run, expected):
    for name in there:
        (tmp_path / name).touch()
    assert report.output_path(None, tmp_path / "best.pt", whole_run) == tmp_path / expected
    assert {path.name for path in tmp_path.iterdir()} == set(there)


def test_an_out_whose_examples_are_in_the_way_is_refused(tmp_path):
    (tmp_path / "mine_best.npz").touch()
    with pytest.raises(UserError, match=r"mine_best\.npz exists"):
        report.output_path(str(tmp_path / "mine.json"), tmp_path / "last.pt", True)
    assert (report.output_path(str(tmp_path / "mine.json"), tmp_path / "last.pt", False)
            == tmp_path / "mine.json")


@pytest.mark.parametrize("count", (1, 2, 3, 4))
def test_the_table_has_a_column_a_checkpoint_and_stays_narrow(count, capsys):
    names = CHECKPOINTS[:count]
    results, _ = results_of(*names)
    report.print_table(results)
    lines = capsys.readouterr().out.splitlines()
    table = lines[2:next(k for k, line in enumerate(lines) if line.startswith("certificate"))]
    assert max(map(len, table)) <= 100
    assert [head for line in table if "epoch" in line for head in line.split("  ") if head.strip()] == [
        f"{name} (epoch {epoch})" for epoch, name in enumerate(names, 7)]
    for label, pick in (("A_rob ", lambda r: r["A_rob"]), ("A_tr  alpha 1.0", lambda r: r["A_tr"]["1.0"]),
                        ("A_sa  KL 0.2", lambda r: r["A_sa_kl"]["0.2"])):
        cells = [part for line in table if line.startswith(label)
                 for part in line.removeprefix(label).split("%")[:-1]]
        assert ([float(cell.split()[-1]) for cell in cells]
                == [round(pick(results[name]), 2) for name in names])
