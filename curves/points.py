"""The points of a robustness curve: a data set, or one split in a file, and which of its images."""
import zipfile
from pathlib import Path

import numpy as np
import torch

from curves.mat import image_split, read_images
from harness.datasets.batches import load_dataset
from harness.datasets.split import Split
from harness.errors import UserError


def load_split(name: str, data_dir: str, split: str) -> Split:
    """The `split` ("test" or "train") of a data set, or the images of mat:FILE or npz:FILE.

    Data sets as `load_dataset` names them, and "gts", which is one .mat file a split. An .npz file holds
    images [N, H, W] or [N, H, W, C] uint8 and labels [N]. Raises UserError in one line for whatever is not
    there or has another form.
    """
    kind, colon, file = name.partition(":")
    if name == "gts":
        return read_images(Path(data_dir) / f"gts_int_{split}.mat")
    if colon and kind == "mat":
        return read_images(file)
    if colon and kind == "npz":
        return _read_npz(Path(file))
    data = load_dataset(name, data_dir)
    return data.test if split == "test" else data.train


def _read_npz(path: Path) -> Split:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("images", "labels") if name in archive.files}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"{path} cannot be read as an .npz file of numbers") from error
    return image_split(path, arrays)


def choose(split: Split, n_points: int | None, indices: str | None) -> Split:
    """The first `n_points` of the split, those whose places the text file `indices` names, or all."""
    if indices:
        try:
            rows = [int(word) for word in Path(indices).read_text(encoding="utf-8").split()]
        except (OSError, ValueError) as error:
            raise UserError(f"--indices {indices} is no text file of whole numbers ({error})") from error
        if not rows or len(set(rows)) < len(rows) or min(rows) < 0 or max(rows) >= len(split):
            raise UserError(f"--indices {indices}: each number stands once and is from 0 to "
                            f"{len(split) - 1:,}, and there is at least one")
        split = split[torch.tensor(rows)]
    if n_points is not None and n_points > len(split):
        raise UserError(f"--n_points {n_points:,} is more than the set has: {len(split):,}")
    return split[slice(0, n_points)]


def pick(split: Split, places: np.ndarray) -> Split:
    """The images at `places` [n] of the data set, in that order.  Raises UserError where one is not there."""
    row = {place: k for k, place in enumerate(split.index.tolist())}
    if missing := [place for place in places.tolist() if place not in row]:
        raise UserError(f"the data set has no image {missing[0]}: it is not the one these distances were "
                        "measured on")
    return split[torch.tensor([row[place] for place in places.tolist()])]
