"""How far apart the classes of a data set are, in exact integers on 8-bit images.

    inter(x_i) = min over j with y_j != y_i of ||x_i - x_j||_p
    intra(x_i) = min over j != i with y_j = y_i of ||x_i - x_j||_p

A classifier that is right on all of the data can be robust everywhere at size t only if t is below half the
smallest inter-class distance.
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curves import NORMS

BLOCK_BYTES = 150_000  # of images at a time: three such blocks stay in a core's second-level cache
NONE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class ClassDistances:
    """Per point the smallest distances in one norm, [n] int64; NONE where there is none.

    In grey levels of 0 to 255, l_2 squared. prefix: entry j is the smallest inter-class distance among the
    first j + 1 points of a random order, copies in another class left out.
    """

    norm: str
    inter: np.ndarray
    intra: np.ndarray
    prefix: np.ndarray

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Those integers as float64 distances of images in [0, 1], inf for NONE."""
        finite = np.where(values == NONE, np.inf, values.astype(np.float64))
        return (np.sqrt(finite) if self.norm == "l2" else finite) / 255

    @property
    def duplicates(self) -> int:
        """How many points have a copy in another class; the inter-class distances leave them out."""
        return int((self.inter == 0).sum())

    def inter_unit(self) -> np.ndarray:
        """The inter-class distances of images in [0, 1], without those of duplicates."""
        return self.unit(self.inter[(self.inter > 0) & (self.inter != NONE)])

    def intra_unit(self) -> np.ndarray:
        """The intra-class distances of images in [0, 1], without those of classes of one point."""
        return self.unit(self.intra[self.intra != NONE])


def summarize(found: ClassDistances, thresholds: tuple[float, ...]) -> dict[str, object]:
    """Smallest, median and largest distances of images in [0, 1], and what each threshold t means.

    `of_half`: t over half the smallest inter-class distance; `within_2t`: share of the points with a point of
    another class within 2 t.
    """
    inter, intra = found.inter_unit(), found.intra_unit()
    half = float(inter.min() / 2)
    scale = [{"t": t, "of_half": t / half, "within_2t": float((inter <= 2 * t).mean())} for t in thresholds]
    sizes = {name: {"min": float(values.min()), "median": float(np.median(values)),
                    "max": float(values.max()), "points": len(values)}
             for name, values in (("inter", inter), ("intra", intra)) if len(values)}
    return sizes | {"half_min_inter": half, "duplicates": found.duplicates, "thresholds": scale}


def class_distances(images: Tensor, labels: Tensor, norms: tuple[str, ...] = NORMS, seed: int = 0,
                    progress: Callable[[range], Iterable[int]] = iter) -> dict[str, ClassDistances]:
    """`ClassDistances` in each norm for images [n, ...] uint8 and labels [n] int64, on the images' device.

    Every pair is measured once: points are taken in a random order, each against those before it. `progress`
    wraps the iteration over blocks of points. Raises ValueError for images of another type and for fewer than
    two classes.
    """
    if images.dtype != torch.uint8 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images of {images.dtype} and {len(labels)} labels: uint8 images and "
                         "a label for each are needed")
    if len(torch.unique(labels)) < 2:
        raise ValueError("all points have one class: there is no inter-class distance")
    order = np.random.default_rng(seed).permutation(len(labels))
    flat = images.flatten(1)[torch.from_numpy(order).to(images.device)]
    y = labels.cpu().numpy()[order]
    nearest = {norm: _Nearest(len(y)) for norm in norms}
    block_of = _pairs(flat, bytewise=flat.device.type == "cpu")
    rows = max(1, min(len(y), 2**24 // len(y)))
    for first in progress(range(0, len(y), rows)):
        for norm, found in nearest.items():
            found.update(block_of(norm, first, min(first + rows, len(y))), y, first)
    return {norm: found.result(norm, order) for norm, found in nearest.items()}


class _Nearest:
    """Running minima over pairs, in the random order."""

    def __init__(self, n: int):
        self.inter, self.intra, self.prefix = (np.full(n, NONE) for _ in range(3))

    def update(self, block: np.ndarray, y: np.ndarray, first: int) -> None:
        """Take the distances [b, first + b] of b points from `first` on to all up to the last of them."""
        last = first + len(block)
        earlier = np.arange(last) < np.arange(first, last)[:, None]
        alike = y[first:last, None] == y[:last]
        inter = np.where(~alike & earlier, block, NONE)
        for target, masked in ((self.inter, inter), (self.intra, np.where(alike & earlier, block, NONE))):
            target[first:last] = np.minimum(target[first:last], masked.min(axis=1))
            target[:last] = np.minimum(target[:last], masked.min(axis=0))
        self.prefix[first:last] = np.where(inter > 0, inter, NONE).min(axis=1)

    def result(self, norm: str, order: np.ndarray) -> ClassDistances:
        """The minima in the order of the data set."""
        back = np.argsort(order)
        return ClassDistances(norm, self.inter[back], self.intra[back], np.minimum.accumulate(self.prefix))


def _pairs(flat: Tensor, bytewise: bool) -> Callable[[str, int, int], np.ndarray]:
    """A function (norm, first, last) -> distances [last - first, last] of the rows of flat [n, D].

    All sums are exact in float64. l_inf and l_1 are `torch.cdist`, which is fast on an accelerator, or, which
    is fast on a CPU, `bytewise`: each row to those before it alone, 0 in place of the others.
    """
    wide = flat.double()
    squares = (wide**2).sum(dim=1)

    def block_of(norm: str, first: int, last: int) -> np.ndarray:
        """The distances of the points from `first` up to `last` from all before `last`."""
        if norm == "l2":
            block = squares[first:last, None] + squares[:last] - 2 * (wide[first:last] @ wide[:last].T)
        elif bytewise:
            return _bytewise(flat.numpy(), norm, first, last)
        else:
            block = torch.cdist(wide[first:last], wide[:last], p=torch.inf if norm == "linf" else 1.0)
        return block.round().long().cpu().numpy()

    return block_of


def _bytewise(flat: np.ndarray, norm: str, first: int, last: int) -> np.ndarray:
    """|a - b| as max - min of 8-bit integers, as many rows at a time as the cache holds."""
    found = np.zeros((last - first, last), np.int64)
    height = max(1, BLOCK_BYTES // flat.shape[1])
    for row in range(first, last):
        for start in range(0, row, height):
            part = flat[start:min(start + height, row)]
            apart = np.maximum(part, flat[row]) - np.minimum(part, flat[row])
            sizes = apart.max(axis=1) if norm == "linf" else apart.sum(axis=1, dtype=np.uint32)
            found[row - first, start:start + len(part)] = sizes
    return found
