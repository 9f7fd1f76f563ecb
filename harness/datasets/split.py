"""Images and labels in memory."""
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ORDER_SEED = 0  # the order is the same for every model, attack and command


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

    def to(self, device: torch.device, non_blocking: bool = False) -> "Split":
        """The same split on `device`; non_blocking: of a pinned one, without a wait."""
        return Split(*(part.to(device, non_blocking=non_blocking) for part in self._parts()))

    def pinned(self) -> "Split":
        """A copy in memory that an accelerator reads by itself."""
        return Split(*(part.pin_memory() for part in self._parts()))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images, self.labels, self.index

    def fingerprint(self) -> str:
        """What changes when an image, its label or their order does."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for part in (self.images, self.labels):
            digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()

    def in_fixed_order(self) -> "Split":
        """The same images in one random order, always the same: a part of it is a sample of all of it."""
        return self[torch.randperm(len(self), generator=torch.Generator().manual_seed(ORDER_SEED))]


def split_of(images: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> Split:
    """Images [N, H, W] or [N, H, W, C] as a Split."""
    images, labels = torch.as_tensor(images), torch.as_tensor(labels, dtype=torch.int64)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), labels, torch.arange(len(labels)))
