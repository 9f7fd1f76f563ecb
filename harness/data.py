"""Data sets as 8-bit tensors that live on the device, and the batches drawn from them.

mnist, cifar10   from torchvision, downloaded on first use
digits           1,797 real handwritten digits that scikit-learn carries, resized to 28x28: nothing to download
a folder         any image folder, train/CLASS/* and test/CLASS/*, given by its path or its name under --data_dir
"""
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from harness.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp"}
SPLIT_SEED = 0  # the held-out split is the same for every seed and method


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


@dataclass(frozen=True)
class Dataset:
    """A data set in memory: what to train on, what to select on (held out of the training set), what to test on."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.test.images.shape[1:])

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images, in units of [0, 1]."""
        pixels = self.train.images.transpose(0, 1).flatten(1)
        counts = torch.stack([torch.bincount(channel, minlength=256) for channel in pixels]).double()
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = counts @ values / counts.sum(1)
        std = (counts @ values**2 / counts.sum(1) - mean**2).sqrt()
        return mean.tolist(), std.clamp_min(1e-3).tolist()


def load_dataset(name: str, data_dir: str, val_size: int = 0) -> Dataset:
    """Load the data set `name`, a key of DATASETS or an image folder, with `val_size` training images held out.

    Raises UserError in one line when it is not there: what is missing, where it was looked for, how to get it.
    """
    if name in DATASETS:
        classes, train, test = DATASETS[name](Path(data_dir))
    else:
        folder = next((path for path in (Path(name), Path(data_dir) / name) if path.is_dir()), None)
        if folder is None:
            raise UserError(f"no data set '{name}': choose one of {', '.join(DATASETS)}, or an image folder with train/CLASS/* and "
                            f"test/CLASS/* (there is no folder {name} and no folder {Path(data_dir) / name})")
        classes, train, test = load_image_folder(folder)
    if not 0 <= val_size < len(train):
        raise UserError(f"--val_size {val_size} leaves nothing to train on: {name} has {len(train):,} training images")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, kept = order[:val_size].sort().values, order[val_size:].sort().values
    return Dataset(name, tuple(classes), train[kept], train[held_out], test)


def _split(images: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> Split:
    """Images [N, H, W] or [N, H, W, C] as a Split."""
    images, labels = torch.as_tensor(images), torch.as_tensor(labels, dtype=torch.int64)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), labels, torch.arange(len(labels)))


def _torchvision(cls_name: str, data_dir: Path) -> tuple:
    """Both splits of a torchvision data set, downloaded when it is not there."""
    import torchvision.datasets

    cls = getattr(torchvision.datasets, cls_name)
    try:
        sets = [cls(data_dir, train=train) for train in (True, False)]
    except Exception:  # not there, or not whole: torchvision has no error of its own
        print(f"{cls_name} is not in {data_dir}, or not whole: downloading it", flush=True)
        try:
            sets = [cls(data_dir, train=train, download=True) for train in (True, False)]
        except Exception as error:
            reason = str(error).split("\n")[0].rstrip(":")
            raise UserError(f"{cls_name} is not in {data_dir.resolve()}, or damaged there, and could not be downloaded ({reason}): put "
                            f"whole files there as torchvision.datasets.{cls_name} lays them out, name their folder with --data_dir, or "
                            "use --dataset digits") from error
    return sets[0].classes, _split(sets[0].data, sets[0].targets), _split(sets[1].data, sets[1].targets)


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


DATASETS = {
    "mnist": lambda data_dir: _torchvision("MNIST", data_dir),
    "cifar10": lambda data_dir: _torchvision("CIFAR10", data_dir),
    "digits": load_digits,
}


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
    listing = "\n".join(f"{p.relative_to(folder)} {(s := p.stat()).st_size} {s.st_mtime_ns}" for split in files for p in files[split])
    cache = folder / f"cache-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.npz"
    arrays = _read_cache(cache)
    if arrays is None:
        decoded = {split: _decode(paths, f"decoding {folder.name}/{split}") for split, paths in files.items()}
        channels = 1 if all(grey for _, grey in decoded.values()) else 3
        arrays = {split: images[..., :channels] for split, (images, _) in decoded.items()}
        _write_cache(cache, arrays)
    if arrays["train"].shape[1:] != arrays["test"].shape[1:]:
        raise UserError(f"{folder}: training images are {arrays['train'].shape[1:]}, test images {arrays['test'].shape[1:]}")
    labels = {split: np.array([classes["train"].index(p.parent.name) for p in paths]) for split, paths in files.items()}
    return classes["train"], _split(arrays["train"], labels["train"]), _split(arrays["test"], labels["test"])


def _decode(paths: list[Path], title: str) -> tuple[np.ndarray, bool]:
    """The images [N, H, W, 3], and whether every file is grey."""
    from PIL import Image

    images, grey = [], True
    for path in tqdm(paths, desc=title, unit="image", disable=None):
        try:
            with Image.open(path) as image:
                grey = grey and image.mode in ("1", "L")
                images.append(np.asarray(image.convert("RGB")))
        except Exception as error:  # PIL has no error of its own for a damaged file
            raise UserError(f"{path} cannot be read as an image ({error}): mend or remove it") from error
        if images[-1].shape != images[0].shape:
            (height, width), (first_height, first_width) = images[-1].shape[:2], images[0].shape[:2]
            raise UserError(f"{path} has {width}x{height} pixels, {paths[0]} {first_width}x{first_height}: bring all images to one size")
    return np.stack(images), grey


def _read_cache(cache: Path) -> dict | None:
    try:
        with np.load(cache, allow_pickle=False) as stored:
            return {split: stored[split] for split in ("train", "test")}
    except (OSError, ValueError, KeyError, EOFError):
        return None
    except Exception as error:  # zipfile.BadZipFile and zlib.error: a cache that was cut off is decoded again
        print(f"{cache} cannot be read ({error}): decoding the images again", flush=True)
        return None


def _write_cache(cache: Path, arrays: dict) -> None:
    partial = cache.with_suffix(f".{np.random.SeedSequence().entropy % 10**9}.tmp")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        partial.replace(cache)
    except OSError:  # a read-only data folder: decode every time
        partial.unlink(missing_ok=True)


def to_unit(images: Tensor) -> Tensor:
    """8-bit images as float32 in [0, 1]."""
    return images.float().div_(255.0)


def training_batches(split: Split, batch_size: int, seed: int, epoch: int, *, crop_padding: int = 0, padding_mode: str = "constant",
                     flip: bool = False, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """One epoch in an order, and with crops and flips, that (seed, epoch) determine for every example.

    Yields x [b, C, H, W] in [0, 1], y [b], index [b] and this process's share of the global batch times `world_size`: process
    `rank` takes every world_size-th example of each global batch of `batch_size`, so the examples and their augmentation do not
    depend on the number of processes. The last batch may be short; one with fewer examples than processes is left out.
    """
    device, count = split.images.device, len(split)
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(count, generator=generator).to(device)
    crop = torch.randint(0, 2 * crop_padding + 1, (2, count), generator=generator).to(device)
    mirrored = torch.randint(0, 2, (count,), generator=generator).bool().to(device)
    for first in range(0, count, batch_size):
        rows = order[first:first + batch_size]
        if len(rows) < world_size:
            return
        mine = rows[rank::world_size]
        x = to_unit(split.images[mine])
        if crop_padding:
            x = random_crop(x, crop_padding, padding_mode, *crop[:, mine])
        if flip:
            x = torch.where(mirrored[mine, None, None, None], x.flip(3), x)
        yield x, split.labels[mine], split.index[mine], len(mine) * world_size / len(rows)


def random_crop(x: Tensor, padding: int, padding_mode: str, top: Tensor, left: Tensor) -> Tensor:
    """Pad x [B, C, H, W] on every side and cut the window of the original size at (top, left) [B], as one gather."""
    batch, channels, height, width = x.shape
    padded = F.pad(x, (padding,) * 4, mode=padding_mode)
    rows = (top[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    example = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[example, channel, rows, columns]


def first_examples(split: Split, count: int | None) -> Split:
    """The first `count` examples, or all of them for None."""
    if count is not None and count > len(split):
        raise UserError(f"--num_examples {count:,} is more than the set has: {len(split):,}")
    return split if count is None else replace(split, **{name: getattr(split, name)[:count] for name in ("images", "labels", "index")})
