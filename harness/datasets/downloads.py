"""The data sets by name.

mnist, fmnist, cifar10, cifar100, svhn   torchvision's, downloaded on first use; svhn without its `extra` part
tiny-imagenet                            its zip or the folder it unpacks to, downloaded on first use
digits                                   scikit-learn's 1,797 handwritten digits at 28x28: nothing to download
"""
import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from harness.datasets.files import reason
from harness.datasets.split import split_of
from harness.datasets.tiny_imagenet import load_tiny_imagenet
from harness.errors import UserError

SPLIT_SEED = 0  # the held-out split is the same for every seed and method


def _torchvision(cls_name: str, data_dir: Path, option: str = "train", values: tuple = (True, False)) -> list:
    """A torchvision class's training and test set, told apart by `option`, downloaded if they are not there.

    Raises UserError for missing or damaged ones (torchvision compares their MD5) that cannot be downloaded.
    """
    import torchvision.datasets

    cls = getattr(torchvision.datasets, cls_name)
    try:
        return [cls(data_dir, **{option: value}) for value in values]
    except Exception:  # not there, or not whole: torchvision has no error of its own
        print(f"{cls_name} is not in {data_dir}, or not whole: downloading it", flush=True)
    try:
        return [cls(data_dir, **{option: value}, download=True) for value in values]
    except Exception as error:
        raise UserError(f"{cls_name} is not in {data_dir.resolve()}, or damaged there, and could not be "
                        f"downloaded ({reason(error)}): put whole files there as torchvision.datasets."
                        f"{cls_name} lays them out, name their folder with --data_dir, or "
                        "use --dataset digits") from error


def _with_targets(cls_name: str, data_dir: Path) -> tuple:
    """Both splits of a torchvision data set with `classes`, `data` [N, H, W(, C)] and `targets` [N]."""
    train, test = _torchvision(cls_name, data_dir)
    return train.classes, split_of(train.data, train.targets), split_of(test.data, test.targets)


def load_svhn(data_dir: Path) -> tuple:
    """SVHN's 73,257 training and 26,032 test images of 32x32, labelled 0 to 9 by their digit; no `extra`."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError("--dataset svhn needs scipy to read SVHN's files: pip install -r requirements.txt")
    sets = _torchvision("SVHN", data_dir, "split", ("train", "test"))
    train, test = (split_of(part.data.transpose(0, 2, 3, 1), part.labels) for part in sets)
    return [str(k) for k in range(10)], train, test


def load_digits(data_dir: Path) -> tuple:
    """scikit-learn's 8x8 digits, resized to 28x28 (bilinear): 1,437 training, 360 test images, stratified."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError("--dataset digits needs scikit-learn: pip install -r requirements.txt") from None
    digits = sklearn_digits()
    images = torch.as_tensor(digits.images / 16.0)[:, None]
    images = F.interpolate(images, size=(28, 28), mode="bilinear").squeeze(1).mul(255).round().to(torch.uint8)
    labels = torch.as_tensor(digits.target)
    places = train_test_split(np.arange(len(labels)), test_size=360, stratify=digits.target,
                              random_state=SPLIT_SEED)
    train, test = (split_of(images[rows], labels[rows]) for rows in places)
    return [str(k) for k in range(10)], train, test


DATASETS = {
    "mnist": partial(_with_targets, "MNIST"),
    "fmnist": partial(_with_targets, "FashionMNIST"),
    "cifar10": partial(_with_targets, "CIFAR10"),
    "cifar100": partial(_with_targets, "CIFAR100"),
    "svhn": load_svhn,
    "tiny-imagenet": load_tiny_imagenet,
    "digits": load_digits,
}
