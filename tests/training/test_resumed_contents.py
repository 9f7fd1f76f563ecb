"""--resume compares what a run was made of: changed images or code are refused,
moved ones go on to the same bits."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from harness.errors import UserError

NET = """import torch
def Net(num_classes, in_channels):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_channels * 1024, num_classes))
"""
FLAGS = (*TINY[4:8], "--epochs", 1, "--val_size", 4, "--batch_size", 4, "--crop_padding", 0,
         "--model", "net.py:Net")


@pytest.fixture
def run(script, colour_folder):
    """A run of one epoch on an image folder with a network of the user's own."""
    Path("net.py").write_text(NET)
    script("train_at_cifar10", "--dataset", colour_folder, *FLAGS, "--out_dir", "run")
    return lambda *flags: script("train_at_cifar10", "--resume", "run", "--epochs", 2, *flags)


def repaint(folder):
    image = np.asarray(Image.open(folder / "train/dark/0.png")).copy()
    image[0, 0, 0] ^= 1
    Image.fromarray(image).save(folder / "train/dark/0.png")


def add(folder):
    shutil.copy(folder / "train/dark/0.png", folder / "train/dark/9.png")


def swap(folder):
    (folder / "train/dark").rename(folder / "train/other")
    (folder / "train/light").rename(folder / "train/dark")
    (folder / "train/other").rename(folder / "train/light")


@pytest.mark.parametrize("change",
                         [repaint, add, swap, lambda folder: (folder / "train/light/3.png").unlink()])
def test_changed_images_are_refused_and_the_run_is_left_as_it_was(change, run, colour_folder):
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    change(colour_folder)
    with pytest.raises(UserError,
                       match="the training images or their labels have changed since this run began"):
        run()
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


def test_changed_code_is_refused(run):
    Path("net.py").write_text(NET + "# another\n")
    with pytest.raises(UserError, match="the file of the network has changed"):
        run()


def test_what_has_moved_goes_on_to_the_same_bits(run, script, colour_folder):
    script("train_at_cifar10", "--dataset", colour_folder, *FLAGS, "--epochs", 2, "--out_dir", "whole")
    Path("elsewhere").mkdir()
    shutil.move(colour_folder, "elsewhere/images")
    shutil.move("net.py", "elsewhere/theirs.py")
    for missing in (("--dataset", "elsewhere/images"), ("--model", "elsewhere/theirs.py:Net")):
        with pytest.raises(UserError):
            run(*missing)
    run("--dataset", "elsewhere/images", "--model", "elsewhere/theirs.py:Net")
    whole, moved = (torch.load(f"{name}/last.pt", weights_only=True)["model"] for name in ("whole", "run"))
    assert all(torch.equal(whole[name], moved[name]) for name in whole)
    assert json.loads(Path("run/config.json").read_text())["model"] == "elsewhere/theirs.py:Net"


@pytest.mark.parametrize(("flag", "value"),
                         [("--model", "lenet"), ("--model", "net.py:Other"), ("--dataset", "mnist")])
def test_another_network_or_data_set_is_refused(flag, value, run):
    with pytest.raises(UserError, match=f"leave out {flag}"):
        run(flag, value)


def test_generated_images_may_move_and_not_change(script):
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28, 1), dtype=np.uint8)
    np.savez("extra.npz", image=images, label=np.arange(50) % 10)
    script("train_vir", *TINY, "--recipe", "at-digits", "--extra_data", "extra.npz", "--extra_fraction", 0.5,
           "--out_dir", "run")
    Path("extra.npz").rename("moved.npz")
    with pytest.raises(UserError, match=r"no file extra\.npz"):
        script("train_vir", "--resume", "run", "--epochs", 2)
    script("train_vir", "--resume", "run", "--epochs", 2, "--extra_data", "moved.npz")
    np.savez("moved.npz", image=images[::-1], label=np.arange(50) % 10)
    with pytest.raises(UserError, match="the generated images have changed"):
        script("train_vir", "--resume", "run", "--epochs", 3)


def test_an_evaluation_goes_on_wherever_its_files_are_and_on_nothing_else(script, monkeypatch):
    script("train_at_mnist", *TINY, "--out_dir", "run")
    flags = ("--num_examples", 8, "--num_restarts", 1, "--num_steps", 1, "--alphas", 1)
    script("eval_mnist", "--checkpoint", "run/last.pt", *flags, "--out", "whole.json")
    shutil.copytree("whole.record", "part.record")
    config = json.loads(Path("part.record/config.json").read_text()) | {"out": "part.json"}
    Path("part.record/config.json").write_text(json.dumps(config))
    shutil.rmtree("part.record/last/A_rob")
    kept = {path: path.read_bytes() for path in Path("part.record").rglob("*.json")}
    Path("run").rename("moved")
    for changed in (("--epsilon", 0.2), ("--seed", 5), ("--num_steps", 2)):
        with pytest.raises(UserError, match="leave out"):
            script("eval_mnist", "--resume", "part.record", *changed)
        with pytest.raises(UserError, match="the record of another evaluation"):
            script("eval_mnist", "--checkpoint", "moved/last.pt", *flags, "--out", "part.json", *changed)
    assert kept == {path: path.read_bytes() for path in Path("part.record").rglob("*.json")}
    script("eval_mnist", "--resume", "part.record", "--checkpoint", "moved/last.pt")
    whole, part = (json.loads(Path(f"{name}.json").read_text()) for name in ("whole", "part"))
    assert whole["A_rob"] == part["A_rob"] and part["checkpoint"] == "moved/last.pt"
