"""Files of generated images beside a training set: .npz with `image` [N, H, W, C] and `label` [N], as
released with DM-Improves-AT (Wang et al., ICML 2023)."""
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from harness.datasets.files import copy_stream, reason
from harness.datasets.split import Split
from harness.errors import UserError
from harness.folder import whole_file


@dataclass(frozen=True)
class Extra:
    """Generated images [N, H, W, C] uint8, mapped from their file, labels [N] int64, the first's index."""

    images: np.memmap
    labels: Tensor
    first_index: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Split:
        """The examples of `rows` [b] int64 on the CPU, read from the file; row 0 has index `first_index`."""
        images = torch.from_numpy(self.images[rows.numpy()]).permute(0, 3, 1, 2).contiguous()
        return Split(images, self.labels[rows], self.first_index + rows)


def load_extra(path: str | Path, num_classes: int, image_shape: tuple[int, int, int],
               first_index: int = 0) -> Extra:
    """Generated images for a training set of (C, H, W): `image` [N, H, W, C] uint8 and integer `label` [N].

    The images are mapped into memory where they lie in the .npz file; compressed ones are unpacked once to
    <name>-image-<checksum>.npy beside it. first_index: of the first image, the size of the training set, so
    that no real one has it. Raises UserError for a missing or damaged file, missing keys, and images or
    labels that do not fit the training set.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path} of generated images: download one (for CIFAR-10 and others "
                        "at https://huggingface.co/datasets/P2333/DM-Improves-AT) "
                        "and name it with --extra_data")
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
            if not {"image", "label"} <= set(keys):
                raise UserError(f"{path} has the keys {', '.join(keys) or '(none)'}: a file of generated "
                                "images has image and label")
            labels = _read_labels(archive, path, num_classes)
            images = _map_images(archive, path, image_shape)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError) as error:
        why = reason(error)
        raise UserError(f"{path} cannot be read as an .npz file ({why}): download it again") from error
    if len(labels) != len(images):
        raise UserError(f"{path} has {len(labels):,} labels for {len(images):,} images")
    return Extra(images, torch.from_numpy(labels), first_index)


def _read_labels(archive: zipfile.ZipFile, path: Path, num_classes: int) -> np.ndarray:
    """label.npy [N] of the archive at `path` as int64; UserError unless whole, from 0 to num_classes - 1."""
    with archive.open("label.npy") as stream:
        labels = np.lib.format.read_array(stream, allow_pickle=False)
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(labels):
        raise UserError(f"{path}: label is {labels.dtype} {list(labels.shape)}, not integers [N]")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"{path}: labels go from {labels.min()} to {labels.max()}, but this training set has "
                        f"the classes 0 to {num_classes - 1}")
    return labels.astype(np.int64)


def _map_images(archive: zipfile.ZipFile, path: Path, image_shape: tuple[int, int, int]) -> np.memmap:
    """image.npy [N, H, W, C] of the archive at `path`, mapped into memory; UserError for another form."""
    info = archive.getinfo("image.npy")
    with archive.open(info) as stream:
        shape, fortran, dtype = _npy_header(stream)
        header = stream.tell()
    channels, height, width = image_shape
    if shape[1:] != (height, width, channels) or dtype != np.uint8 or not shape[0]:
        raise UserError(f"{path}: image is {dtype} {list(shape)}, but this training set needs uint8 "
                        f"[N, {height}, {width}, {channels}]")
    size = header + math.prod(shape)
    if info.file_size != size:
        raise ValueError(f"image.npy has {info.file_size:,} bytes, but its header announces {size:,}")
    order = "F" if fortran else "C"
    if info.compress_type == zipfile.ZIP_STORED:
        return np.memmap(path, np.uint8, "r", _member_offset(path, info) + header, shape, order)
    return np.memmap(_unpack(archive, info, path), np.uint8, "r", header, shape, order)


def _npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of the array of a .npy file, read from its beginning."""
    form = np.lib.format
    readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    version = form.read_magic(stream)
    if version not in readers:
        raise ValueError(f"image.npy has format {version}, which is none of numbers")
    return readers[version](stream)


def _member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin in its zip file: behind 30 bytes, its name and its extra field."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        return info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Path:
    """A compressed member as a file beside `path`, made once; UserError if it cannot be written."""
    target = path.with_name(f"{path.stem}-image-{info.CRC:08x}.npy")
    if not target.is_file() or target.stat().st_size != info.file_size:
        print(f"{path} is compressed: unpacking its images once to {target}", flush=True)
        try:
            with archive.open(info) as stream, whole_file(target) as file:
                copy_stream(stream, file, info.file_size, f"unpacking {path.name}")
        except OSError as error:
            raise UserError(f"{path} is compressed, and its {info.file_size / 1e9:.1f} GB cannot be unpacked "
                            f"to {target} ({error.strerror}): put it where there is room for that") from error
    return target
