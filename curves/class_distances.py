"""How far apart the classes of a data set are, in exact integers on 8-bit images.

    inter(x_i) = min over j with y_j != y_i of ||x_i - x_j||_p,    intra(x_i) = min over j != i with y_j = y_i

A classifier that is right on all of the data can be robust everywhere at size t only if t is below half the smallest inter-class distance.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

NORMS = ("linf", "l2", "l1")
BLOCK_BYTES = 150_000  # of images at a time: three such blocks stay in a core's second-level cache
NONE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class ClassDistances:
    """Per point the smallest distances in one norm, in grey levels of 0 to 255 (l_2: squared), [n] int64; NONE where there is none.

    prefix: [n], entry j is the smallest inter-class distance among the first j + 1 points of a random order, NONE as long as there is none.
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
    """Smallest, median and largest distances of images in [0, 1], and what each threshold t means on their scale.

    `of_half`: t over half the smallest inter-class distance; `within_2t`: share of the points with a point of another class within 2 t.
    """
    inter, intra = found.inter_unit(), found.intra_unit()
    scale = [{"t": t, "of_half": t / (inter.min() / 2), "within_2t": float((inter <= 2 * t).mean())} for t in thresholds]
    sizes = {name: {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max()), "points": len(values)}
             for name, values in (("inter", inter), ("intra", intra)) if len(values)}
    return sizes | {"half_min_inter": float(inter.min() / 2), "duplicates": found.duplicates, "thresholds": scale}


def class_distances(images: torch.Tensor, labels: torch.Tensor, norms: tuple[str, ...] = NORMS, seed: int = 0,
                    progress: Callable[[Iterator], Iterator] = iter) -> dict[str, ClassDistances]:
    """`ClassDistances` in each of `norms` for images [n, ...] uint8 and labels [n] int64, on the device of the images.

    Every pair is measured once: points are taken in a random order, each against those before it. `progress` wraps the iteration
    over blocks of points. Raises ValueError for images of another type and for fewer than two classes.
    """
    if images.dtype != torch.uint8 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images of {images.dtype} and {len(labels)} labels: uint8 images and a label for each are needed")
    if len(torch.unique(labels)) < 2:
        raise ValueError("all points have one class: there is no inter-class distance")
    order = np.random.default_rng(seed).permutation(len(labels))
    flat, y = images.flatten(1)[torch.from_numpy(order).to(images.device)], labels.cpu().numpy()[order]
    nearest = {norm: _Nearest(len(y)) for norm in norms}
    measure = _on_cpu(flat.numpy(), norms) if flat.device.type == "cpu" else _on_device(flat, norms)
    rows = max(1, min(len(y), 2**24 // len(y)))
    for first in progress(range(0, len(y), rows)):
        last = min(first + rows, len(y))
        for norm, block in measure(first, last).items():  # [last - first, last] int64
            nearest[norm].update(block, y, first)
    return {norm: found.result(norm, order) for norm, found in nearest.items()}


class _Nearest:
    """Running minima over pairs, in the random order."""

    def __init__(self, n: int):
        self.inter, self.intra, self.prefix = (np.full(n, NONE) for _ in range(3))

    def update(self, block: np.ndarray, y: np.ndarray, first: int) -> None:
        """Take the distances of the points from `first` on to all before them and in their block: [b, first + b]."""
        last = first + len(block)
        earlier = np.arange(last) < np.arange(first, last)[:, None]
        alike = y[first:last, None] == y[:last]
        for target, chosen in ((self.inter, ~alike & earlier), (self.intra, alike & earlier)):
            masked = np.where(chosen, block, NONE)
            closest = masked.min(axis=1, initial=NONE)
            if target is self.inter:
                self.prefix[first:last] = np.where(masked > 0, masked, NONE).min(axis=1, initial=NONE)
            target[first:last] = np.minimum(target[first:last], closest)
            target[:last] = np.minimum(target[:last], masked.min(axis=0, initial=NONE))

    def result(self, norm: str, order: np.ndarray) -> ClassDistances:
        """The minima in the order of the data set; a duplicate pair does not count towards the smallest distance of a subset."""
        back = np.argsort(order)
        return ClassDistances(norm, self.inter[back], self.intra[back], np.minimum.accumulate(self.prefix))


def _on_cpu(flat: np.ndarray, norms: tuple[str, ...]) -> Callable[[int, int], dict[str, np.ndarray]]:
    """A function (first, last) -> distances of the rows first ... last - 1 of flat [n, D] uint8 to rows 0 ... last - 1.

    l_inf and l_1 share |a - b| as max - min of 8-bit integers, a block of rows in the cache at a time; l_2 is a product in float64,
    in which all the sums are exact.
    """
    height = max(1, BLOCK_BYTES // flat.shape[1])
    high, low = np.empty((height, flat.shape[1]), np.uint8), np.empty((height, flat.shape[1]), np.uint8)
    wide = flat.astype(np.float64) if "l2" in norms else None
    squares = (wide**2).sum(axis=1) if "l2" in norms else None
    bytewise = [norm for norm in norms if norm != "l2"]

    def measure(first: int, last: int) -> dict[str, np.ndarray]:
        found = {norm: np.zeros((last - first, last), np.int64) for norm in bytewise}
        for row in range(first, last) if bytewise else ():
            for start in range(0, row, height):
                part = flat[start:min(start + height, row)]
                top, bottom = high[:len(part)], low[:len(part)]
                np.maximum(part, flat[row], out=top)
                np.minimum(part, flat[row], out=bottom)
                np.subtract(top, bottom, out=top)
                for norm in bytewise:
                    found[norm][row - first, start:start + len(part)] = top.max(1) if norm == "linf" else top.sum(1, dtype=np.uint32)
        if "l2" in norms:
            found["l2"] = (squares[first:last, None] + squares[:last] - 2 * (wide[first:last] @ wide[:last].T)).astype(np.int64)
        return found

    return measure


def _on_device(flat: torch.Tensor, norms: tuple[str, ...]) -> Callable[[int, int], dict[str, np.ndarray]]:
    """The same on an accelerator, where `torch.cdist` is fast: l_inf and l_1 in float64, exact like the product for l_2."""
    wide = flat.double()
    squares = (wide**2).sum(dim=1)

    def measure(first: int, last: int) -> dict[str, np.ndarray]:
        found = {}
        for norm in norms:
            if norm == "l2":
                block = squares[first:last, None] + squares[:last] - 2 * (wide[first:last] @ wide[:last].T)
            else:
                block = torch.cdist(wide[first:last], wide[:last], p=torch.inf if norm == "linf" else 1.0)
            found[norm] = block.round().long().cpu().numpy()
        return found

    return measure
