"""Figures are drawn from plain values, show what they are given, and are drawn again from a run's files."""
import csv
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from benchmarks import figures
from harness.errors import UserError
from harness.evaluation.metrics import WEIGHT_EDGES, WeightStatistics
from harness.reporting import figures as plots

pytestmark = pytest.mark.rendered
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def result_of(num_classes, a_rob=55.0):
    """An evaluation as its JSON gives it back; the last class but one has no example."""
    accuracies = [100.0 * k / num_classes for k in range(num_classes)]
    accuracies[-2] = None
    curve = {"1.0": a_rob - 10, "2.0": a_rob - 20}
    intervals = {name: [value - 2, value + 1] for name, value in curve.items()}
    return json.loads(json.dumps({
        "A_nat": 97.5, "A_rob": a_rob, "A_sa": curve, "A_tr": curve,
        "class_accuracy": {"A_nat": accuracies, "A_rob": accuracies},
        "ci95": {"A_nat": [97, 98], "A_rob": [a_rob - 1, a_rob + 1], "A_sa": intervals, "A_tr": intervals}}))


def rows_of(epochs, **values):
    return [{"epoch": k, "lr": 0.1, "train_loss": 2.0 / k, "seconds": 1.0} | values
            for k in range(1, epochs + 1)]


def weight_rows(num_classes, epochs=6, burn_in_epochs=0):
    """Rows of weights.csv: 1 during the burn-in, then larger for the later classes."""
    rng, rows = np.random.default_rng(0), []
    for epoch in range(1, epochs + 1):
        statistics, y = WeightStatistics(num_classes,
                                         torch.device("cpu")), torch.arange(30 * num_classes) % num_classes
        weights = torch.tensor(np.exp(rng.normal(size=len(y))) * (1 + y.numpy() / num_classes) + epoch)
        statistics.add(weights if epoch > burn_in_epochs else torch.ones(len(y)), y)
        rows.append({"epoch": epoch} | statistics.compute())
    return rows


def confusions_of(num_classes, **values):
    """A result with confusion matrices; the last class has no example."""
    generator = torch.Generator().manual_seed(0)
    clean, attacked = (torch.randint(4, (num_classes, num_classes),
                                     generator=generator) + level * torch.eye(num_classes, dtype=torch.int64)
                       for level in (100, 50))
    clean[-1] = attacked[-1] = 0
    return result_of(num_classes) | {"confusion": {"A_nat": clean.tolist(),
                                                   "A_rob": attacked.tolist()}} | values


@pytest.fixture
def figure(monkeypatch):
    """Draw, and give the figure itself instead of a file."""
    from matplotlib import pyplot

    kept = []
    for module in (plots, figures):
        monkeypatch.setattr(module, "save", lambda figure, path: kept.append(figure))

    def of(draw, *args, **options):
        draw(*args, None, **options)
        kept[-1].canvas.draw()
        return kept[-1]

    yield of
    pyplot.close("all")


def texts(labels):
    return [label.get_text() for label in labels]


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def drawn(path):
    """A figure's pixels, after a look at whether it is one: large enough, mostly white, drawn in colours."""
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 1000
    white, coloured = (pixels == 255).all(2), np.ptp(pixels, axis=2) > 60
    assert white.mean() > 0.3 and coloured.sum() > 100
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
                      "ci95": {"A_rob": interval, "A_sa": {"1.0": interval}, "A_tr": {"1.0": interval}}},
                      tmp_path / "eval.png")
    drawn(tmp_path / "eval.png")


def test_an_evaluation_without_alphas_is_drawn(tmp_path):
    result = result_of(3) | {"A_sa": {}, "A_tr": {}}
    result["ci95"] |= {"A_sa": {}, "A_tr": {}}
    plots.evaluation(result, tmp_path / "eval.png")
    drawn(tmp_path / "eval.png")


def test_a_marker_at_100_percent_is_not_cut_by_the_frame(figure):
    fact = {"accuracy": 50.0, "ci95": [40, 60], "class_accuracy": [50.0, 50.0, 50.0]}
    probe = {"num_examples": 100, "steps": {"0": 100.0, "10": 50.0}}
    drawing = figure(plots.attacks, result_of(3) | {"num_examples": 100, "attacks": {"pgd100": fact},
                                                    "worst_case": fact, "probe": probe})
    line = drawing.axes[2].lines[0]
    assert list(line.get_ydata()) == [100.0, 50.0] and not line.get_clip_on()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("epochs", (1, 5, 40))
@pytest.mark.parametrize("values",
                         ({"train_A_rob": 50.0, "val_A_nat": 90.0, "val_A_rob": 60.0}, {"train_A_rob": 50.0}),
                         ids=("with held-out images", "without"))
def test_a_log_is_drawn(tmp_path, epochs, values):
    plots.training(rows_of(epochs, **values), tmp_path / "log.png")
    drawn(tmp_path / "log.png")


@pytest.mark.parametrize("epochs", (1, 3))
def test_a_log_shows_the_held_out_accuracies(tmp_path, epochs):
    for value in (40.0, 60.0):
        plots.training(rows_of(epochs, train_A_rob=50.0, val_A_nat=90.0, val_A_rob=value),
                       tmp_path / f"{value}.png")
    assert not np.array_equal(drawn(tmp_path / "40.0.png"), drawn(tmp_path / "60.0.png"))


@pytest.mark.parametrize("accuracies", ({"train_A_rob": 50.0}, {"train_A_nat": 95.0, "train_A_rob": 50.0}))
def test_a_log_shows_the_accuracies_in_training_that_it_has(figure, accuracies):
    _, right = figure(plots.training, rows_of(3, **accuracies)).axes
    assert {line.get_label(): line.get_ydata()[0] for line in right.lines} == {
        f"{name.removeprefix('train_')}, training": value for name, value in accuracies.items()}


def test_no_figure_stays_open(tmp_path):
    from matplotlib import pyplot

    pyplot.close("all")
    plots.training(rows_of(2, train_A_rob=50.0), tmp_path / "log.png")
    plots.evaluation(result_of(2), tmp_path / "eval.png")
    plots.weights(weight_rows(2), tmp_path / "weights.png")
    plots.confusion(confusions_of(2), tmp_path / "eval_confusion.png")
    assert pyplot.get_fignums() == []


def test_a_log_with_averaged_weights_shows_both(figure):
    rows = rows_of(12, train_A_rob=50.0, val_A_nat=90.0, val_A_rob=60.0, val_ema_A_nat=91.0,
                   val_ema_A_rob=61.0)
    left, right = figure(plots.training, rows).axes
    assert sorted(line.get_ydata()[0] for line in right.lines) == [50, 60, 61, 90, 91]
    assert all(float(tick).is_integer() for axis in (left, right) for tick in axis.get_xticks())
    assert right.get_legend().get_window_extent().x0 >= right.get_window_extent().x1  # no line is covered


# The instance weights

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("num_classes", "epochs"),
                         ((2, 1), (2, 3), (10, 1), (10, 40), (20, 12), (21, 1), (100, 40), (200, 2)))
def test_the_weights_of_a_run_are_drawn_whatever_the_number_of_classes(tmp_path, num_classes, epochs):
    plots.weights(weight_rows(num_classes, epochs, epochs // 2), tmp_path / "weights.png",
                  burn_in_epochs=epochs // 2)
    drawn(tmp_path / "weights.png")


def test_each_class_has_a_line_named_in_the_order_of_the_last_epoch(figure):
    rows = weight_rows(10, 40, 25)
    left = figure(plots.weights, rows, classes=NAMES, burn_in_epochs=25).axes[0]
    lines = {line.get_label(): line for line in left.lines}
    for k, name in enumerate(NAMES):
        assert lines[name].get_ydata().tolist() == [row[f"share_{k}"] for row in rows]
    order = sorted(range(10), key=lambda k: -rows[-1][f"share_{k}"])
    assert texts(left.get_legend().texts) == [*(NAMES[k] for k in order), "every class alike",
                                              "end of the burn-in"]
    assert set(lines["every class alike"].get_ydata()) == {10}
    assert lines["every class alike"].get_linestyle() == ":"
    assert set(lines["end of the burn-in"].get_xdata()) == {25.5}
    assert left.get_ylim()[0] == 0 and left.get_ylim()[1] > max(rows[-1][f"share_{k}"] for k in range(10))


def test_no_two_of_20_lines_look_alike(figure):
    left = figure(plots.weights, weight_rows(20)).axes[0]
    lines = [line for line in left.lines if line.get_label().isdigit()]
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker())
                for line in lines}) == len(lines) == 20
    for pair in itertools.combinations(lines, 2):
        colours = [np.array([int(line.get_color()[k:k + 2], 16) for k in (1, 3, 5)]) for line in pair]
        other_style = pair[0].get_linestyle() != pair[1].get_linestyle()
        assert other_style or np.abs(colours[0] - colours[1]).max() > 50


@pytest.mark.parametrize("num_classes", (21, 200))
def test_many_classes_are_drawn_as_bands(figure, num_classes):
    rows = weight_rows(num_classes, 5)
    left = figure(plots.weights, rows, classes=[f"n{k:08}" for k in range(num_classes)]).axes[0]
    shares = np.array([[row[f"share_{k}"] for k in range(num_classes)] for row in rows])
    found = sorted((line.get_ydata() for line in left.lines if len(line.get_ydata()) == 5),
                   key=lambda values: values[-1])
    np.testing.assert_allclose(found, np.percentile(shares, (0, 25, 50, 75, 100), axis=1))
    assert texts(left.get_legend().texts) == ["median class", "middle half of the classes", "all classes",
                                              "every class alike"]


@pytest.mark.parametrize(("burn_in_epochs", "shown"), (
    (None, [3, 6]), (0, [3, 6]), (2, [4, 6]), (4, [5, 6]), (5, [6]), (6, [6]), (76, [6])))
def test_the_histogram_shows_the_last_and_a_middle_epoch_of_those_with_weights(figure, burn_in_epochs, shown):
    rows = weight_rows(10, 6, burn_in_epochs or 0)
    left, right = figure(plots.weights, rows, burn_in_epochs=burn_in_epochs).axes
    assert texts(right.get_legend().texts) == [f"epoch {epoch}" for epoch in shown]
    outlines = [patch for patch in right.patches if not patch.get_fill()]
    for outline, epoch in zip(outlines, shown, strict=True):
        values, edges, _ = outline.get_data()
        # percent of 300 weights
        np.testing.assert_allclose(values, [rows[epoch - 1][f"bin_{k}"] / 3 for k in range(60)])
        assert values.sum() == pytest.approx(100) and np.array_equal(edges, WEIGHT_EDGES)
    assert right.get_xscale() == "log" and right.get_ylim()[0] < min(values[values > 0])
    assert right.get_ylim()[1] > 100
    assert ("end of the burn-in" in texts(left.get_legend().texts)) == (burn_in_epochs in (2, 4, 5))


@pytest.mark.filterwarnings("error")
def test_a_class_without_examples_and_an_epoch_without_weight_are_drawn(tmp_path):
    for num_classes in (3, 30):
        rows = weight_rows(num_classes, 3)
        for row in rows:
            row["class_0"], row["share_0"] = None, 0.0
        rows[1] |= {f"share_{k}": None for k in range(num_classes)}
        write_rows(tmp_path / "weights.csv", rows)
        plots.redraw_run(tmp_path)
        drawn(tmp_path / "weights.png")


@pytest.mark.parametrize(("classes", "labels"), (
    (["a", "b"], ["a", "b", "2"]), (["a", "b", "c" * 13], ["0", "1", "2"]), (None, ["0", "1", "2"]),
    (["0 - zero", "1 - one", "2 - two"], ["0", "1", "2"])))
def test_classes_have_their_names_where_these_are_short(figure, classes, labels):
    left = figure(plots.weights, weight_rows(3), classes=classes).axes[0]
    assert sorted(texts(left.get_legend().texts))[:3] == sorted(labels)
    matrix = figure(plots.confusion, confusions_of(3, classes=classes)).axes[0]
    assert texts(matrix.get_yticklabels()) == labels
    bars = figure(plots.evaluation, result_of(3) | {"classes": classes}).axes[1]
    assert texts(bars.get_xticklabels()) == labels


# The confusion matrices

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_classes", (2, 10, 12, 13, 20, 21, 100, 200))
def test_confusions_are_drawn_whatever_the_number_of_classes(tmp_path, num_classes):
    plots.confusion(confusions_of(num_classes), tmp_path / "eval_confusion.png")
    pixels = np.asarray(Image.open(tmp_path / "eval_confusion.png").convert("RGB"))
    assert pixels.shape[0] >= 800 and pixels.shape[1] >= 2000


def test_confusions_are_shown_in_percent_of_the_true_class(figure):
    counts = {"A_nat": [[90, 10, 0], [1, 199, 0], [0, 0, 0]],
              "A_rob": [[50, 30, 20], [150, 49, 1], [0, 0, 0]]}
    clean, attacked, bar = figure(plots.confusion,
                                  result_of(3)
                                  | {"confusion": counts, "classes": ["cat", "dog", "frog"]}).axes
    expected = ([[90, 10, 0], [0.5, 99.5, 0], [np.nan] * 3], [[50, 30, 20], [75, 24.5, 0.5], [np.nan] * 3])
    for axis, values in zip((clean, attacked), expected):
        np.testing.assert_allclose(axis.images[0].get_array().filled(np.nan), values)
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
        assert texts(axis.get_xticklabels()) == texts(axis.get_yticklabels()) == ["cat", "dog", "frog"]
        assert axis.images[0].get_clim() == (0, 100)
    numbers = {(text.get_position(), text.get_text()) for text in attacked.texts}  # (column, row)
    assert numbers == {((0, 0), "50"), ((1, 0), "30"), ((2, 0), "20"), ((0, 1), "75"), ((1, 1), "24"),
                       ((2, 1), "0.5")}
    assert clean.get_title() == "Clean test images (A_nat 97.50 %)"
    assert attacked.get_title() == "Adversarial test images (A_rob 55.00 %)"
    assert bar.get_ylabel() == "images of the true class, %"


@pytest.mark.parametrize(("num_classes", "numbers", "ticks"), (
    (12, True, 12), (13, False, 13), (20, False, 20), (100, False, 10), (200, False, 10)))
def test_many_classes_have_no_numbers_and_few_ticks(figure, num_classes, numbers, ticks):
    axis = figure(plots.confusion, confusions_of(num_classes, classes=["x"] * num_classes)).axes[0]
    assert bool(axis.texts) == numbers and len(axis.get_xticks()) == len(axis.get_yticks()) == ticks
    assert texts(axis.get_xticklabels()) == (["x"] * ticks if ticks
                                             == num_classes else [str(k * num_classes // 10)
                                                                  for k in range(10)])


# Drawn again

def test_rows_come_back_as_they_were(tmp_path):
    rows = [{"epoch": 1, "loss": 0.1 + 0.2, "share_0": None, "bin": 0, "small": 1e-07, "note": "x"},
            {"epoch": 2, "loss": -1.0, "share_0": 12.5, "bin": 3, "small": 0.0, "note": None}]
    write_rows(tmp_path / "rows.csv", rows)
    found = plots.read_rows(tmp_path / "rows.csv")
    assert found == rows
    assert [[type(value) for value in row.values()]
            for row in found] == [[type(v) for v in row.values()] for row in rows]


@pytest.mark.parametrize(("settings", "options"), (
    ({"classes": NAMES, "burn_in_epochs": 3, "weights": "vir"}, {"classes": NAMES, "burn_in_epochs": 3}),
    ({"classes": NAMES, "burn_in_epochs": 3, "weights": "uniform"}, {"classes": NAMES}), ({}, {}),
    (None, {})))
def test_a_run_is_drawn_from_its_files(tmp_path, settings, options):
    logged, weighed = rows_of(6, train_A_rob=50.0, val_A_nat=90.0, val_A_rob=60.0), weight_rows(10, 6, 3)
    write_rows(tmp_path / "log.csv", logged)
    write_rows(tmp_path / "weights.csv", weighed)
    if settings is not None:
        (tmp_path / "config.json").write_text(json.dumps(settings))
    assert plots.redraw_run(tmp_path) == [tmp_path / "log.png", tmp_path / "weights.png"]
    plots.training(logged, tmp_path / "log_here.png")
    plots.weights(weighed, tmp_path / "weights_here.png", **options)
    for name in ("log", "weights"):
        assert (tmp_path / f"{name}.png").read_bytes() == (tmp_path / f"{name}_here.png").read_bytes()


def test_a_result_is_drawn_from_its_file_with_every_checkpoint_in_it(tmp_path):
    first, second = confusions_of(3, classes=["a", "b", "c"]), result_of(3, 75.0)
    (tmp_path / "eval-2.json").write_text(json.dumps(first | {"best": second, "training": {"lr": 0.1}}))
    found = [path.name for path in plots.redraw_result(tmp_path / "eval-2.json")]
    assert found == ["eval-2.png", "eval-2_confusion.png", "eval-2_best.png"]
    for draw, result, name in ((plots.evaluation, first, "eval-2"),
                               (plots.confusion, first, "eval-2_confusion"),
                               (plots.evaluation, second, "eval-2_best")):
        draw(result, tmp_path / "here.png")
        assert (tmp_path / "here.png").read_bytes() == (tmp_path / f"{name}.png").read_bytes()


def redraw(monkeypatch, *args):
    """python -m harness.reporting.figures ARGS: its exit code."""
    monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        plots.main()
    return stopped.value.code


def test_the_figures_of_a_run_and_its_evaluation_come_back_byte_for_byte(script, monkeypatch, capsys):
    script("train_vir", "--recipe", "vir-at-digits", *TINY, "--epochs", 2, "--burn_in_epochs", 1, "--out_dir",
           "run")
    script("eval_mnist", "--checkpoint", "run", "--num_steps", 2, "--num_restarts", 1, "--num_examples", 50)
    before = {path: path.read_bytes() for path in Path("run").glob("*.png")}
    assert {"log.png", "weights.png", "eval.png", "eval_confusion.png"} <= {path.name for path in before}
    for path in before:
        path.unlink()
    capsys.readouterr()
    assert redraw(monkeypatch, "run") == 0
    assert {Path(line) for line in capsys.readouterr().out.splitlines()} == set(before)
    assert all(path.read_bytes() == figure for path, figure in before.items())


def test_a_folder_with_nothing_to_draw_is_refused_and_the_others_are_drawn(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run/log.csv", rows_of(2, train_A_rob=50.0))
    assert redraw(monkeypatch, tmp_path / "empty", tmp_path / "none", tmp_path / "run") == 2
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'run/log.png'}\n" and (tmp_path / "run/log.png").exists()
    start = "python -m harness.reporting.figures: error:"
    assert err == (f"{start} {tmp_path / 'empty'} holds no log.csv, weights.csv or eval*.json to draw from\n"
                   f"{start} there is no folder {tmp_path / 'none'}\n")


@pytest.mark.parametrize("args", ((), ("--all", "run")))
def test_a_wrong_command_line_gives_one_line(monkeypatch, capsys, args):
    assert redraw(monkeypatch, *args) == 2
    assert capsys.readouterr().err.startswith("python -m harness.reporting.figures: error: ")


@pytest.mark.parametrize(("name", "text"), (
    ("eval.json", "{"), ("eval.json", "[]"), ("eval.json", "{}"), ("eval.json", '{"class_accuracy": {}}'),
    ("eval_x.json", "\xff"),
    ("log.csv", "a,b\n1,2,3\n"), ("log.csv", "epoch,lr\n1,2\n"), ("log.csv", "epoch,train_loss\n1\n"),
    ("weights.csv", "epoch\n1\n"),
    ("config.json", "{"), ("config.json", "[]")))
def test_a_file_that_is_not_ours_is_refused_in_one_line(tmp_path, name, text):
    write_rows(tmp_path / "weights.csv", weight_rows(2))
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="is no run or result of these scripts"):
        plots.redraw(tmp_path)


def test_a_defense_that_was_trained_twice_is_told_apart_in_the_figure_of_costs(figure):
    rows = [{"defense": name, "A_rob": 90.0, "ci95": [89.0, 91.0], "seconds": 60.0,
             "result": f"results/{folder}"}
            for name, folder in (("AT", "a"), ("AT", "b"), ("MART", "c"))]
    legend = figure(figures.cost, rows).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["AT (a)", "AT (b)", "MART"]
