"""The scripts as their users run them: twins, trial runs, determinism, resumption, torchrun,
evaluation, and refusals."""
import ast
import contextlib
import csv
import errno
import importlib
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from torch._dynamo.testing import CompileCounterWithBackend

from harness.errors import RunError, UserError
from models import build_model
from tests import forks

TWINS = [("train_at_mnist", "train_at_cifar10"), ("train_trades_mnist", "train_trades_cifar10"),
         ("eval_mnist", "eval_cifar10")]
TRAINERS = ["train_at_mnist", "train_at_cifar10", "train_trades_mnist", "train_trades_cifar10"]
SCRIPTS = sorted({name for pair in TWINS for name in pair}
                 | {"train_vir", "train_free", "train_yopo", "train_iaat"})


def weights(file):
    return torch.load(file, weights_only=True)["model"]


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def read_log(folder):
    return list(csv.DictReader((folder / "log.csv").open()))


# ---- shape of the scripts ----------------------------------------------------------------------------------

def code_of(name):
    """The script without its docstring, its presets, and the default and comment of each Config field."""
    body = ast.parse((ROOT / f"{name}.py").read_text()).body[1:]
    kept = [node for node in body
            if not (isinstance(node, ast.Assign) and node.targets[0].id in ("RECIPES", "PROTOCOL"))]
    for node in kept:
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                field.value = None
    return [ast.dump(node) for node in kept]


@pytest.mark.parametrize(("mnist", "cifar10"), TWINS)
def test_twins_differ_in_docstring_and_presets_only(mnist, cifar10):
    assert code_of(mnist) == code_of(cifar10)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_default_has_a_comment_that_the_help_shows(name, script, capsys):
    with pytest.raises(SystemExit) as ended:
        script(name, "--help")
    text = "".join(capsys.readouterr().out.split())  # a line of the help may end at a hyphen
    config = importlib.import_module(name).Config
    lines = {}  # of inherited fields too, which a script may set anew
    for part in reversed(config.__mro__[:-1]):
        lines |= {line.split(":")[0]: line for line in inspect.getsource(part).splitlines()
                  if re.match(r"    \w+: ", line)}
    fields = [line.split("  # ")[1].strip() for line in lines.values()]
    assert ended.value.code == 0
    assert len(fields) > 12
    assert all("".join(comment.split()) in text for comment in fields)


# ---- training ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha", [0, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_two_batches_leave_a_complete_run(name, alpha, script):
    model = ("--model", "lenet", "--crop_padding", "2") if "cifar10" in name else ()
    script(name, *TINY, *model, "--alpha", alpha, "--out_dir", "run")
    assert ({path.name for path in Path("run").iterdir()}
            == {"config.json", "log.csv", "log.png", "last.pt", "best.pt"})
    config, (row,) = json.loads(Path("run/config.json").read_text()), read_log(Path("run"))
    assert (config["script"], config["alpha"], config["image_shape"]) == (name, alpha, [1, 28, 28])
    assert 0 <= float(row["val_A_rob"]) <= 100
    assert (float(row["train_weight"]) == 1) == (alpha == 0)


def test_training_lowers_the_loss_and_beats_chance(script):
    script("train_at_mnist", "--recipe", "digits", "--epochs", 12, "--epsilon_warmup_epochs", 4,
           "--num_steps", 4, "--val_num_steps", 5, "--val_step_size", 0.04, "--out_dir", "run")
    rows = read_log(Path("run"))
    assert float(rows[-1]["train_loss"]) < 0.7 * float(rows[0]["train_loss"])
    assert float(rows[-1]["val_A_rob"]) > 30


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(script):
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        # with dropout
        script("train_trades_mnist", *TINY, "--model", "small_cnn", "--seed", seed, "--out_dir", folder)
    assert same_bits(weights("a/last.pt"), weights("b/last.pt"))
    assert not same_bits(weights("a/last.pt"), weights("c/last.pt"))


def test_a_resumed_run_equals_the_undisturbed_one(script):
    short = (*TINY, "--model", "small_cnn", "--lr_drop_after", 2)
    script("train_at_mnist", *short, "--epochs", 4, "--out_dir", "whole")
    script("train_at_mnist", *short, "--epochs", 2, "--out_dir", "parts")
    script("train_at_mnist", "--resume", "parts", "--epochs", 4)
    assert same_bits(weights("whole/last.pt"), weights("parts/last.pt"))
    assert ([row["train_loss"] for row in read_log(Path("whole"))]
            == [row["train_loss"] for row in read_log(Path("parts"))])


def test_a_run_cannot_be_resumed_to_fewer_epochs_than_are_done(script):
    script("train_at_mnist", *TINY, "--epochs", 2, "--out_dir", "run")
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    with pytest.raises(UserError, match="--epochs 1: 2 epochs of run are done already"):
        script("train_at_mnist", "--resume", "run", "--epochs", 1)
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_second_run_never_touches_the_first(script):
    script("train_at_mnist", *TINY, "--out_dir", "run")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    with pytest.raises(UserError, match="never overwrites"):
        script("train_at_mnist", *TINY, "--out_dir", "run")
    script("train_at_mnist", *TINY)
    script("train_at_mnist", *TINY)
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}
    assert len(list(Path("runs/train_at_mnist").iterdir())) == 2


@pytest.mark.slow
def test_torchrun_gives_the_weights_of_one_process(script, torchrun, tmp_path):
    # 65: an uneven split
    flags = (*TINY, "--max_batches", 4, "--batch_size", 65, "--precision", "float32",
             "--epsilon_warmup_epochs", 0, "--val_size", 41, "--ema_decay", 0.5)
    script("train_at_mnist", *flags, "--out_dir", "one")
    done = torchrun("train_at_mnist.py", *flags, "--out_dir", "two")
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one/last.pt"), weights(tmp_path / "two/last.pt")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5
    fresh = build_model("lenet", 10, 1).state_dict()
    assert all(float((one[name] - fresh[name]).abs().max()) > 1e-4 for name in one)
    one, two = read_log(tmp_path / "one")[0], read_log(tmp_path / "two")[0]
    assert one["train_A_rob"] == two["train_A_rob"]
    for name in ("val_A_nat", "val_A_rob", "val_ema_A_nat", "val_ema_A_rob"):  # each has looked at a part
        assert abs(float(one[name]) - float(two[name])) <= 100 / 41 + 1e-9  # an image for rounding


def children_of(process):
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # ended meanwhile
            found += [int(status.parent.name)] * (f"PPid:\t{process}\n" in status.read_text())
    return sorted(found)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_leaves_one_that_goes_on(torchrun, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [*launcher, str(ROOT / "train_at_mnist.py"), "--recipe", "digits", "--num_steps", "2",
               "--epochs", "4", "--out_dir", "run"]
    launcher = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(children_of(launcher.pid)[-1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode != 0 and "SIGKILL" in errors
    before = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert before["epoch"] < 4
    done = torchrun("train_at_mnist.py", "--resume", "run")
    assert done.returncode == 0, done.stderr
    after = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert after["epoch"] == 4 and after["log"][:before["epoch"]] == before["log"]


@pytest.mark.parametrize("words", (
    ("train_at_mnist",), ("train_trades_mnist",), ("train_vir",), ("train_iaat",), ("train_free",),
    *(("train_vir", "--base", base, "--weights", kind, "--burn_in_epochs", 0)
      for base, kind in (("trades", "vir"), ("mart", "gairat"), ("at", "margin"), ("trades", "mail")))))
def test_a_compiled_run_gives_the_weights_of_a_plain_one(words, script, monkeypatch, capsys):
    name = words[0]
    calls, counters, compiled = [], {}, torch.compile

    def traced(function, **options):  # everything but the compiler: graphs, guards and what they leave out
        calls.append((function.__name__, options.pop("options")))
        counters[function.__name__] = CompileCounterWithBackend("eager")
        return compiled(function, backend=counters[function.__name__], **options)

    monkeypatch.setattr(torch, "compile", traced)
    torch.compiler.reset()
    tiny = [flag.replace("num_steps", "num_replays") if name == "train_free" and flag == "--num_steps"
            else flag for flag in TINY]
    # fused convolutions round differently
    flags = (*words[1:], *tiny, "--max_batches", 3, "--model", "lenet", "--no-attack_view")
    flags += (() if name.startswith(("train_at", "train_trades"))
              else ("--crop_padding", 0, "--batch_size", 128))
    script(name, *flags, "--compile", "--out_dir", "compiled")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("torch.compile: ")]
    script(name, *flags, "--out_dir", "plain")
    # which attacks by its training passes
    pieces = ["_network_pass"] + ["whole_step"] * (name != "train_free")
    # one graph, for a ramp too
    assert "whole_step" not in counters or counters["whole_step"].frame_count == 1
    assert calls == [(piece, {"fallback_random": True}) for piece in pieces]  # no CUDA graphs on a CPU
    assert len(said) == len(pieces) and all("is compiled" in line for line in said)
    assert len(torch.load("compiled/last.pt")["compiled"]) == len(pieces)
    assert torch.load("plain/last.pt")["compiled"] == []
    about = [json.loads(Path(folder, "config.json").read_text()) for folder in ("compiled", "plain")]
    assert [one["compile"] for one in about] == [True, False]
    assert same_bits(weights(Path("compiled/last.pt")), weights(Path("plain/last.pt")))


def test_nothing_is_compiled_unless_it_is_asked_for(script, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("compiled"))
    script("train_at_mnist", *TINY, "--out_dir", "run")
    assert json.loads(Path("run/config.json").read_text())["compile"] is False
    assert "torch.compile" not in capsys.readouterr().out


def test_a_run_of_an_earlier_version_is_resumed(script):
    script("train_at_mnist", *TINY, "--out_dir", "run")
    saved = json.loads(Path("run/config.json").read_text()) | {"compile": "auto"}
    del saved["graphs"]
    Path("run/config.json").write_text(json.dumps(saved))
    script("train_at_mnist", "--resume", "run", "--epochs", 2)
    config = json.loads(Path("run/config.json").read_text())
    assert (config["compile"], config["graphs"], len(read_log(Path("run")))) == (False, False, 2)


def test_a_run_is_resumed_whatever_way_its_numbers_were_given(script):
    script("train_at_mnist", *TINY, "--epsilon_warmup_epochs", 1, "--lr_warmup_epochs", 0.5,
           "--max_grad_norm", 2, "--out_dir", "run")
    script("train_at_mnist", "--resume", "run", "--epochs", 2)
    assert len(read_log(Path("run"))) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(script):
    script("train_at_mnist", *TINY, "--out_dir", "run")
    with pytest.raises(RunError, match=r"not finite at epoch 1, step \d+"):
        script("train_at_mnist", *TINY, "--max_batches", 8, "--lr", 1e9, "--out_dir", "bad")
    assert not Path("bad/last.pt").exists()


# ---- evaluation --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The folder of a run, trained once."""
    place = tmp_path_factory.mktemp("trained")
    done = forks.run("train_at_mnist.py", "--recipe", "digits", "--epochs", 4, "--num_steps", 2,
                     "--epsilon_warmup_epochs", 0, "--lr", 0.1, "--epsilon", 0.05, "--out_dir", "runs/first",
                     cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "runs/first"


@pytest.fixture
def trained(script, first_run):
    return Path(shutil.copytree(first_run, "runs/first"))


QUICK = ("--num_steps", 3, "--num_restarts", 2, "--num_examples", 60)


@pytest.mark.rendered
def test_no_arguments_evaluate_the_newest_run(script, trained, capsys):
    script("train_at_cifar10", *TINY, "--model", "lenet", "--out_dir", "runs/second")
    os.utime(trained / "last.pt")
    script("eval_mnist", *QUICK)
    result = json.loads((trained / "eval.json").read_text())
    assert {"A_nat", "A_rob", "A_sa", "A_tr", "ci95", "num_examples", "threat_model", "checkpoint",
            "certificate", "environment"} <= result.keys()
    assert set(result["A_sa"]) == set(result["A_tr"]) == set(result["ci95"]["A_sa"]) == {"1.0", "1.5", "2.0"}
    assert result["num_examples"] == 60
    assert result["threat_model"]["epsilon"] == 0.05  # the checkpoint's
    assert result["certificate"]["max_perturbation"] <= 0.05 + 1e-6 and result["certificate"]["ok"]
    assert (result["A_sa"]["2.0"] <= result["A_sa"]["1.5"] <= result["A_sa"]["1.0"] <= result["A_rob"]
            <= result["A_nat"])
    assert all(result["ci95"][name][0] <= result[name] <= result["ci95"][name][1]
               for name in ("A_nat", "A_rob"))
    assert "A_tr  alpha 2.0" in capsys.readouterr().out
    assert (trained / "eval.png").stat().st_size > 10_000


def test_alpha_zero_is_the_uniform_attacker(script, trained):
    script("eval_mnist", *QUICK, "--alphas", 0, "--out", "zero.json")
    result = json.loads(Path("zero.json").read_text())
    assert result["A_sa"]["0.0"] == result["A_tr"]["0.0"] == result["A_rob"]
    assert result["ci95"]["A_sa"]["0.0"] == result["ci95"]["A_rob"]


def test_a_verdict_does_not_depend_on_the_batch(script, trained):
    for size in (7, 60):
        script("eval_mnist", *QUICK, "--checkpoint", trained / "last.pt", "--batch_size", size,
               "--out", f"{size}.json")
    small, large = np.load("7.npz"), np.load("60.npz")
    assert all(np.array_equal(small[name], large[name])
               for name in small.files if name.startswith(("prediction", "label", "index")))


def test_results_are_never_overwritten(script, trained):
    script("eval_mnist", *QUICK, "--checkpoint", trained / "last.pt")
    script("eval_mnist", *QUICK, "--checkpoint", trained / "last.pt")
    assert {path.name for path in trained.glob("eval*.json")} == {"eval_last.json", "eval_last-2.json"}
    with pytest.raises(UserError, match="never overwritten"):
        script("eval_mnist", *QUICK, "--out", trained / "eval_last.json")


def test_the_flags_win_over_the_checkpoint(script, trained, capsys):
    script("eval_mnist", *QUICK, "--epsilon", "8/255", "--step_size", "2/255", "--start", "gaussian",
           "--out", "r.json")
    threat = json.loads(Path("r.json").read_text())["threat_model"]
    assert ((threat["epsilon"], threat["step_size"], threat["start"], threat["num_restarts"])
            == (8 / 255, 2 / 255, "gaussian", 2))
    said = capsys.readouterr().out
    assert "note: evaluated at epsilon 0.0313725, trained at 0.05" in said and "note: steps" not in said


def test_a_checkpoint_of_the_other_kind_of_images_is_evaluated_with_a_note(script, trained, capsys):
    script("eval_cifar10", *QUICK, "--checkpoint", trained / "last.pt", "--out", "r.json")
    assert "note: steps of epsilon / 10, as for cifar10, on 1-channel images" in capsys.readouterr().out
    assert json.loads(Path("r.json").read_text())["threat_model"]["step_size"] == pytest.approx(0.005)


NETWORK = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(784, 10)
    def forward(self, x):
        return self.head(x.flatten(1))
"""


@pytest.mark.parametrize(("key", "prefix"),
                         [(None, ""), ("state_dict", "module."), ("model", "_orig_mod."),
                          ("net", "module._orig_mod.")])
def test_anyones_checkpoint_is_evaluated_with_the_network_in_their_file(script, key, prefix):
    Path("theirs.py").write_text(NETWORK)
    generator = torch.Generator().manual_seed(0)
    state = {f"{prefix}head.weight": torch.randn(10, 784, generator=generator),
             f"{prefix}head.bias": torch.zeros(10)}
    torch.save(state if key is None else {key: state, "epoch": 3}, "theirs.pt")
    script("eval_mnist", "--dataset", "digits", *QUICK, "--checkpoint", "theirs.pt",
           "--arch", "theirs.py:Net", "--out", "r.json")
    result = json.loads(Path("r.json").read_text())
    assert (result["architecture"], result["threat_model"]["epsilon"]) == ("theirs.py:Net", 0.3)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def spoil(kind):
    """Make a bad checkpoint of this kind in bad.pt."""
    path = Path("bad.pt")
    if kind == "code":
        torch.save({"model": {"a": Malicious()}}, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    elif kind == "web page":
        path.write_text("<!DOCTYPE html><html>not found</html>")
    elif kind == "cut off":
        torch.save(build_model("lenet", 10, 1).state_dict(), path)
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "other network":
        torch.save(build_model("small_cnn", 10, 1).state_dict(), path)


@pytest.mark.parametrize("kind", ["missing", "code", "bare pickle", "web page", "cut off", "other network"])
def test_a_bad_checkpoint_gives_one_line_and_runs_nothing(kind, script):
    spoil(kind)
    with pytest.raises(UserError) as refused:
        script("eval_mnist", "--dataset", "digits", "--checkpoint", "bad.pt", "--arch", "lenet")
    assert "bad.pt" in str(refused.value) and "\n" not in str(refused.value)
    assert not Path("owned").exists()


@pytest.mark.slow
def test_mistakes_give_one_line_and_exit_code_2(shell, tmp_path):
    (tmp_path / "file").touch()
    for name, flags in (("train_at_mnist.py", ("--no_such_flag", "1")),
                        ("train_at_mnist.py", ("--epsilon", "-0.1")),
                        ("train_trades_mnist.py", (*TINY, "--out_dir", "file/run")),
                        ("eval_mnist.py", ("--checkpoint", "none.pt")), ("eval_cifar10.py", ())):
        done = shell(name, *flags)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith(f"{name}: error: ")


@pytest.mark.parametrize(("flags", "says"),
                         [(("--model", "none"), "unknown model 'none'"),
                          (("--dataset", "none"), "no data set 'none'"),
                          (("--recipe", "none"), "unknown recipe 'none': choose one of "),
                          (("--device", "none"), "--device none is not"),
                          (("--val_size", "5000"), "leaves nothing to train on")])
def test_unknown_names_are_refused_before_anything_is_written(flags, says, script):
    with pytest.raises(UserError, match=says):
        script("train_at_mnist", *TINY, *flags)
    assert not Path("runs").exists()


@pytest.mark.parametrize(("room", "name", "words", "says"), [
    (1, "train_at_mnist", (*TINY, "--epochs", 2, "--out_dir", "new"), "train_at_mnist.py --resume new"),
    (1, "train_at_mnist", ("--resume", "run", "--epochs", 2), "train_at_mnist.py --resume run"),
    (2, "eval_mnist", ("--checkpoint", "run", "--num_steps", 1, "--num_restarts", 1, "--num_examples", 8,
                       "--out", "new.json"), "eval_mnist.py --resume new.record"),
    (1, "generate_robustness_curves", ("--command", "compute", "--model", "run", "--n_points", 4, "--budget",
                                       "original", "--no-plot", "--out", "new"),
     "generate_robustness_curves.py compute --resume new")])
def test_a_full_disk_keeps_what_was_saved_and_says_how_to_go_on(room, name, words, says, script, monkeypatch,
                                                                capsys):
    def full(descriptor):
        written.append(descriptor)
        if len(written) > room:
            raise OSError(errno.ENOSPC, "No space left on device")

    script("train_at_mnist", *TINY, "--out_dir", "run")
    before, written = Path("run/last.pt").read_bytes(), []
    with monkeypatch.context() as patch:
        patch.setattr("harness.folder.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            script(name, *words)
    assert f"go on with: python {says}" in capsys.readouterr().err
    assert Path("run/last.pt").read_bytes() == before and not list(Path().rglob("*.tmp"))
    script(name, *says.split()[-2:])


def test_colour_images_train_and_evaluate(script, colour_folder):
    script("train_trades_cifar10", "--dataset", colour_folder, "--model", "lenet", "--normalize",
           "--val_size", 4, "--epochs", 1, "--batch_size", 4, "--num_steps", 1)
    script("eval_cifar10", "--num_steps", 2, "--num_restarts", 1)
    result = json.loads(next(Path("runs").rglob("eval.json")).read_text())
    assert (result["num_examples"], result["threat_model"]["epsilon"],
            len(result["class_accuracy"]["A_nat"])) == (6, 0.031, 2)


def test_a_network_of_the_users_own_trains_and_is_evaluated_only_when_named(script):
    Path("mine.py").write_text(NETWORK)
    script("train_at_mnist", *TINY, "--model", "mine.py:Net")
    with pytest.raises(UserError, match="does not choose the code to run"):
        script("eval_mnist", *QUICK)
    script("eval_mnist", *QUICK, "--arch", "mine.py:Net")
