"""A data set in memory as 8-bit tensors that live on the device, and the batches drawn from it."""
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.datasets import arrays
from harness.datasets.downloads import DATASETS, SPLIT_SEED
from harness.datasets.generated import Extra, load_extra
from harness.datasets.image_folders import load_image_folder
from harness.datasets.split import Split
from harness.device import reads_by_itself
from harness.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """A data set in memory: what to train on, to select on (held out of the training set) and to test on.

    `extra` are generated images to train on beside the real ones; they stay in their file.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    extra: Extra | None = None

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


def load_dataset(name: str, data_dir: str, val_size: int = 0, extra: str | None = None) -> Dataset:
    """Load `name`, a key of DATASETS, npz:FILE or an image folder, with `val_size` training images held out.

    extra: an .npz file of generated images, as load_extra reads it; their indices follow the training set's.
    Raises UserError in one line if it is not there: what is missing, where it was looked for, how to get it.
    """
    if name in DATASETS:
        classes, train, test = DATASETS[name](Path(data_dir))
    elif name.startswith(arrays.PREFIX):
        classes, train, test = arrays.load_arrays(Path(name.removeprefix(arrays.PREFIX)))
        if train is None:
            raise UserError(f"{name} has images to measure on alone: a training needs train_images, "
                            "train_labels, test_images and test_labels")
    else:
        folder = next((path for path in (Path(name), Path(data_dir) / name) if path.is_dir()), None)
        if folder is None:
            raise UserError(f"no data set '{name}': choose one of {', '.join(DATASETS)}, npz:FILE, or an "
                            "image folder with train/CLASS/* and test/CLASS/* "
                            f"(there is no folder {name} and no folder {Path(data_dir) / name})")
        classes, train, test = load_image_folder(folder)
    if not 0 <= val_size < len(train):
        raise UserError(f"--val_size {val_size} leaves nothing to train on: {name} has {len(train):,} "
                        "training images")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = order[:val_size].sort().values
    kept = order[val_size:].sort().values
    image_shape = tuple(test.images.shape[1:])
    generated = load_extra(extra, len(classes), image_shape, len(train)) if extra else None
    return Dataset(name, tuple(classes), train[kept], train[held_out], test, generated)


def image_order(name: str) -> str:
    """The order of the test images of the data set `name`, of which `--num_examples` takes the first."""
    if name in DATASETS:
        return "published"
    return "of the file" if ":" in name else "fixed random"


def send(part: Split, device: torch.device) -> Split:
    """The examples on `device`; one that reads the host's memory by itself gets them without a wait."""
    return part.pinned().to(device, non_blocking=True) if reads_by_itself(device) else part.to(device)


def to_unit(images: Tensor) -> Tensor:
    """8-bit images as float32 in [0, 1]."""
    return images.float().div_(255.0)


def training_batches(split: Split, batch_size: int, seed: int, epoch: int, *, crop_padding: int = 0,
                     padding_mode: str = "constant", flip: bool = False, rank: int = 0, world_size: int = 1,
                     extra: Extra | None = None, extra_fraction: float = 0.0,
                     ) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """One epoch in an order, and with crops and flips, that (seed, epoch) determine for every example.

    Yields x [b, C, H, W] in [0, 1], y [b], index [b] and this process's share of the global batch times
    `world_size`: process `rank` takes every world_size-th example of each global batch (`batch_places`), so
    the examples and their augmentation do not depend on the number of processes.

    With `extra`, round(extra_fraction * b) of a global batch of b are generated. An epoch still has as many
    images in all as `split`: a random part of the real ones, each at most once, and random generated ones,
    each at most once unless there are too few. Generated row r has the index extra.first_index + r, or the
    largest real index + 1 + r if that is more. Raises UserError for an extra_fraction outside [0, 1].
    """
    device, count = split.images.device, len(split)
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(count, generator=generator)
    augmentation = _draw_augmentation(count, crop_padding, generator)
    if extra is not None:
        extra = replace(extra, first_index=max(extra.first_index, int(split.index.max()) + 1))
        order, drawn = _mix(order, batch_size, world_size, len(extra), extra_fraction, generator)
        augmentation = torch.cat([augmentation, _draw_augmentation(len(drawn), crop_padding, generator)], 1)
    augmentation, order_on_device = augmentation.to(device), order.to(device)
    places = batch_places(count, batch_size, world_size)
    own = [slice(first + rank, first + size, world_size) for first, size in places]
    generated = iter(())
    if extra is not None:  # those from `count` on, which come last in a batch
        wanted = (order[mine] for mine in own)
        generated = fetched_ahead(extra, (drawn[rows[rows >= count] - count] for rows in wanted), device)
    for (_, size), mine in zip(places, own):
        rows = order_on_device[mine]
        part = split[rows[:int((order[mine] < count).sum())]]
        if extra is not None:
            part = _joined(part, next(generated))
        x = to_unit(part.images)
        top, left, mirrored = augmentation[:, rows]
        if crop_padding:
            x = random_crop(x, crop_padding, padding_mode, top, left)
        if flip:
            x = torch.where(mirrored[:, None, None, None] == 1, x.flip(3), x)
        yield x, part.labels, part.index, len(rows) * world_size / size


def batch_places(count: int, batch_size: int, world_size: int = 1) -> list[tuple[int, int]]:
    """(first, size) of the batches of `count` examples.

    The last one may be short. One of a single example, which BatchNorm cannot normalise, or of less than an
    eighth of the others joins the batch before it. One with fewer examples than processes is left out.
    """
    sizes = [min(batch_size, count - first) for first in range(0, count, batch_size)]
    if len(sizes) > 1 and sizes[-1] < max(2, batch_size // 8) <= batch_size:
        sizes[-2:] = [sum(sizes[-2:])]
    places = zip(range(0, count, batch_size), sizes)
    return [(first, size) for first, size in places if size >= world_size]


def _draw_augmentation(count: int, crop_padding: int, generator: torch.Generator) -> Tensor:
    """The crop's top and left and whether to flip (0 or 1), [3, count]."""
    crop = torch.randint(0, 2 * crop_padding + 1, (2, count), generator=generator)
    return torch.cat([crop, torch.randint(0, 2, (1, count), generator=generator)])


def _mix(order: Tensor, batch_size: int, world_size: int, population: int, fraction: float,
         generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`order` [n] with the last round(fraction * b) of each batch of b replaced by n, n + 1, ...; their rows.

    The rows, below `population`, differ if there are enough (a few of many are drawn without permuting all).
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"--extra_fraction {fraction} is not in [0, 1]")
    order, numbers = order.clone(), len(order)
    for first, size in batch_places(len(order), batch_size, world_size):
        batch = order[first:first + size]
        generated = round(fraction * len(batch))
        batch[len(batch) - generated:] = torch.arange(numbers, numbers + generated)
        numbers += generated
    drawn = numbers - len(order)
    seed = int(torch.randint(2**62, (), generator=generator))
    rows = np.random.default_rng(seed).choice(population, drawn, replace=drawn > population)
    return order, torch.from_numpy(rows)


def fetched_ahead(extra: Extra, rows: Iterable[Tensor], device: torch.device) -> Iterator[Split]:
    """extra[r] on `device` for each r of `rows`, the next one read from the file while this one is used."""
    with ThreadPoolExecutor(1) as reader:
        coming: deque[Future[Split]] = deque()
        for wanted in rows:
            coming.append(reader.submit(extra.__getitem__, wanted))
            if len(coming) > 1:
                yield send(coming.popleft().result(), device)
        while coming:
            yield send(coming.popleft().result(), device)


def _joined(first: Split, second: Split) -> Split:
    """The examples of both, one after the other."""
    pairs = ((getattr(first, name), getattr(second, name)) for name in ("images", "labels", "index"))
    return Split(*map(torch.cat, pairs))


def random_crop(x: Tensor, padding: int, padding_mode: str, top: Tensor, left: Tensor) -> Tensor:
    """Pad x [B, C, H, W] on every side and cut its size out at (top, left) [B], as one gather."""
    batch, channels, height, width = x.shape
    padded = F.pad(x, (padding,) * 4, mode=padding_mode)
    rows = (top[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    example = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[example, channel, rows, columns]


def first_examples(split: Split, count: int | None, indices: str | None = None,
                   flag: str = "--num_examples") -> Split:
    """The first `count` examples, all for None, of `split` or of those that the text file `indices` names.

    It names each by its place in the data set, `Split.index`. flag: what a message on a large `count` names.
    """
    if indices:
        try:
            places = [int(word) for word in Path(indices).read_text(encoding="utf-8").split()]
        except (OSError, ValueError) as error:
            raise UserError(f"--indices {indices} is no text file of whole numbers ({error})") from error
        row = {place: k for k, place in enumerate(split.index.tolist())}
        if not places or len(set(places)) < len(places) or not row.keys() >= set(places):
            raise UserError(f"--indices {indices}: each number stands once and is from 0 to "
                            f"{len(split) - 1:,}, and there is at least one")
        split = split[torch.tensor([row[place] for place in places])]
    if count is not None and count > len(split):
        raise UserError(f"{flag} {count:,} is more than the set has: {len(split):,}")
    return split if count is None else split[slice(0, count)]
