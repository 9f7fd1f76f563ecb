"""Where images come from: the named data sets and image folders; files of generated images are in generated.py.

mnist, fmnist, cifar10, cifar100, svhn   from torchvision, downloaded on first use; svhn without its `extra` part
tiny-imagenet                    tiny-imagenet-200.zip or the folder it unpacks to, downloaded on first use
digits                           1,797 real handwritten digits that scikit-learn carries, resized to 28x28: nothing to download
a folder                         any image folder, train/CLASS/* and test/CLASS/*
"""
import hashlib
import importlib.util
import secrets
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from harness.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp"}
SPLIT_SEED = 0  # the held-out split is the same for every seed and method
TINY = "tiny-imagenet-200"
TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_COUNTS = {"training": 100_000, "validation": 10_000}


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] uint8, labels [N] int64, and each image's index in the original set [N] int64."""

    images: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> "Split":
        return Split(self.images[rows], self.labels[rows], self.index[rows])

    def to(self, device: torch.device) -> "Split":
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device), self.index.to(device))


def _split(images: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> Split:
    """Images [N, H, W] or [N, H, W, C] as a Split."""
    images, labels = torch.as_tensor(images), torch.as_tensor(labels, dtype=torch.int64)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), labels, torch.arange(len(labels)))


# ---- torchvision and scikit-learn ----------------------------------------------------------------------------------------------------

def _torchvision(cls_name: str, data_dir: Path, option: str = "train", values: tuple = (True, False)) -> list:
    """The training and the test set of a torchvision class, told apart by `option`, downloaded when they are not there.

    Raises UserError where they are missing or damaged (torchvision compares their MD5) and cannot be downloaded.
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
        raise UserError(f"{cls_name} is not in {data_dir.resolve()}, or damaged there, and could not be downloaded ({reason(error)}): put "
                        f"whole files there as torchvision.datasets.{cls_name} lays them out, name their folder with --data_dir, or "
                        "use --dataset digits") from error


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).split("\n")[0].rstrip(":")


def _with_targets(cls_name: str, data_dir: Path) -> tuple:
    """Both splits of a torchvision data set that has `classes`, `data` [N, H, W] or [N, H, W, C] and `targets` [N]."""
    train, test = _torchvision(cls_name, data_dir)
    return train.classes, _split(train.data, train.targets), _split(test.data, test.targets)


def load_svhn(data_dir: Path) -> tuple:
    """SVHN's 73,257 training and 26,032 test images of 32x32, labelled 0 to 9 by their digit, without its `extra` part."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError("--dataset svhn needs scipy to read SVHN's files: pip install -r requirements.txt")
    sets = _torchvision("SVHN", data_dir, "split", ("train", "test"))
    train, test = (_split(part.data.transpose(0, 2, 3, 1), part.labels) for part in sets)
    return [str(k) for k in range(10)], train, test


def load_digits(data_dir: Path) -> tuple:
    """scikit-learn's 8x8 digits, resized to 28x28 (bilinear), in 1,437 training and 360 test images, stratified."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError("--dataset digits needs scikit-learn: pip install -r requirements.txt") from None
    digits = sklearn_digits()
    images = torch.as_tensor(digits.images / 16.0)[:, None]
    images = F.interpolate(images, size=(28, 28), mode="bilinear").squeeze(1).mul(255).round().to(torch.uint8)
    labels = torch.as_tensor(digits.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=digits.target, random_state=SPLIT_SEED)
    return [str(k) for k in range(10)], _split(images[train], labels[train]), _split(images[test], labels[test])


# ---- images in files of their own ----------------------------------------------------------------------------------------------------

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

    def decode() -> dict[str, np.ndarray]:
        decoded = {split: _decode(paths, f"decoding {folder.name}/{split}") for split, paths in files.items()}
        channels = 1 if all(grey for _, grey in decoded.values()) else 3
        return {split: images[..., :channels] for split, (images, _) in decoded.items()}

    arrays = _cached(folder / "cache", _listing({str(p.relative_to(folder)): p for paths in files.values() for p in paths}), decode)
    if arrays["train"].shape[1:] != arrays["test"].shape[1:]:
        raise UserError(f"{folder}: training images are {arrays['train'].shape[1:]}, test images {arrays['test'].shape[1:]}")
    labels = {split: np.array([classes["train"].index(p.parent.name) for p in paths]) for split, paths in files.items()}
    return classes["train"], _split(arrays["train"], labels["train"]), _split(arrays["test"], labels["test"])


def _decode(files: list[Path | zipfile.Path], title: str) -> tuple[np.ndarray, bool]:
    """The images [N, H, W, 3], and whether every file is grey."""
    from PIL import Image

    images, grey = None, True
    for row, file in enumerate(tqdm(files, desc=title, unit="image", disable=None)):
        try:
            with file.open("rb") as stream, Image.open(stream) as image:
                grey = grey and image.mode in ("1", "L")
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # PIL has no error of its own for a damaged file
            raise UserError(f"{file} cannot be read as an image ({reason(error)}): mend or remove it") from error
        if images is None:
            images = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            (height, width), (first_height, first_width) = pixels.shape[:2], images.shape[1:3]
            raise UserError(f"{file} has {width}x{height} pixels, {files[0]} {first_width}x{first_height}: bring all images to one size")
        images[row] = pixels
    return images, grey


def _listing(files: dict[str, Path]) -> str:
    """What changes when one of the named files changes: names, sizes and times of change."""
    return "\n".join(f"{name} {(s := path.stat()).st_size} {s.st_mtime_ns}" for name, path in files.items())


def _cached(prefix: Path, listing: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of <prefix>-<fingerprint of listing>.npz, or those of `make`, kept there for the next time."""
    cache = prefix.with_name(f"{prefix.name}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.npz")
    arrays = _read_cache(cache)
    if arrays is None:
        arrays = make()
        _write_cache(cache, arrays)
    return arrays


def _read_cache(cache: Path) -> dict | None:
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError):
        return None
    except Exception as error:  # zipfile.BadZipFile and zlib.error: a cache that was cut off is decoded again
        print(f"{cache} cannot be read ({error}): decoding the images again", flush=True)
        return None


def _write_cache(cache: Path, arrays: dict) -> None:
    try:
        with written(cache) as file:
            np.savez(file, **arrays)
    except OSError:  # a read-only data folder: decode every time
        pass


@contextmanager
def written(target: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `target` when the block ends well, and is removed when it does not."""
    unfinished = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
        unfinished.replace(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def copy_stream(source: BinaryIO, target: BinaryIO | None, size: int | None, title: str) -> str:
    """Copy all of `source`, of `size` bytes where that is known, behind a progress bar.  Returns its MD5; reads only for None."""
    digest = hashlib.md5()
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        while block := source.read(1 << 20):
            if target:
                target.write(block)
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


# ---- Tiny ImageNet -------------------------------------------------------------------------------------------------------------------

def load_tiny_imagenet(data_dir: Path) -> tuple:
    """Tiny ImageNet, 64x64: its 100,000 training images, and as the test set its 10,000 labelled validation images.

    Read from `data_dir`/tiny-imagenet-200.zip, else from the folder tiny-imagenet-200 there, else from the zip downloaded to there;
    decoded once into one array beside it (tiny-imagenet-200-cache-<fingerprint>.npz), and only then is the zip's MD5 compared. Class k
    is the k-th of the sorted names in wnids.txt; images are in the order of their file names, grey ones converted to RGB. Raises
    UserError for a zip with another MD5, a folder that is not whole, and validation images without labels.
    """
    archive, folder = data_dir / f"{TINY}.zip", data_dir / TINY
    if not archive.is_file() and not folder.is_dir():
        _download_tiny_imagenet(archive)
    if archive.is_file():
        arrays = _cached(data_dir / f"{TINY}-cache", _listing({archive.name: archive}), partial(_read_tiny_archive, archive))
    else:
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.suffix in (".JPEG", ".txt")}
        arrays = _cached(data_dir / f"{TINY}-cache", _listing(files), partial(_read_tiny_files, files, folder))
    train, test = (_split(arrays[name], arrays[f"{name}_labels"]) for name in ("train", "test"))
    return arrays["classes"].tolist(), train, test


def _download_tiny_imagenet(archive: Path) -> None:
    print(f"{archive.name} is not in {archive.parent}, and neither is the folder {TINY}: downloading it", flush=True)
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(TINY_URL, timeout=60) as response, written(archive) as file:
            found = copy_stream(response, file, int(response.headers.get("Content-Length", 0)) or None, f"downloading {archive.name}")
            if found != TINY_MD5:
                raise OSError(f"what came from {TINY_URL} has MD5 {found}, not {TINY_MD5}: try again")
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"{archive.name} is not in {archive.parent.resolve()}, nor is the folder {TINY}, and it could not be downloaded "
                        f"({reason(error)}): put the file {TINY_URL} there, name its folder with --data_dir, or use --dataset digits"
                        ) from error


def _read_tiny_archive(archive: Path) -> dict[str, np.ndarray]:
    """The arrays of _read_tiny_files, straight from the zip: nothing is unpacked."""
    with open(archive, "rb") as file:
        found = copy_stream(file, None, archive.stat().st_size, f"checking {archive.name}")
    if found != TINY_MD5:
        raise UserError(f"{archive} is damaged or another file: its MD5 is {found}, not {TINY_MD5}; remove it and start again, which "
                        f"downloads it, or download it again from {TINY_URL}")
    with zipfile.ZipFile(archive) as opened:
        return _read_tiny_files({name.removeprefix(f"{TINY}/"): zipfile.Path(opened, name) for name in opened.namelist()}, archive)


def _read_tiny_files(files: dict[str, Path | zipfile.Path], where: Path) -> dict[str, np.ndarray]:
    """Decode train and test [N, 64, 64, 3], with train_labels and test_labels [N] and the classes, from files by their name in `where`."""
    if "wnids.txt" not in files:
        raise UserError(f"{where} is not whole: wnids.txt is missing; unpack {TINY}.zip again")
    classes = sorted(files["wnids.txt"].read_text(encoding="utf-8").split())
    labels = {wnid: k for k, wnid in enumerate(classes)}
    images = [name.split("/") for name in sorted(files) if name.endswith(".JPEG")]
    train = {"/".join(parts): labels[parts[1]] for parts in images if parts[0] == "train" and parts[1] in labels}
    test = _tiny_validation_labels(files, [parts for parts in images if parts[0] == "val"], labels, where)
    for (title, count), found in zip(TINY_COUNTS.items(), (train, test)):
        if len(found) != count:
            raise UserError(f"{where} is not whole: it holds {len(found):,} {title} images, not {count:,}; unpack {TINY}.zip again")
    arrays = {"classes": np.array(classes)}
    for split, found in (("train", train), ("test", test)):
        arrays[split], _ = _decode([files[name] for name in found], f"decoding {TINY}, {split}")
        arrays[f"{split}_labels"] = np.array(list(found.values()))
    return arrays


def _tiny_validation_labels(files: dict[str, Path | zipfile.Path], images: list[list[str]], labels: dict[str, int], where: Path) -> dict:
    """{name: label} of the validation images, in the order of their file names wherever they lie: by the class folder that holds one,
    else by val_annotations.txt (file, class, box).
    """
    annotations = {}
    if "val/val_annotations.txt" in files:
        lines = files["val/val_annotations.txt"].read_text(encoding="utf-8").splitlines()
        annotations = dict(line.split("\t")[:2] for line in lines if line.count("\t"))
    found = {}
    for parts in sorted(images, key=lambda parts: parts[-1]):
        label = labels.get(parts[1], labels.get(annotations.get(parts[-1])))
        if label is None and not annotations:
            raise UserError(f"{where}: the images of val are in no class folders, and val/val_annotations.txt, which has their labels, is "
                            f"missing; take it from {TINY}.zip, or unpack that again")
        if label is None:
            raise UserError(f"{where}: val/val_annotations.txt has no class of wnids.txt for {'/'.join(parts)}; unpack {TINY}.zip again")
        found["/".join(parts)] = label
    return found


DATASETS = {
    "mnist": partial(_with_targets, "MNIST"),
    "fmnist": partial(_with_targets, "FashionMNIST"),
    "cifar10": partial(_with_targets, "CIFAR10"),
    "cifar100": partial(_with_targets, "CIFAR100"),
    "svhn": load_svhn,
    "tiny-imagenet": load_tiny_imagenet,
    "digits": load_digits,
}
