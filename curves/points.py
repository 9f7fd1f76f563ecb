"""The points of a robustness curve: a data set, or one split in a file, and which of its images."""
from pathlib import Path

import numpy as np
import torch

from curves.mat import read_images
from harness.datasets import arrays
from harness.datasets.batches import first_examples, image_order, load_dataset
from harness.datasets.split import Split
from harness.errors import UserError


def load_split(name: str, data_dir: str, split: str = "test") -> tuple[Split, tuple[str, ...]]:
    """The `split` ("test" or "train") of a data set, or the images of mat:FILE or npz:FILE; their classes.

    Data sets as `load_dataset` names them, and "gts", which is one .mat file a split. A .mat file names no
    classes. Raises UserError in one line for whatever is not there or has another form.
    """
    kind, colon, file = name.partition(":")
    if name == "gts":
        return read_images(Path(data_dir) / f"gts_int_{split}.mat"), ()
    if colon and kind == "mat":
        return read_images(file), ()
    if name.startswith(arrays.PREFIX):
        classes, train, test = arrays.load_arrays(Path(file))
        if split == "train" and train is None:
            raise UserError(f"{name} holds no train_images: leave --split out")
        return (test if split == "test" else train), tuple(classes)
    data = load_dataset(name, data_dir)
    if split == "train":
        in_order = image_order(name) == "published"
        return (data.train if in_order else data.train.in_fixed_order()), data.classes
    return data.test, data.classes


def choose(split: Split, n_points: int | None, indices: str | None) -> Split:
    """The first `n_points` of the split, those whose places the text file `indices` names, or all."""
    return first_examples(split, n_points, indices, "--n_points")


def pick(split: Split, places: np.ndarray) -> Split:
    """The images at `places` [n] of the data set, in that order.  Raises UserError where one is not there."""
    row = {place: k for k, place in enumerate(split.index.tolist())}
    if missing := [place for place in places.tolist() if place not in row]:
        raise UserError(f"the data set has no image {missing[0]}: it is not the one these distances were "
                        "measured on")
    return split[torch.tensor([row[place] for place in places.tolist()])]
