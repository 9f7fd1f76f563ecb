"""generate_robustness_curves.py as its user runs it, on a small network
in the published system's file format."""
import csv
import importlib
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image
from scipy.io import loadmat, savemat

from attacks import pool
from attacks.bim import bim_bisection
from curves import exact, mat
from curves import store as curve_store
from curves.published import spelling
from harness.config import parse_config
from harness.datasets.batches import load_dataset, to_unit
from harness.errors import UserError
from losses.margin import cw_loss

SCRIPT = "generate_robustness_curves.py"
QUICK = ("--budget", "original", "--format", "png", "--check_radii", 0)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A .mat file of a network of the kind cnn, trained for a moment on the digits."""
    path, random = tmp_path_factory.mktemp("model") / "digits.mat", np.random.default_rng(0)
    shapes = {"weights_conv1": (4, 4, 1, 16), "weights_conv2": (4, 4, 16, 32), "weights_fc1": (1568, 100),
              "weights_fc2": (100, 10)}
    arrays = {name: (random.normal(size=shape) * (2 / np.prod(shape[:-1])) ** 0.5).astype(np.float32)
              for name, shape in shapes.items()}
    arrays |= {name.replace("weights", "biases"): np.zeros((1, shape[-1]), np.float32)
               for name, shape in shapes.items()}
    savemat(path, arrays)
    model, train = mat.load_network(path)[0], load_dataset("digits", ".").train
    optimizer, x = torch.optim.Adam(model.parameters(), 3e-3), to_unit(train.images)
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:600]), train.labels[:600]).backward()
        optimizer.step()
    for layer, name in zip((0, 2, 5, 7), shapes):
        weight = model[layer].weight.detach()
        if name == "weights_fc1":
            weight = weight.view(100, 32, 7, 7).permute(2, 3, 1, 0).reshape(1568, 100)
        arrays[name] = (weight.permute(2, 3, 1, 0) if weight.ndim == 4
                        else weight if name == "weights_fc1" else weight.T).numpy()
        arrays[name.replace("weights", "biases")] = model[layer].bias.detach().numpy()[None]
    savemat(path, arrays)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script's main in this process, in an empty folder, its command line as a user types it."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("generate_robustness_curves")
    monkeypatch.setattr(module, "bim_bisection",
                        partial(bim_bisection, num_steps=10, steps_per_radius=5, num_bisections=4))

    def call(*args):
        words = spelling([str(word) for word in args], module.COMMANDS)
        monkeypatch.setattr(sys, "argv", [SCRIPT, *words])
        module.main(parse_config(module.Config))

    return call


@pytest.mark.slow
def test_the_published_command_line_runs_unchanged(shell, tmp_path, network, monkeypatch):
    monkeypatch.setitem(pool.BUDGETS, "standard", pool.BUDGETS["fast"])  # the fork has it too
    done = shell(SCRIPT, "--dataset=digits", "--n_points=1", f"--model_path={network}", "--nn_type=cnn",
                 "--norms", "inf", "2", "1", "--save=True", "--plot=True")
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path / "runs/generate_robustness_curves").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "distances.npz", "curves.csv", "summary.json", "robustness_curves.json",
                     "curves.png", "curves.pdf"}
    assert all(name in done.stdout for name in ("linf", "l2", "l1", "digits"))


@pytest.fixture
def measured(run, network):
    """Sixteen points measured with the published system's attack, adversarial examples kept."""
    run("--dataset", "digits", "--n_points", 16, "--model", network, "--adversaries", "--out", "one", *QUICK)
    return curve_store.read(Path("one"))


def test_every_distance_is_that_norm_of_the_stored_adversary(measured):
    points = load_dataset("digits", ".").test
    x = to_unit(points.images[:16]).double().numpy()
    stored = json.loads(Path("one/robustness_curves.json").read_text())
    model = mat.load_network(measured.about["model"])[0]
    for norm, name, order in (("linf", "inf", np.inf), ("l2", "2", 2), ("l1", "1", 1)):
        x_adv = measured.columns[f"x_adv_{norm}"]
        sizes = np.linalg.norm((x_adv - x).reshape(16, -1), ord=order, axis=1)
        assert np.allclose(measured.upper(norm), sizes, atol=1e-12) and x_adv.min() >= 0 and x_adv.max() <= 1
        assert stored[name]["x"] == sorted(measured.upper(norm).tolist()) and stored[name]["y"][-1] == 1
        # in another batch rounding may make a tie
        assert (cw_loss(model(torch.from_numpy(x_adv)), points.labels[:16]) > -1e-5).all()
    assert ((measured.upper("linf") <= measured.upper("l2")).all()
            and (measured.upper("l2") <= measured.upper("l1")).all())


def test_the_folder_holds_what_it_says(measured):
    columns = measured.columns
    assert set(columns["status"]) <= {"ok", "misclassified"} and columns["index"].tolist() == list(range(16))
    wrong = columns["pred"] != columns["label"]
    assert (((measured.upper("linf") == 0) == wrong).all()
            and (columns["status"][wrong] == "misclassified").all())
    assert (columns["clean_margin"][~wrong] > 0).all() and (columns["margin_linf"] <= 0).all()
    rows = list(csv.DictReader(Path("one/curves.csv").read_text().splitlines()))
    assert ({row["norm"] for row in rows} == {"linf", "l2", "l1"} and float(rows[-1]["R"]) == 1
            and rows[0]["R_certified"] == "")
    norms = json.loads(Path("one/summary.json").read_text())["models"]["digits"]["norms"]
    assert (norms["l2"]["misclassified"] == int(wrong.sum())
            and norms["l2"]["mean"] > norms["linf"]["mean"] > 0)


def test_an_interrupted_run_goes_on_with_the_points_that_are_left(run, network, monkeypatch, capsys):
    options = ("--dataset", "digits", "--n_points", 12, "--model", network, "--norms", "inf",
               "--batch_size", 4, *QUICK)
    run(*options, "--out", "whole", "--no-plot")
    script = importlib.import_module("generate_robustness_curves")
    calls, real = [], script.attack_pool

    def stops(*args):
        calls.append(len(args[-1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "attack_pool", stops)
        with pytest.raises(KeyboardInterrupt):
            run(*options, "--out", "halves", "--no-plot")
    assert ("go on with: python generate_robustness_curves.py compute --resume halves"
            in capsys.readouterr().err)
    begun = json.loads(Path("halves/config.json").read_text())["command_line"]
    assert (curve_store.read(Path("halves")).columns["status"] == "pending").sum() == 4
    with pytest.raises(UserError, match="4 points to go"):
        run("figures", "--results", "halves")
    run("--resume", "halves")
    assert (json.loads(Path("halves/config.json").read_text())["command_line"] == begun
            and "--resume" not in begun)
    first, second = (curve_store.read(Path(name)).columns for name in ("whole", "halves"))
    assert all(np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f")
               for name in first)
    monkeypatch.setattr("curves.measure.measure",
                        lambda *_, **__: pytest.fail("nothing is left to be measured"))
    run("--resume", "halves")  # as a finished model beside one that was interrupted


def test_the_curve_is_checked_and_a_stopped_check_goes_on(run, network, monkeypatch, capsys):
    options = ("--dataset", "digits", "--n_points", 12, "--model", network, "--check_points", 4,
               "--check_radii", 3, "--budget", "original", "--no-plot")
    script = importlib.import_module("generate_robustness_curves")
    asked = set()

    def steps(model, x, y, epsilon, norm, keys):  # in place of AutoAttack, so that this takes no minute
        asked.add(norm)
        assert epsilon.shape == y.shape == keys.shape[:1]
        direction = (1 - 2 * x.round()).flatten(1)
        order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
        size = epsilon / torch.linalg.vector_norm(direction, order, dim=1)
        return x + (size[:, None] * direction).view_as(x)

    monkeypatch.setattr(script, "autoattack", steps)
    run(*options, "--out", "checked")
    norms = json.loads(Path("checked/summary.json").read_text())["models"]["digits"]["norms"]
    said = capsys.readouterr().out
    assert asked == {"linf", "l2", "l1"}
    for norm in asked:
        assert norms[norm]["check"]["points"] == 4 and len(norms[norm]["check"]["radii"]) == 3
        assert f"digits, {norm}: 4 points checked" in said
    assert json.loads(Path("checked/config.json").read_text())["check_points"] == 4

    def stops(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "autoattack", stops)
        with pytest.raises(KeyboardInterrupt):
            run(*options, "--out", "halves")
    run("--resume", "halves")
    first, second = (curve_store.read(Path(name)).columns for name in ("checked", "halves"))
    assert all(np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f")
               for name in first)


def test_two_models_are_compared(run, network, tmp_path, capsys):
    arrays = mat.read_arrays(network, mat.CNN_KEYS)
    savemat(tmp_path / "worse.mat", arrays | {"weights_fc1": np.roll(arrays["weights_fc1"], 1, axis=1)})
    run("compute", "--model", network, tmp_path / "worse.mat", "--dataset", "digits", "--n_points", 40,
        "--norms", "inf", "2", "--out", "two", "--no-save", *QUICK)
    assert not (tmp_path / "two/digits/robustness_curves.json").exists()
    run("compare", "--results", "two", "--out", "compared", "--num_resamples", 200, "--format", "png")
    found = json.loads((tmp_path / "compared/compare.json").read_text())
    entry, = found["norms"]["linf"]
    assert (entry["first"], entry["second"], found["points"]) == ("digits", "worse", 40)
    assert (entry["largest_gap"]["gap"] < -0.3 and entry["largest_gap"]["supported"]
            and entry["half_width"] < 0.4)
    assert (found["transfer"]["digits"]["linf-l2"] > 0.3
            and found["transfer"]["digits"]["scales"]["paired"] > 1)
    assert ({path.name for path in (tmp_path / "compared").glob("*.png")}
            == {"curves.png", "difference.png", "transfer.png", "rank_correlation.png"})
    assert "digits - worse" in capsys.readouterr().out


def test_the_surface_agrees_with_the_curve(run, measured, tmp_path):
    run("surface", "--results", "one", "--epsilons", 0, 0.05, 0.1, 0.2, "--alphas", 0, 1, 2, "--num_steps", 5,
        "--out", "surface", "--format", "png")
    rows = list(csv.DictReader((tmp_path / "surface/surface.csv").read_text().splitlines()))
    found = np.load(tmp_path / "surface/surface_digits.npz")
    curve = (found["distances"][:, None] <= found["epsilons"]).mean(axis=0)
    assert (np.abs(found["A_sa"][:, 0] - (1 - curve)).max() < 1e-12
            and (np.diff(found["A_sa"], axis=1) <= 1e-12).all())
    assert (found["distances"] <= measured.upper("linf")).all() and len(rows) == 12
    assert (tmp_path / "surface/surface_digits.png").stat().st_size > 10_000


def test_the_papers_figures_are_drawn_from_files(run, measured, tmp_path, capsys):
    run("figures", "--results", "one", "--paper", "--out", "drawn", "--format", "png", "--units", "255")
    drawn = {path.stem for path in (tmp_path / "drawn").glob("*.png")}
    assert drawn == {"curves", "toy", "sample_size", "scaled", "examples"}
    assert "not drawn: model_comparison" in capsys.readouterr().out


@pytest.fixture
def tiny(tmp_path):
    """A .mat file of a network of the kind fc1 with twelve hidden units,
    trained for a moment on the digits."""
    path, random = tmp_path / "tiny.mat", np.random.default_rng(0)
    arrays = {"U": random.normal(size=(784, 12)) * 0.1, "bU": np.zeros((1, 12))}
    arrays |= {"W": random.normal(size=(12, 10)) * 0.5, "bW": np.zeros((1, 10))}
    savemat(path, arrays)
    model, train = mat.load_network(path)[0], load_dataset("digits", ".").train
    optimizer, x = torch.optim.Adam(model.parameters(), 1e-2), to_unit(train.images)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), train.labels).backward()
        optimizer.step()
    first, second = model[1], model[3]
    savemat(path, {"U": first.weight.T.detach().numpy(), "bU": first.bias.detach().numpy()[None],
                   "W": second.weight.T.detach().numpy(), "bW": second.bias.detach().numpy()[None]})
    return path


@pytest.mark.filterwarnings("ignore:highspy")
def test_proofs_close_the_bracket(run, tiny, tmp_path, capsys):
    run("--dataset", "digits", "--n_points", 6, "--model", tiny, "--norms", "inf", "2", "--adversaries",
        "--certify", "crown", "--out", "bracket", "--budget", "fast", "--no-plot", "--check_radii", 0)
    run("exact", "--results", "bracket", "--rel_gap", 1e-3, "--out", "proved", "--format", "png")
    before, after = (curve_store.read(tmp_path / name) for name in ("bracket", "proved"))
    right = before.columns["status"] == "ok"
    # also where every hidden unit is off and no gradient leads away
    assert right.sum() >= 4 and np.isfinite(before.upper("l2")).all()
    assert (after.columns["status"][right] == "exact").all()
    for norm in ("linf", "l2"):
        assert ((before.lower(norm)[right] > 0.3 * before.upper(norm)[right]).all()
                and (before.lower(norm) <= before.upper(norm)).all())
    low, high = after.lower("linf")[right], after.upper("linf")[right]
    assert ((high <= before.upper("linf")[right]).all() and (low >= before.lower("linf")[right]).all()
            and (high / low <= 1.0011).all())
    said = capsys.readouterr().out
    assert "exact within 0.001, 0 open" in said
    assert re.search(r"certificates take up to [\d.e-]+ s a point, for 6 points [\d.]+ minutes", said)
    rows = list(csv.DictReader((tmp_path / "proved/curves.csv").read_text().splitlines()))
    assert all(float(row["R"]) <= float(row["R_certified"]) + 1e-12 for row in rows)


@pytest.mark.filterwarnings("ignore:highspy")
def test_proofs_go_on_where_they_were_stopped(run, tiny, monkeypatch, capsys):
    run("--dataset", "digits", "--n_points", 6, "--model", tiny, "--norms", "inf", "--adversaries",
        "--out", "bracket", "--budget", "fast", "--no-plot")
    tried, real = [], exact.exact_distances

    def stops(layers, x, *args, **options):
        tried.append(x)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return real(layers, x, *args, **options)

    monkeypatch.setattr(exact, "exact_distances", stops)
    with pytest.raises(KeyboardInterrupt):
        run("exact", "--results", "bracket", "--out", "proved", "--no-plot")
    assert "go on with: python generate_robustness_curves.py exact --resume proved" in capsys.readouterr().err
    run("exact", "--resume", "proved")
    right = int((curve_store.read(Path("bracket")).columns["status"] == "ok").sum())
    assert len(tried) == right + 1 >= 5  # the one stopped in the middle twice
    assert f"{right} points exact within" in capsys.readouterr().out
    with pytest.raises(UserError, match="is of other budget"):
        stored = curve_store.read(Path("bracket"))
        stored.about["budget"] = "strong"
        stored.save(Path("bracket"))
        run("exact", "--resume", "proved")


def test_proofs_need_adversaries_and_a_chain_of_layers(run, measured, network, colour_folder, tmp_path):
    with pytest.raises(UserError, match="no adversarial examples"):
        run("--dataset", "digits", "--n_points", 2, "--model", network, "--norms", "inf", "--out", "without",
            "--no-plot", *QUICK)
        run("exact", "--results", "without")
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def Net():\n"
        "    return torch.nn.Sequential(\n"
        "        torch.nn.MaxPool2d(4), torch.nn.Flatten(), torch.nn.Linear(49, 10))\n")
    pooled = torch.nn.Sequential(torch.nn.MaxPool2d(4), torch.nn.Flatten(), torch.nn.Linear(49, 10))
    torch.save(pooled.state_dict(), "pooled.pt")
    with pytest.raises(UserError, match="no proof for this network"):
        run("--dataset", "digits", "--n_points", 2, "--model", "pooled.pt", "--arch", "net.py:Net",
            "--certify", "crown", *QUICK)


def test_a_run_of_ours_brings_its_data_set_and_its_name(run, script, tmp_path):
    script("train_at_mnist", *TINY, "--model", "lenet", "--out_dir", "at")
    run("--model", "at", "at/best.pt", "--n_points", 4, "--norms", "inf", "--out", "curves", *QUICK)
    found = json.loads((tmp_path / "curves/summary.json").read_text())["models"]
    assert set(found) == {"at", "at-best"} and found["at"]["about"]["dataset"] == "digits"
    assert (tmp_path / "curves/at-best/distances.npz").exists()


def test_what_an_evaluation_found_is_a_candidate(run, script, tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    train = load_dataset("digits", ".").train
    optimizer, x = torch.optim.Adam(model.parameters(), 1e-2), to_unit(train.images)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), train.labels).backward()
        optimizer.step()
    torch.save(model.state_dict(), "linear.pt")
    (tmp_path / "net.py").write_text("from torch import nn\n"
                                     "def Net():\n"
                                     "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n")
    known = ("--arch", "net.py:Net", "--dataset", "digits")
    script("eval_mnist", "--checkpoint", "linear.pt", *known, "--num_examples", 10, "--num_steps", 3,
           "--alphas", 1, "--epsilon", 0.2, "--attacks", "fgsm", "--save_adversaries", "--out", "seen.json")
    few = ("--model", "linear.pt", *known, "--n_points", 10, "--norms", "inf", "--budget", "fast",
           "--no-plot", "--check_radii", 0, "--records")
    run(*few, "seen.record/linear", "--out", "curves")
    results = curve_store.read(tmp_path / "curves")
    evaluated = np.load("seen.record/linear/fgsm/00000000.npz")
    assert "seen: fgsm" in results.about["attacks"]
    fallen = (evaluated["prediction"] != results.columns["label"]) & (results.columns["status"] == "ok")
    assert fallen.any() and (results.upper("linf")[fallen] <= evaluated["norm"][fallen] + 1e-6).all()
    for records, message in (("seen.record", "is no record with images"), (".", "is no record with images")):
        with pytest.raises(UserError, match=message):
            run(*few, records, "--out", "never")
    about = json.loads(Path("seen.record/linear/about.json").read_text())
    for change, message in (({"images_sha256": "other"}, "is of other images"),
                            ({"checkpoint_sha256": "other"}, "none of these models")):
        Path("seen.record/linear/about.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=message):
            run(*few, "seen.record/linear", "--out", "never")
    assert not Path("never").exists()


def test_class_distances_of_the_digits(run, tmp_path, capsys):
    run("distances", "--dataset", "digits", "--norms", "inf", "1", "--out", "classes", "--format", "png")
    found = json.loads((tmp_path / "classes/class_distances.json").read_text())
    stored, test = np.load(tmp_path / "classes/class_distances.npz"), load_dataset("digits", ".").test
    flat = to_unit(test.images).double().flatten(1)
    pairs = torch.cdist(flat, flat, p=1).masked_fill(test.labels[:, None] == test.labels, torch.inf)
    assert np.allclose(stored["inter_l1"], pairs.amin(1).numpy())
    assert found["norms"]["l1"]["inter"]["min"] == pytest.approx(float(pairs.min()))
    assert "inter-class distances, smallest linf l1" in capsys.readouterr().out


def test_points_by_their_places_and_from_files(run, network, tmp_path):
    test = load_dataset("digits", ".").test
    np.savez(tmp_path / "set.npz", images=test.images.squeeze(1).numpy(), labels=test.labels.numpy())
    (tmp_path / "places.txt").write_text("30 7\n12")
    run("--dataset", "npz:set.npz", "--indices", "places.txt", "--model", network, "--norms", "inf",
        "--out", "some", *QUICK)
    results = curve_store.read(tmp_path / "some")
    assert (results.columns["index"].tolist() == [30, 7, 12]
            and np.array_equal(results.columns["label"], test.labels[[30, 7, 12]]))


REFUSED = [
    (("--norms", "3"), "invalid choice: '3'"),
    (("--norms",), "--norms names nothing"),
    (("--n_points", "361"), "more than the set has: 360"),
    (("--n_points", "0"), "must be finite and at least 1"),
    (("--dataset", "mat:missing.mat"), "there is no file missing.mat"),
    (("--model", "missing.mat"), "there is no model missing.mat"),
    (("--indices", "missing.txt"), "no text file of whole numbers"),
    (("--confidence", "2"), "must be between"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_bad_input_is_one_line_before_anything_is_written(run, network, flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run("--dataset", "digits", "--model", network, *flags, "--out", "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_bad_input_ends_with_code_two(shell, network):
    done = shell(SCRIPT, "--dataset", "digits", "--model_path", network, "--norms", "3")
    assert (done.returncode == 2 and done.stderr.count("\n") == 1
            and done.stderr.startswith(f"{SCRIPT}: error: "))


@pytest.mark.parametrize(("words", "message"), [
    (("compare", "--results", "."), "no distances.npz in"), (("surface",), "no --results given"),
    (("distances",), "needs --dataset"),
    (("exact", "--results", "missing"), "no distances.npz in missing"), ((), "name at least one --model")])
def test_a_command_without_what_it_works_on_is_refused(run, words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(*words, "--out", "never")
    assert not (tmp_path / "never").exists()


def test_a_network_for_other_images_is_refused(run, colour_folder, network):
    with pytest.raises(UserError, match="does not take images of 3x32x32"):
        run("--dataset", colour_folder, "--model", network)


def test_a_damaged_or_foreign_resume_is_refused(run, network, tmp_path):
    options = ("--dataset", "digits", "--n_points", 4, "--model", network, "--norms", "inf", *QUICK)
    run(*options, "--out", "one", "--no-plot")
    with pytest.raises(UserError, match=r"already holds something.*--out"):
        run(*options, "--out", "one")
    file = tmp_path / "one/distances.npz"
    whole = file.read_bytes()
    for content in (whole[:300], b"", b"PK" + whole[2:200], whole[:2000] + bytes(200) + whole[2200:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as distances"):
            run("--resume", "one")
    np.savez(file, index=np.arange(4))
    with pytest.raises(UserError, match="cannot be read as distances"):
        run("--resume", "one")
    file.write_bytes(whole)
    stored = curve_store.read(file)
    stored.about["sha256"] = "another"
    stored.save(tmp_path / "one")
    with pytest.raises(UserError, match="is of other sha256"):
        run("--resume", "one")


def test_a_computation_goes_on_with_files_that_have_moved(run, tiny, colour_folder, script, tmp_path):
    options = ("--n_points", 4, "--norms", "inf", "--no-plot", *QUICK)
    shutil.copy(tiny, "first.mat")
    run("--dataset", "digits", "--model", "first.mat", "--out", "one", *options)
    moved = Path("elsewhere/first.mat")
    moved.parent.mkdir()
    Path("first.mat").rename(moved)
    with pytest.raises(UserError, match="there is no model"):
        run("--resume", "one")
    run("--resume", "one", "--model", moved)
    run("surface", "--results", "one", "--epsilons", 0.1, "--num_steps", 1, "--no-plot")
    arrays = loadmat(moved)
    savemat(moved, {name: arrays[name] + 1 for name in ("U", "W", "bU", "bW")})
    with pytest.raises(UserError, match="is of other sha256"):
        run("--resume", "one", "--model", moved)
    with pytest.raises(UserError, match="leave out --model"):
        run("--resume", "one", "--model", "other.mat")

    script("train_at_cifar10", "--dataset", colour_folder, *TINY[2:], "--model", "lenet", "--val_size", 4,
           "--batch_size", 8, "--out_dir", "at")
    run("--model", "at", "--out", "two", *options)
    colour_folder.rename("moved")
    run("--resume", "two", "--dataset", "moved")
    assert curve_store.read(Path("two")).about["dataset"] == "moved"
    for file in Path("moved").rglob("*.png"):
        Image.new("RGB", (32, 32), "pink").save(file)
    with pytest.raises(UserError, match="is of other images_sha256"):
        run("--resume", "two", "--dataset", "moved")


def test_a_changed_model_is_not_the_one_measured(run, measured, network, tmp_path):
    stored = curve_store.read(tmp_path / "one")
    stored.about["model"] = str(tmp_path / "one/config.json")
    stored.save(tmp_path / "one")
    with pytest.raises(UserError, match="not the file these distances were measured on"):
        run("surface", "--results", "one")


def test_only_a_computation_is_resumed(run, measured):
    run("figures", "--results", "one", "--out", "drawn", "--format", "png")
    with pytest.raises(UserError, match="--resume goes on with compute and exact, and drawn is of figures"):
        run("figures", "--resume", "drawn")


def test_results_of_other_data_are_not_compared(run, measured, tmp_path):
    other = curve_store.read(tmp_path / "one")
    other.about |= {"data": "mnist test", "name": "other"}
    other.save(tmp_path / "two")
    with pytest.raises(UserError, match="different data sets"):
        run("compare", "--results", "one", "two")
