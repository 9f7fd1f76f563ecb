"""What every attack asks of its arguments: each check raises a ValueError that names what does not fit."""
import math

import torch
from torch import Tensor

from attacks.noise import example_keys


def check_images(x: Tensor) -> None:
    """Raise ValueError unless x is floating point with every value in [0, 1]; for a GPU see `require`."""
    if not x.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], not {x.dtype}: divide 8-bit ones by 255")
    require((x >= 0) & (x <= 1), "images must lie in [0, 1]: keep pixels in [0, 1] and make normalisation "
                                 "the model's first layer (models.normalize)")


def check_norm(norm: str, norms: tuple[str, ...]) -> None:
    """Raise ValueError for a norm that is not among `norms`."""
    if norm not in norms:
        raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(norms)}")


def check_keys(keys: Tensor | None, x: Tensor) -> Tensor:
    """The keys [B], those of the positions 0 .. B-1 for None.  Raises ValueError if there are not B."""
    if keys is None:
        return example_keys(torch.arange(len(x), device=x.device))
    if keys.shape != x.shape[:1]:
        raise ValueError(f"keys of shape {tuple(keys.shape)} do not fit {len(x)} images")
    return keys


def check_start(start: Tensor, x: Tensor) -> None:
    """Raise ValueError for a first iterate that is not shaped as the images."""
    if start.shape != x.shape:
        shape = tuple(start.shape)
        raise ValueError(f"a start of shape {shape} does not fit images of shape {tuple(x.shape)}")


def check_batch(x: Tensor, y: Tensor, norm: str, norms: tuple[str, ...],
                keys: Tensor | None = None) -> Tensor:
    """`check_images`, `check_norm`, int64 labels [B], and `check_keys`, whose keys it returns."""
    check_images(x)
    check_norm(norm, norms)
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"labels of shape {tuple(y.shape)} and type {y.dtype} do not fit {len(x)} images: "
                         "an int64 class for each is needed")
    return check_keys(keys, x)


def check_classes(y: Tensor, logits: Tensor) -> None:
    """Raise ValueError for a label that is no class of logits [B, K]; for a GPU see `require`."""
    count = logits.shape[1]
    require((y >= 0) & (y < count), f"labels must be classes from 0 to {count - 1}, those of the network")


def check_pictures(x: Tensor) -> None:
    """Raise ValueError for anything but images [B, C, H, W], in whose windows an attack searches."""
    if x.ndim != 4:
        raise ValueError(f"this attack needs images [B, C, H, W], not {list(x.shape)}: give vectors and "
                         "signals the form [B, 1, 1, D]")


def check_at_least(least: int, **numbers: int) -> None:
    """Raise ValueError for a number below `least`, by its name."""
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be >= {least}, not {number}")


def check_size(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number as it is, a tensor [B] as [B, 1, 1, 1]; ValueError unless all are finite and >= 0."""
    if not (isinstance(value, Tensor) and value.ndim):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number >= 0, not {value}")
        return value
    if value.shape != x.shape[:1]:
        raise ValueError(f"{name} of shape {tuple(value.shape)} does not fit {len(x)} images")
    require((value >= 0) & value.isfinite(), f"every {name} must be a finite number >= 0")
    return value.view(-1, *[1] * (x.ndim - 1))


def require(holds: Tensor, message: str) -> None:
    """Raise ValueError(message) unless all of `holds` is true.

    On a GPU the host does not wait for the answer, which would cost an idle gap in every batch: there a
    failure ends the program at the next synchronisation, with the message among the device's assertions.
    """
    if holds.is_cuda:
        torch._assert_async(holds.all(), message)
    elif not bool(holds.all()):
        raise ValueError(message)
