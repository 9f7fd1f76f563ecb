"""Image files as a viewer shows them, in 8 bits a pixel; what has no single such picture is refused."""
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from harness.device import free_memory
from harness.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N", "I")
PLAIN = ("1", "L", "P", "RGB")
COPIES = 2  # of the decoded images, in memory at once


def suffixes() -> set[str]:
    """The endings of the file names that Pillow reads, such as ".png"."""
    from PIL import Image

    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def as_seen(image: "Image") -> tuple["Image", bool]:
    """The picture in mode L or RGB, turned as its EXIF entry says, and whether it was laid on white.

    Sixteen bits of grey are rounded to eight; what is transparent lies on white. Raises ValueError for an
    animation, and for colours that have no one look on a screen (CMYK, LAB, HSV, floating point).
    """
    from PIL import Image, ImageOps

    kind = image.format
    # a telephone's photograph (MPO) holds a preview too
    if kind != "MPO" and (count := getattr(image, "n_frames", 1)) > 1:
        raise ValueError(f"it holds {count} pictures")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        levels = np.asarray(image).astype(np.float64) / 257  # 65535 is white
        if levels.min() < 0 or levels.max() > 255:
            raise ValueError("its values are not those of 16 bits")
        return Image.fromarray(np.rint(levels).astype(np.uint8)), False
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        picture = image.convert("RGBA")
        seen = picture.getextrema()[3][0] < 255
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("L" if image.mode in GREY else "RGB"), seen
    if image.mode not in PLAIN:
        raise ValueError(f"its colours are {image.mode}: save it as RGB")
    return image.convert("L" if image.mode in GREY else "RGB"), False


def decode(files: list[Path | zipfile.Path], title: str) -> tuple[np.ndarray, bool]:
    """The images [N, H, W, 3], and whether every file is grey.

    Raises UserError, naming the file, for one that has no picture, for one of another size than the first,
    and before any is decoded where they would not fit into memory.
    """
    from PIL import Image, UnidentifiedImageError

    images = np.empty((0, 0, 0, 3), np.uint8)
    grey, on_white = True, 0
    for row, file in enumerate(tqdm(files, desc=title, unit="image", disable=None)):
        try:
            with file.open("rb") as stream, Image.open(stream) as image:
                if not row:
                    _check_memory(len(files), image.size, title)
                picture, seen_through = as_seen(image)
        except UserError:
            raise
        except Exception as error:  # PIL has no error of its own for a damaged file
            known = not isinstance(error, UnidentifiedImageError)
            reason = str(error).split("\n")[0].rstrip(":") if known else "of no kind that Pillow knows"
            raise UserError(f"{file} cannot be read as an image ({reason}): mend or remove it") from error
        grey, on_white = grey and picture.mode == "L", on_white + seen_through
        pixels = np.asarray(picture.convert("RGB"))
        if not row:
            images = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            (height, width), (first_height, first_width) = pixels.shape[:2], images.shape[1:3]
            raise UserError(f"{file} has {width}x{height} pixels, {files[0]} {first_width}x{first_height}: "
                            "bring all images to one size")
        images[row] = pixels
    if on_white:
        print(f"note: {title}: {on_white:,} of {len(files):,} images are transparent in part, "
              "and lie on white")
    return images, grey


def _check_memory(count: int, size: tuple[int, int], title: str) -> None:
    needed, free = COPIES * count * size[0] * size[1] * 3, free_memory(torch.device("cpu"))
    if needed > free:
        raise UserError(f"{title}: {count:,} images of {size[0]}x{size[1]} take {needed / 1e9:,.1f} GB of "
                        f"memory, and {free / 1e9:,.1f} GB are free: make them smaller, or take fewer")
