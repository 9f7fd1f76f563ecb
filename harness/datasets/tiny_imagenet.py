"""Tiny ImageNet: from its zip, from the folder that it unpacks to, or downloaded."""
import urllib.request
import zipfile
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np

from harness.datasets.files import cached, copy_stream, listing, reason
from harness.datasets.pictures import decode
from harness.datasets.split import split_of
from harness.errors import UserError
from harness.folder import whole_file

TINY = "tiny-imagenet-200"
TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_COUNTS = {"training": 100_000, "validation": 10_000}


def load_tiny_imagenet(data_dir: Path) -> tuple:
    """Tiny ImageNet, 64x64: its 100,000 training images, and as test set its 10,000 validation images.

    Read from `data_dir`/tiny-imagenet-200.zip, else from the folder tiny-imagenet-200 there, else from the
    zip downloaded to there; decoded once into tiny-imagenet-200-cache-<fingerprint>.npz beside it, and only
    then is the zip's MD5 compared. Class k is the k-th of the sorted names in wnids.txt; images are in the
    order of their file names, grey ones converted to RGB. Raises UserError for a zip with another MD5, a
    folder that is not whole, and validation images without labels.
    """
    archive, folder, cache = data_dir / f"{TINY}.zip", data_dir / TINY, data_dir / f"{TINY}-cache"
    if not archive.is_file() and not folder.is_dir():
        _download_tiny_imagenet(archive)
    if archive.is_file():
        arrays = cached(cache, listing({archive.name: archive}), partial(_read_tiny_archive, archive))
    else:
        files = {path.relative_to(folder).as_posix(): path
                 for path in sorted(folder.rglob("*")) if path.suffix in (".JPEG", ".txt")}
        arrays = cached(cache, listing(files), partial(_read_tiny_files, files, folder))
    train, test = (split_of(arrays[name], arrays[f"{name}_labels"]) for name in ("train", "test"))
    return arrays["classes"].tolist(), train, test


def _download_tiny_imagenet(archive: Path) -> None:
    name = archive.name
    print(f"{name} is not in {archive.parent}, and neither is the folder {TINY}: downloading it", flush=True)
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(TINY_URL, timeout=60) as response, whole_file(archive) as file:
            size = int(response.headers.get("Content-Length", 0)) or None
            found = copy_stream(response, file, size, f"downloading {name}")
            if found != TINY_MD5:
                raise OSError(f"what came from {TINY_URL} has MD5 {found}, not {TINY_MD5}: try again")
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"{name} is not in {archive.parent.resolve()}, nor is the folder {TINY}, and it "
                        f"could not be downloaded ({reason(error)}): put the file {TINY_URL} there, name its "
                        "folder with --data_dir, or use --dataset digits") from error


def _read_tiny_archive(archive: Path) -> dict[str, np.ndarray]:
    """The arrays of _read_tiny_files, straight from the zip: nothing is unpacked."""
    with open(archive, "rb") as file:
        found = copy_stream(file, None, archive.stat().st_size, f"checking {archive.name}")
    if found != TINY_MD5:
        raise UserError(f"{archive} is damaged or another file: its MD5 is {found}, not {TINY_MD5}; remove "
                        f"it and start again, which downloads it, or download it again from {TINY_URL}")
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        files = {name.removeprefix(f"{TINY}/"): zipfile.Path(opened, name) for name in names}
        return _read_tiny_files(files, archive)


def _read_tiny_files(files: dict[str, Path | zipfile.Path], where: Path) -> dict[str, np.ndarray]:
    """Decode train and test [N, 64, 64, 3], train_labels and test_labels [N] and the classes from `where`.

    files: by their name in `where`.
    """
    if "wnids.txt" not in files:
        raise UserError(f"{where} is not whole: wnids.txt is missing; unpack {TINY}.zip again")
    classes = sorted(files["wnids.txt"].read_text(encoding="utf-8").split())
    labels = {wnid: k for k, wnid in enumerate(classes)}
    images = [name.split("/") for name in sorted(files) if name.endswith(".JPEG")]
    train = {"/".join(parts): labels[parts[1]]
             for parts in images if parts[0] == "train" and parts[1] in labels}
    test = _tiny_validation_labels(files, [parts for parts in images if parts[0] == "val"], labels, where)
    for (title, count), found in zip(TINY_COUNTS.items(), (train, test)):
        if len(found) != count:
            raise UserError(f"{where} is not whole: it holds {len(found):,} {title} images, not {count:,}; "
                            f"unpack {TINY}.zip again")
    arrays = {"classes": np.array(classes)}
    for split, found in (("train", train), ("test", test)):
        arrays[split], _ = decode([files[name] for name in found], f"decoding {TINY}, {split}")
        arrays[f"{split}_labels"] = np.array(list(found.values()))
    return arrays


def _tiny_validation_labels(files: dict[str, Path | zipfile.Path], images: list[list[str]],
                            labels: dict[str, int], where: Path) -> dict[str, int]:
    """{name: label} of the validation images, in the order of their file names wherever they lie.

    A label is that of the class folder around the image, else from val_annotations.txt (file, class, box).
    """
    annotations = {}
    if "val/val_annotations.txt" in files:
        lines = files["val/val_annotations.txt"].read_text(encoding="utf-8").splitlines()
        annotations = dict(line.split("\t")[:2] for line in lines if line.count("\t"))
    found = {}
    for parts in sorted(images, key=lambda parts: parts[-1]):
        label = labels.get(parts[1], labels.get(annotations.get(parts[-1])))
        if label is None and not annotations:
            raise UserError(f"{where}: the images of val are in no class folders, and "
                            "val/val_annotations.txt, which has their labels, is missing; "
                            f"take it from {TINY}.zip, or unpack that again")
        name = "/".join(parts)
        if label is None:
            raise UserError(f"{where}: val/val_annotations.txt has no class of wnids.txt for {name}; "
                            f"unpack {TINY}.zip again")
        found[name] = label
    return found
