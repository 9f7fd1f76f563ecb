"""Image folders: train/CLASS/* and test/CLASS/*."""
from pathlib import Path

import numpy as np

from harness.datasets.files import cached, decode, listing
from harness.datasets.split import split_of
from harness.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp"}


def load_image_folder(folder: Path) -> tuple:
    """An image folder, decoded once into one 8-bit array that is kept beside it as cache-<fingerprint>.npz.

    All images have one size; a set of grey images has one channel, any other three. Raises UserError for a missing split, a class
    that only one split has, images of different sizes, and a file that is no image.
    """
    files = {split: sorted(p for p in (folder / split).glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES) for split in ("train", "test")}
    classes = {split: sorted({p.parent.name for p in paths}) for split, paths in files.items()}
    for split, paths in files.items():
        if not paths:
            raise UserError(f"{folder} is no image folder: it holds no images {split}/CLASS/*")
    if classes["train"] != classes["test"]:
        only = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise UserError(f"{folder}: train and test have different classes ({', '.join(only[:5])} in one of them only)")

    def decode_all() -> dict[str, np.ndarray]:
        decoded = {split: decode(paths, f"decoding {folder.name}/{split}") for split, paths in files.items()}
        channels = 1 if all(grey for _, grey in decoded.values()) else 3
        return {split: images[..., :channels] for split, (images, _) in decoded.items()}

    arrays = cached(folder / "cache", listing({str(p.relative_to(folder)): p for paths in files.values() for p in paths}), decode_all)
    if arrays["train"].shape[1:] != arrays["test"].shape[1:]:
        raise UserError(f"{folder}: training images are {arrays['train'].shape[1:]}, test images {arrays['test'].shape[1:]}")
    labels = {split: np.array([classes["train"].index(p.parent.name) for p in paths]) for split, paths in files.items()}
    return classes["train"], split_of(arrays["train"], labels["train"]), split_of(arrays["test"], labels["test"])
