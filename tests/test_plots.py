"""Figures are drawn from plain values, and show what they are given."""
import json

import numpy as np
import pytest
from PIL import Image

from harness import plots


def result_of(num_classes, a_rob=55.0):
    """An evaluation as its JSON gives it back; the last class but one has no example."""
    accuracies = [100.0 * k / num_classes for k in range(num_classes)]
    accuracies[-2] = None
    curve = {"1.0": a_rob - 10, "2.0": a_rob - 20}
    intervals = {name: [value - 2, value + 1] for name, value in curve.items()}
    return json.loads(json.dumps({
        "A_nat": 97.5, "A_rob": a_rob, "A_sa": curve, "A_tr": curve, "class_accuracy": {"A_nat": accuracies, "A_rob": accuracies},
        "ci95": {"A_nat": [97, 98], "A_rob": [a_rob - 1, a_rob + 1], "A_sa": intervals, "A_tr": intervals}}))


def rows_of(epochs, **values):
    return [{"epoch": k, "lr": 0.1, "train_loss": 2.0 / k, "seconds": 1.0} | values for k in range(1, epochs + 1)]


def drawn(path):
    """A figure's pixels, after a look at whether it is one: of a size to read, mostly white, drawn in colours."""
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 1000
    white, coloured = (pixels == 255).all(2), np.ptp(pixels, axis=2) > 60
    assert white.mean() > 0.5 and coloured.sum() > 100
    return pixels


@pytest.mark.parametrize("num_classes", (2, 10, 200))
def test_an_evaluation_is_drawn_whatever_the_number_of_classes(tmp_path, num_classes):
    plots.evaluation(result_of(num_classes), tmp_path / "eval.png")
    drawn(tmp_path / "eval.png")


def test_an_evaluation_shows_its_figures(tmp_path):
    for name, a_rob in (("same", 55.0), ("again", 55.0), ("other", 75.0)):
        plots.evaluation(result_of(10, a_rob), tmp_path / f"{name}.png")
    same, again, other = (drawn(tmp_path / f"{name}.png") for name in ("same", "again", "other"))
    assert np.array_equal(same, again) and not np.array_equal(same, other)


@pytest.mark.parametrize("accuracy", (0.0, 100.0))
def test_an_evaluation_at_either_end_of_the_scale_is_drawn(tmp_path, accuracy):
    curve, interval = {"1.0": accuracy}, [max(0.0, accuracy - 3), min(100.0, accuracy + 3)]
    plots.evaluation({"A_nat": accuracy, "A_rob": accuracy, "A_sa": curve, "A_tr": curve,
                      "class_accuracy": {"A_nat": [accuracy, None], "A_rob": [accuracy, None]},
                      "ci95": {"A_rob": interval, "A_sa": {"1.0": interval}, "A_tr": {"1.0": interval}}}, tmp_path / "eval.png")
    drawn(tmp_path / "eval.png")


def test_an_evaluation_without_alphas_is_drawn(tmp_path):
    result = result_of(3) | {"A_sa": {}, "A_tr": {}}
    result["ci95"] |= {"A_sa": {}, "A_tr": {}}
    plots.evaluation(result, tmp_path / "eval.png")
    drawn(tmp_path / "eval.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("epochs", (1, 5, 40))
@pytest.mark.parametrize("values", ({"train_A_rob": 50.0, "val_A_nat": 90.0, "val_A_rob": 60.0}, {"train_A_rob": 50.0}),
                         ids=("with held-out images", "without"))
def test_a_log_is_drawn(tmp_path, epochs, values):
    plots.training(rows_of(epochs, **values), tmp_path / "log.png")
    drawn(tmp_path / "log.png")


@pytest.mark.parametrize("epochs", (1, 3))
def test_a_log_shows_the_held_out_accuracies(tmp_path, epochs):
    for value in (40.0, 60.0):
        plots.training(rows_of(epochs, train_A_rob=50.0, val_A_nat=90.0, val_A_rob=value), tmp_path / f"{value}.png")
    assert not np.array_equal(drawn(tmp_path / "40.0.png"), drawn(tmp_path / "60.0.png"))


def test_no_figure_stays_open(tmp_path):
    from matplotlib import pyplot

    pyplot.close("all")
    plots.training(rows_of(2, train_A_rob=50.0), tmp_path / "log.png")
    plots.evaluation(result_of(2), tmp_path / "eval.png")
    assert pyplot.get_fignums() == []
