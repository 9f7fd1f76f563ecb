"""benchmarks/train_step.py and forms.py: the forms compute one step; operations, memory, output."""
import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import train_at_cifar10
import train_at_mnist
from attacks.noise import example_keys
from attacks.pgd import first_iterate
from benchmarks import train_step
from benchmarks.forms import PUBLISHED, count_flops, published_model
from benchmarks.train_step import Config, main
from harness.config import parse_config
from harness.datasets.batches import training_batches
from harness.errors import UserError
from harness.training.precision import bare
from models import build_model

ROOT = Path(__file__).resolve().parents[2]
TOY = ["--batch_size", "4", "--num_steps", "2", "--repeats", "1", "--matmul_size", "64", "--device", "cpu",
       "--no-memory"]
METHODS = ("at", "trades", "vir")
every_method = pytest.mark.parametrize("method", METHODS)


def toy(*words):
    return parse_config(Config, [*TOY, *words])


# The same step

@every_method
def test_ours_and_the_published_form_compute_the_same_step(method, tmp_path):
    """In float32, from a start so far from x and weights so large that no KL term drowns in rounding."""
    settings = train_step.settings_of("lenet", method, toy("--precision", "float32", "--num_steps", "3"),
                                      str(tmp_path / "run"))
    settings = replace(settings, start="uniform")
    run = train_step.Rounds(settings, train_step.synthetic(train_step.MNIST, settings.batch_size, seed=0))
    model = run.build(build_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)  # away from the uniform prediction of a new network
    before = copy.deepcopy(bare(model).state_dict())
    theirs = published_model(model)
    optimizer, other = train_step.sgd(model, settings), train_step.sgd(theirs, settings)
    for epoch in run.epochs(model, optimizer, scheduler=None):
        train_step.SCRIPTS[method, train_step.MNIST].train_one_epoch(model, optimizer, run, epoch, settings)
    (x, y, index, _), = training_batches(run.train, settings.batch_size, settings.seed, epoch=1)
    start = first_iterate(x, settings.epsilon, "uniform", example_keys(index, settings.seed, 1))
    loss = PUBLISHED[method](theirs, other, x, y, settings, start)
    assert run.meters.means.compute()["loss"] == pytest.approx(float(loss), rel=1e-5)
    for (name, ours), published in zip(bare(model).named_parameters(), theirs.parameters()):
        assert distance(ours.grad, published.grad) <= 1e-5, name
        assert distance(ours, published) <= 1e-6, name
        # the step: a difference of rounded weights
        assert distance(ours - before[name], published - before[name]) <= 1e-4, name


def distance(ours, published):
    return float((ours - published).detach().norm() / published.detach().norm())


@every_method
def test_every_form_moves_its_own_network_only(method, tmp_path):
    settings = train_step.settings_of("lenet", method, toy("--precision", "float32"), str(tmp_path / "run"))
    run = train_step.Rounds(settings, train_step.synthetic(train_step.MNIST, settings.batch_size, seed=0))
    model = run.build(build_model)
    before = [parameter.clone() for parameter in model.parameters()]
    for make in (train_step.published_step, train_step.bare_step):
        make(model, method, settings, run.train)()
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(before, model.parameters()))


def test_the_published_form_has_torchs_own_settings_and_ours_float32(monkeypatch, tmp_path):
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setitem(PUBLISHED, "at", lambda *given: seen.append((cudnn.allow_tf32, cudnn.benchmark)))
    loss_of = train_step.train_at_mnist.cross_entropy

    def cross_entropy(*given):
        seen.append((cudnn.allow_tf32, cudnn.benchmark))
        return loss_of(*given)

    monkeypatch.setattr(train_step.train_at_mnist, "cross_entropy", cross_entropy)
    train_step.measure("lenet", "at", toy("--warmup_rounds", "0"), lambda dtype: 1.0)
    assert seen[-1] == (True, False) and set(seen[:-1]) == {(False, True)}


def test_the_published_network_is_nchw_and_holds_the_same_weights():
    model = build_model("resnet18").to(memory_format=torch.channels_last)
    theirs = published_model(model)
    assert all(p.is_contiguous() and torch.equal(p, q)
               for p, q in zip(theirs.parameters(), model.parameters()))
    assert not model.conv1.weight.is_contiguous()


# The operation count

@every_method
@pytest.mark.parametrize("name", ("lenet", "small_cnn", "resnet18"))
def test_flops_are_those_of_the_passes_that_the_algorithm_needs(name, method):
    """An input gradient costs a forward pass, a weight gradient too; a training step's images need none."""
    shape, layers = train_step.image_shape_of(name), []
    settings = train_step.settings_of(name, method, toy("--num_steps", "3"), "")
    with torch.device("meta"):
        model, x = build_model(name, 10, shape[0]), torch.empty(settings.batch_size, *shape)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda layer, _,
                                         out: layers.append(2 * out.numel() * layer.weight[0].numel()))
    model(x)
    forward, step = sum(layers), 3 * sum(layers) - layers[0]
    expected = 2 * 3 * forward + {"at": step, "trades": forward + 2 * step, "vir": forward + step}[method]
    assert count_flops(name, method, settings, shape) == expected


# The command

def check_row(row):
    for key in ("ours_seconds", "published_form_seconds", "bare_seconds", "ratio", "images_per_second",
                "published_form_images_per_second",
                "gflop", "gflops", "published_form_gflops", "peak_gflops", "peak_percent"):
        assert 0 < row[key] < float("inf"), key
    ours, published = row["ours_seconds"], row["published_form_seconds"]
    assert row["ratio"] == pytest.approx(published / ours)
    assert row["overhead_percent"] == pytest.approx(100 * (1 - row["bare_seconds"] / ours))
    assert row["gflops"] == pytest.approx(row["gflop"] / ours)
    assert row["published_form_gflops"] == pytest.approx(row["gflop"] / published)
    assert row["images_per_second"] == pytest.approx(row["batch_size"] / ours)
    assert row["published_form_images_per_second"] == pytest.approx(row["batch_size"] / published)
    assert row["precision"] in ("bf16", "float32")


@pytest.mark.slow
def test_the_command_prints_one_line_of_json_and_leaves_nothing_behind(tmp_path):
    words = [*TOY, "--model", "lenet", "--method", "trades", "--json", "--out", str(tmp_path / "row.json")]
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *words], cwd=tmp_path,
                          text=True,
                          capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stderr
    printed, = done.stdout.splitlines()
    row = json.loads(printed)
    check_row(row)
    assert {key: row[key]
            for key in ("model", "method", "batch_size", "num_steps", "image_shape", "repeats", "seed")} == {
        "model": "lenet", "method": "trades", "batch_size": 4, "num_steps": 2, "image_shape": [1, 28, 28],
        "repeats": 1, "seed": 0}
    assert {form: len(seconds)
            for form, seconds in row["seconds"].items()} == {"ours": 1, "published": 1, "bare": 1}
    assert row["environment"]["torch"] == torch.__version__
    assert row["command"].startswith("python benchmarks/train_step.py --batch_size 4")
    # torch 2.14 makes that
    assert [path.name for path in tmp_path.iterdir()
            if not path.name.startswith("torchinductor_")] == ["row.json"]
    assert json.loads((tmp_path / "row.json").read_text()) == row


def test_several_combinations_are_rows_of_one_line(capsys):
    main(toy("--model", "lenet", "small_cnn", "--json", "--precision", "float32"))
    result = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["method"])
            for row in result["rows"]] == list(product(("lenet", "small_cnn"), METHODS))
    assert "environment" in result
    assert all("environment" not in row and row["precision"] == "float32" for row in result["rows"])
    for row in result["rows"]:
        check_row(row)


def test_the_table_has_one_line_a_combination(capsys):
    main(toy("--model", "lenet"))
    head, *rows, where = capsys.readouterr().out.splitlines()
    assert [row.split()[:4] for row in rows] == [["lenet", method, "4", "2"] for method in METHODS]
    assert {len(text) for text in (head, *rows)} == {len(head)} and f"torch {torch.__version__}" in where


@every_method
def test_the_number_of_steps_is_that_of_the_at_scripts_unless_given(method):
    for name, script in (("lenet", train_at_mnist), ("resnet18", train_at_cifar10),
                         ("wrn34_10", train_at_cifar10)):
        assert train_step.settings_of(name, method, parse_config(Config, []),
                                      "").num_steps == script.Config().num_steps
    assert train_step.settings_of("lenet", method, toy(), "").num_steps == 2


def test_vir_is_timed_with_its_weights_switched_on():
    settings = train_step.settings_of("resnet18", "vir", toy(), "")
    assert settings.burn_in_epochs == 0 and (settings.base, settings.weights) == ("at", "vir")
    assert (settings.alpha, settings.beta, settings.gamma) == (7.0, 0.007, 10.0)


# Memory

@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="the memory of a process is read from Linux's /proc")
def test_the_memory_is_that_of_network_gradients_momentum_and_a_batch():
    """At 2 images a wide network is nearly all of it: weights, gradients, momentum; more images take more."""
    parameters = 4 * sum(parameter.numel() for parameter in build_model("resnet18").parameters()) / 1e6
    few, many = (train_step.peak_mb("ours", "resnet18", "at",
                                    replace(toy("--memory"), batch_size=size, num_steps=1))
                                    for size in (2, 48))
    assert 3 * parameters <= few <= 7 * parameters
    assert many > few + 32 * 2 * 64 * 32 * 32 * 2 / 1e6  # two maps of 32 images in bfloat16, at least


def test_a_killed_measurement_of_memory_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(train_step, "peak_here", die)
    with pytest.raises(UserError, match="less --batch_size, or --no-memory"):
        train_step.peak_mb("ours", "lenet", "at", toy("--memory"))


def test_a_row_that_fails_leaves_the_rows_before_it_and_the_same_command_goes_on(tmp_path, monkeypatch):
    measured, done, failing = train_step.measure("lenet", "at", toy(), lambda dtype: 1.0), [], [True]
    facts = {"command": "c", "environment": {"commit": "0123", "hardware": "h", "threads": 1, "torch": "2"}}

    def measure(name, method, cfg, peak_of):
        if method == "trades" and failing:
            raise UserError("killed")
        done.append(method)
        return measured | {"method": method}

    def call(date="today", **others):
        monkeypatch.setattr(train_step.common, "facts", lambda device: facts | others | {"date": date})
        main(toy("--model", "lenet", "--out", str(tmp_path / "rows.json")))

    monkeypatch.setattr(train_step, "measure", measure)
    with pytest.raises(UserError, match="killed"):
        call()
    assert [row["method"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["at"]
    failing.clear()
    for _ in range(2):  # the second time every row is there
        call("tomorrow")
        assert done == ["at", "trades", "vir"]
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert [row["method"] for row in rows] == done
    with pytest.raises(UserError, match="never overwritten"):
        call(command="d")


def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("words", "message"), (
    (["--model", "lenot"], "unknown model 'lenot'"), (["--model"], "--model needs at least 1"),
    (["--repeats", "0"], "--repeats"),
    (["--matmul_size", "0"], "--matmul_size"), (["--out", __file__], "never overwritten"),
    (["--device", "nowhere"], "--device nowhere")))
def test_what_cannot_be_timed_is_refused_at_once(words, message):
    with pytest.raises(UserError, match=message):
        main(toy(*words))


# Cost

@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "flags", "phases"), (
    ("train_vir", ("--recipe", "vir-at-digits", "--burn_in_epochs", 3, "--epochs", 4),
     {"burn-in": 3, "weighted": 1}),
    ("train_free", ("--recipe", "digits", "--epochs", 2, "--num_replays", 2), {"all": 2})))
def test_the_cost_of_a_result_is_its_batches_times_what_one_takes(trainer, flags, phases, script, shell,
                                                                  tmp_path):
    script(trainer, *flags, "--max_batches", 1, "--out_dir", "run")
    script("eval_mnist", "--checkpoint", "run/last.pt", "--num_steps", 1, "--num_restarts", 1,
           "--num_examples", 20,
           "--out", "run/eval.json")
    done = shell("benchmarks/cost.py", "--results", "run", "--batches", 2, "--repeats", 1, "--out",
                 "cost.json")
    assert done.returncode == 0, done.stderr
    row, = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert (tmp_path / "cost.png").exists() and row["seconds_per_batch"].keys() == phases.keys()
    batches = -(-1300 // 64)  # 1,437 digits of which 137 are held out
    expected = sum(row["seconds_per_batch"][phase] * batches * epochs for phase, epochs in phases.items())
    assert row["seconds"] == pytest.approx(expected) and row["seconds"] > 0


@pytest.mark.slow
def test_a_folder_without_a_result_has_no_cost(shell):
    refused = shell("benchmarks/cost.py", "--results", "nothing")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
