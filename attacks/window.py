"""Logits of images of which only a small window has changed: the first layers are passed again only where they see it.

A window of s pixels reaches at most (s + reach - 2) // stride + 1 places along a side of the map that a network's `stem` makes
(`models.stem`). These are computed anew from the pixels that they see, and put into the map of the image as it was. The logits are those
of a whole pass up to rounding. Nine tenths of a Square attack's windows are at most 6 pixels wide: LeNet is done in two thirds of the time.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_SHARE = 0.5  # of a side of the map, for which a part is computed


def stem_of(model: nn.Module, x: Tensor) -> object | None:
    """The stem that a network offers, if it is the network's own on the images x [B, C, H, W]; None off the CPU, where many small steps
    cost more than a pass."""
    stem = getattr(model, "stem", None)
    if not hasattr(stem, "reach") or x.device.type != "cpu":
        return None
    logits = stem.rest(stem.layers(F.pad(x, [stem.padding] * 4)))
    return stem if torch.allclose(logits, model(x), rtol=1e-3, atol=1e-3) else None  # a subclass may pass its images another way


def window_pass(stem: object | None, x: Tensor, side: int) -> "WindowPass | None":
    """What is needed to change windows of at most `side` pixels in the images x [B, C, H, W]; None without a stem, and for a window that
    reaches half of the map."""
    if stem is None:
        return None
    places = (side + stem.reach - 2) // stem.stride + 1
    height, width = ((size + 2 * stem.padding - stem.reach) // stem.stride + 1 for size in x.shape[2:])
    if places > LARGEST_SHARE * min(height, width):
        return None
    return WindowPass(stem, stem.layers(F.pad(x, [stem.padding] * 4)).permute(0, 2, 3, 1).contiguous())


class WindowPass:
    """The maps of some images: they follow every change, and go back where it is not kept."""

    def __init__(self, stem, features: Tensor):
        self.stem, self.features = stem, features  # [B, h, w, K]

    def keep(self, rows: Tensor) -> None:
        """Go on with the images `rows` alone: numbers, or a mask [B]."""
        self.features = self.features[rows]

    def change(self, point: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
        """Logits [B, classes] of the images `point`, which differ from those so far in the square of `side` pixels at (top, left) [B]."""
        stem, (batch, height, width, channels) = self.stem, self.features.shape
        places = (side + stem.reach - 2) // stem.stride + 1
        pixels = stem.stride * (places - 1) + stem.reach
        row, column = (((start + stem.padding - stem.reach) // stem.stride + 1).clamp_(0, size - places)  # the first that sees the window
                       for start, size in ((top, height), (left, width)))
        self.places = square_places(row, column, places, width) + torch.arange(batch)[:, None] * (height * width)  # [B, places * places]
        flat = self.features.view(-1, channels)
        self.before = flat[self.places]
        seen = _crop(point, stem.stride * row - stem.padding, stem.stride * column - stem.padding, pixels)
        flat[self.places] = stem.layers(seen).permute(0, 2, 3, 1).reshape(batch, places**2, channels)
        return stem.rest(self.features.permute(0, 3, 1, 2))

    def undo(self, rows: Tensor) -> None:
        """Take the last change of the images `rows`, a mask [B], back."""
        self.features.view(-1, self.features.shape[3])[self.places[rows]] = self.before[rows]


def square_places(top: Tensor, left: Tensor, side: int, width: int) -> Tensor:
    """The numbers, row by row in a map `width` wide, of the places in the square of `side` at (top, left) [B].  [B, side * side]"""
    within = torch.arange(side, device=top.device)
    return ((top * width + left)[:, None, None] + within[:, None] * width + within).flatten(1)


def _crop(x: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """The square of `side` pixels at (top, left) [B] of each image x [B, C, H, W], zero outside it.  [B, C, side, side]"""
    (batch, channels, height, width), within = x.shape, torch.arange(side)
    rows, columns = (top[:, None] + within)[:, :, None], (left[:, None] + within)[:, None, :]
    places = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).flatten(1)
    part = x.flatten(2).gather(2, places[:, None].expand(-1, channels, -1)).view(batch, channels, side, side)
    return part * ((rows >= 0) & (rows < height) & (columns >= 0) & (columns < width))[:, None]
