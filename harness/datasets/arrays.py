"""Images as arrays: npz:FILE with `images` and `labels`, or with those of a training and a test set."""
import zipfile
from pathlib import Path

import numpy as np
import torch

from harness.datasets.split import Split
from harness.errors import UserError

PREFIX = "npz:"
NAMES = ("images", "labels", "train_images", "train_labels", "test_images", "test_labels", "classes")


def load_arrays(path: Path) -> tuple[list[str], Split | None, Split]:
    """The classes, the training images and the test images of an .npz file.

    Either `train_images`, `train_labels`, `test_images` and `test_labels`, or `images` and `labels`, which
    are to be measured on: no training images then. Images are uint8 [N, H, W] or [N, H, W, C], labels
    integers from 0; `classes`, names [K], where it is there. Raises UserError in one line for any other file.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in NAMES if name in archive.files}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"{path} cannot be read as an .npz file of numbers") from error
    train = None
    if "images" in found or "train_images" not in found:
        test = image_split(path, found.get("images"), found.get("labels"))
    else:
        train, test = (image_split(path, found.get(f"{name}_images"), found.get(f"{name}_labels"), f"{name}_")
                       for name in ("train", "test"))
        if train.images.shape[1:] != test.images.shape[1:]:
            raise UserError(f"{path}: training images are {list(train.images.shape[1:])}, test images "
                            f"{list(test.images.shape[1:])}")
    most = 1 + max(int(split.labels.max()) for split in (train, test) if split)
    classes = [str(name) for name in found.get("classes", np.arange(most))]
    if len(classes) < most:
        raise UserError(f"{path}: classes has {len(classes)} names, and there are labels up to {most - 1}")
    return classes, train, test


def image_split(path: str | Path, images: np.ndarray | None, labels: np.ndarray | None,
                prefix: str = "") -> Split:
    """`images` uint8 [N, H, W] or [N, H, W, C] and `labels` [N] of the file `path` as a Split.

    prefix: of the arrays' names in messages. Raises UserError for another form.
    """
    if images is None or labels is None:
        raise UserError(f"{path} lacks {prefix}images or {prefix}labels: an image set has both")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise UserError(f"{path}: {prefix}images is {images.dtype} {list(images.shape)}, not uint8 "
                        "[N, H, W, C]")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
        raise UserError(f"{path}: {prefix}labels is {labels.dtype} {list(labels.shape)}, not integers from 0 "
                        f"for {len(images):,} images")
    pixels = torch.from_numpy(images)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return Split(pixels.contiguous(), torch.from_numpy(labels.astype(np.int64)), torch.arange(len(labels)))
