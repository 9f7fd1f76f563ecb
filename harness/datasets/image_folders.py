"""Image folders: train/CLASS/* and test/CLASS/*."""
from pathlib import Path

import numpy as np

from harness.datasets.files import cached, listing
from harness.datasets.pictures import decode, suffixes
from harness.datasets.split import split_of
from harness.errors import UserError
from harness.folder import readable

READING = "2"  # of how images are read: a cache of another reading is made again


def load_image_folder(folder: Path) -> tuple:
    """An image folder, decoded once into one 8-bit array that is kept beside it as cache-<fingerprint>.npz.

    All images have one size; a set of grey images has one channel, any other three. Classes are the sorted
    names of the folders; names that begin with a dot are left out. The files are sorted by class, so the test
    images come in one fixed random order (`Split.in_fixed_order`), whose first N are a sample of all. Raises
    UserError for a missing split, a class that only one split has or that has no image, images of different
    sizes, and a file that is no image.
    """
    files = {split: _images_of(folder / split) for split in ("train", "test")}
    classes = {split: list(found) for split, found in files.items()}
    for split, found in files.items():
        if not found:
            raise UserError(f"{folder} is no image folder: it holds no images {split}/CLASS/*")
    if classes["train"] != classes["test"]:
        only = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise UserError(f"{folder}: train and test have different classes ({', '.join(only[:5])} in one of "
                        "them only)")
    paths = {split: [path for part in found.values() for path in part] for split, found in files.items()}

    def decode_all() -> dict[str, np.ndarray]:
        decoded = {split: decode(part, f"decoding {folder.name}/{split}") for split, part in paths.items()}
        channels = 1 if all(grey for _, grey in decoded.values()) else 3
        return {split: images[..., :channels] for split, (images, _) in decoded.items()}

    names = {str(path.relative_to(folder)): path for part in paths.values() for path in part}
    arrays = cached(folder / f"cache-{READING}", listing(names), decode_all)
    if arrays["train"].shape[1:] != arrays["test"].shape[1:]:
        raise UserError(f"{folder}: training images are {arrays['train'].shape[1:]}, test images "
                        f"{arrays['test'].shape[1:]}")
    counts = {split: [len(part) for part in found.values()] for split, found in files.items()}
    labels = {split: np.repeat(np.arange(len(count)), count) for split, count in counts.items()}
    train, test = (split_of(arrays[split], labels[split]) for split in ("train", "test"))
    return classes["train"], train, test.in_fixed_order()


def _images_of(folder: Path) -> dict[str, list[Path]]:
    """Class -> its image files, both sorted.  Raises UserError for a class without one."""
    if not folder.is_dir():
        return {}
    known = suffixes()
    found: dict[str, list[Path]] = {}
    others: list[Path] = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        inside = sorted(path for path in place.iterdir() if path.name[0] != ".")
        images = [path for path in inside if path.is_file() and path.suffix.lower() in known]
        if not images:
            what = f"{len(inside)} files, such as {inside[0].name}" if inside else "nothing"
            raise UserError(f"the class {place} has no image: it holds {what}; remove the folder, or add "
                            "images")
        found[readable(place.name)] = images
        others += sorted(set(inside) - set(images))
    if others:
        print(f"note: {len(others):,} files and folders in {folder} are no images and left out, such as "
              f"{others[0]}")
    return found
