"""Which images a network is measured on, and which of its outputs is which class."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from scipy.io import savemat

from harness.datasets.class_names import match_classes
from harness.datasets.split import Split
from harness.errors import UserError
from models import build_model

QUICK = ("--num_restarts", 1, "--num_steps", 1, "--alphas", 1)


def split_of(labels):
    labels = torch.tensor(labels)
    return Split(torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8), labels, torch.arange(len(labels)))


ANIMALS, DIGITS = ("ant", "bee", "cow"), tuple(map(str, range(10)))
MNIST = tuple(f"{k} - {name}" for k, name in enumerate(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))


@pytest.mark.parametrize(("classes", "known", "outputs", "labels", "note"), [
    (ANIMALS, ANIMALS, 3, [0, 1, 2], None), (("ant", "cow"), ANIMALS, 3, [0, 2], "by name: ant = 0, cow = 2"),
    (("cow", "bee", "ant"), ANIMALS, 3, [2, 1, 0], "by name"),
    (("3", "7"), DIGITS, 10, [3, 7], "by name: 3 = 3, 7 = 7"),
    (("3", "7"), MNIST, 10, [3, 7], "by number"), (DIGITS, MNIST, 10, list(range(10)), None),
    (("3", "7"), None, 10, [3, 7], "by number: 3 = 3, 7 = 7"), (("10", "2"), None, 12, [10, 2], "by number"),
    (DIGITS, None, 10, list(range(10)), None), (MNIST[:4], DIGITS, 10, [0, 1, 2, 3], "by number"),
    (ANIMALS, None, 3, [0, 1, 2], "by the order of their names: ant = 0, bee = 1, cow = 2")])
def test_classes_are_matched_by_name_or_number_and_a_line_says_how(classes, known, outputs, labels, note):
    found, names, said = match_classes(split_of(range(len(classes))), classes, known, outputs)
    assert (found.labels.tolist() == labels and (said is None) == (note is None)
            and (note or "") in (said or ""))
    assert len(names) == outputs and (known is None or names == known)


@pytest.mark.parametrize(("classes", "known", "outputs"), [
    (("ant", "dog"), ANIMALS, 3), (ANIMALS, None, 10), (ANIMALS, None, 2), (("0", "1", "12"), None, 10),
    (("0", "1"), ANIMALS, 3), (("1", "01"), None, 10), (("Ant",), ANIMALS, 3)])
def test_what_cannot_be_matched_is_refused(classes, known, outputs):
    with pytest.raises(UserError, match="name the folders as the network's classes, or after their numbers"):
        match_classes(split_of(range(len(classes))), classes, known, outputs)


@pytest.fixture
def animals(tmp_path):
    """An image folder of three classes that differ in their colour."""
    for split, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(ANIMALS):
            (tmp_path / "animals" / split / name).mkdir(parents=True)
            for k in range(count):
                colour = tuple(220 if channel == label else k for channel in range(3))
                Image.new("RGB", (32, 32), colour).save(tmp_path / "animals" / split / name / f"{k}.png")
    return tmp_path / "animals"


def result_of(script, *flags):
    script("eval_cifar10", *flags, *QUICK)
    return json.loads(Path(flags[flags.index("--out") + 1]).read_text())


def test_a_folder_of_other_classes_is_measured_by_name_or_refused(animals, script, capsys):
    script("train_at_cifar10", "--dataset", animals, *TINY[4:8], "--epochs", 3, "--model", "lenet",
           "--val_size", 4, "--batch_size", 8, "--crop_padding", 0, "--epsilon", 0, "--lr", 0.05,
           "--out_dir", "run")
    whole = result_of(script, "--checkpoint", "run/last.pt", "--out", "whole.json")
    assert whole["classes"] == list(ANIMALS) and whole["image_order"] == "fixed random"
    for split in ("train", "test"):
        shutil.copytree(animals / split / "cow", f"some/{split}/cow")
        shutil.copytree(animals / split / "ant", f"some/{split}/ant")
    some = result_of(script, "--checkpoint", "run/last.pt", "--dataset", "some", "--out", "some.json")
    assert "classes matched by name: ant = 0, cow = 2" in capsys.readouterr().out
    for name, place in (("ant", 0), ("cow", 2)):
        assert some["class_accuracy"]["A_nat"][place] == whole["class_accuracy"]["A_nat"][place], name
    Path("some/train/cow").rename("some/train/dog")
    Path("some/test/cow").rename("some/test/dog")
    with pytest.raises(UserError,
                       match="the images have the classes ant, dog, the network the classes ant, bee, cow"):
        script("eval_cifar10", "--checkpoint", "run/last.pt", "--dataset", "some", "--out", "dog.json")
    assert not list(Path().glob("dog*"))


def test_anyones_network_of_more_classes_than_a_folder_is_matched_by_number(animals, script, capsys):
    torch.save({"ema": build_model("lenet", 7, 3).state_dict()}, "theirs.pt")
    words = ("--checkpoint", "theirs.pt", "--arch", "lenet", "--dataset", animals)
    with pytest.raises(UserError, match="classes ant, bee, cow, the network 7 outputs"):
        result_of(script, *words, "--out", "named.json")
    for name, number in zip(ANIMALS, (6, 0, 3)):
        for split in ("train", "test"):
            (animals / split / name).rename(animals / split / str(number))
    assert len(result_of(script, *words, "--out", "numbered.json")["class_accuracy"]["A_nat"]) == 7
    assert "classes matched by number: 0 = 0, 3 = 3, 6 = 6" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not fit --arch small_cnn: it lacks"):
        result_of(script, *words[:3], "small_cnn", *words[4:], "--out", "other.json")


def test_the_first_images_of_a_folder_are_the_same_for_every_command_and_named_by_their_place(
        animals, script):
    torch.save(build_model("lenet", 3, 3).state_dict(), "net.pt")
    flags = ("--checkpoint", "net.pt", "--arch", "lenet", "--dataset", animals, "--out")
    result_of(script, *flags, "whole.json")
    result_of(script, *flags, "first.json", "--num_examples", 9)
    whole, first = np.load("whole.npz"), np.load("first.npz")
    assert first["index"].tolist() == whole["index"][:9].tolist() != list(range(9))
    assert len(set(first["label"].tolist())) == 3 and (first["label"] == first["index"] // 6).all()
    Path("places.txt").write_text("17 0 5")
    result_of(script, *flags, "chosen.json", "--indices", "places.txt")
    chosen = np.load("chosen.npz")
    assert chosen["index"].tolist() == [17, 0, 5] and chosen["label"].tolist() == [2, 0, 0]
    row = whole["index"].tolist().index(17)
    assert chosen["margin_adv"][0] == whole["margin_adv"][row]  # its random start is its own


def test_arrays_in_a_file_are_trained_on_and_measured(script):
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = np.arange(60) % 10
    np.savez("own.npz", train_images=images[:40], train_labels=labels[:40], test_images=images[40:],
             test_labels=labels[40:])
    np.savez("some.npz", images=images[40:], labels=labels[40:])
    script("train_at_mnist", "--dataset", "npz:own.npz", *TINY[2:], "--val_size", 4, "--out_dir", "run")
    for name in ("own", "some"):
        script("eval_mnist", "--checkpoint", "run/last.pt", "--dataset", f"npz:{name}.npz",
               "--out", f"{name}-eval.json", *QUICK)
    own, some = (json.loads(Path(f"{name}-eval.json").read_text()) for name in ("own", "some"))
    assert own["num_examples"] == 20 and own["A_rob"] == some["A_rob"] and own["image_order"] == "of the file"
    with pytest.raises(UserError, match=r"npz:some\.npz has images to measure on alone"):
        script("train_at_mnist", "--dataset", "npz:some.npz", *TINY[2:])


def test_a_network_and_images_in_mat_files_are_evaluated(script):
    random = np.random.default_rng(0)
    layers = {"U": random.normal(size=(784, 6)), "W": random.normal(size=(6, 10)), "bU": np.zeros((1, 6)),
              "bW": np.zeros((1, 10))}
    savemat("net.mat", layers)
    savemat("set.mat", {"images": random.integers(0, 256, (12, 28, 28), dtype=np.uint8),
                        "labels": np.arange(12) % 10})
    for dataset in ("digits", "mat:set.mat"):
        name = f"{dataset[:3]}.json"
        script("eval_mnist", "--checkpoint", "net.mat", "--dataset", dataset, "--num_examples", 12,
               "--out", name, *QUICK)
        assert json.loads(Path(name).read_text())["architecture"] == ".mat"


@pytest.mark.parametrize(("arrays", "says"), [
    ({"images": np.zeros((2, 4, 4), np.uint8)}, "lacks images or labels"),
    ({"images": np.zeros((2, 4, 4)), "labels": [0, 1]}, "not uint8"),
    ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, 1, 2]}, "not integers from 0 for 2 images"),
    ({"train_images": np.zeros((2, 4, 4), np.uint8), "train_labels": [0, 1]},
     "lacks test_images or test_labels"),
    ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, 3], "classes": ["a", "b"]},
     "classes has 2 names")])
def test_a_file_of_another_form_is_refused(arrays, says, script):
    np.savez("x.npz", **arrays)
    torch.save(build_model("lenet", 10, 1).state_dict(), "net.pt")
    with pytest.raises(UserError, match=says):
        script("eval_mnist", "--checkpoint", "net.pt", "--arch", "lenet", "--dataset", "npz:x.npz")
