"""MATLAB 5 files of the robust-network collection of Croce & Hein (AISTATS 2019, ICLR 2020): two small ReLU networks, and image sets.

cnn   conv 4x4 stride 2 (16), conv 4x4 stride 2 (32), linear (100), linear (K): TensorFlow's layouts, kernels HWIO, padding "same"
      (one pixel a side at these sizes), features flattened in the order height, width, channel
fc1   linear (hidden), linear (K), on images flattened in that order too

Inputs are in [0, 1] without normalisation. Only arrays of numbers are read; nothing in a file is executed.
"""
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from harness.datasets.split import Split
from harness.errors import UserError

CNN_KEYS = tuple(f"{kind}_{layer}" for layer in ("conv1", "conv2", "fc1", "fc2") for kind in ("weights", "biases"))
FC1_KEYS = ("U", "W", "bU", "bW")
KINDS = {"cnn": CNN_KEYS, "fc1": FC1_KEYS}


def read_arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of `names` that a MATLAB 5 file holds, as arrays of numbers.  Raises UserError in one line for any other file."""
    path = Path(path)
    try:
        from scipy import io
    except ImportError:
        raise UserError(f"{path} needs scipy to be read: pip install -r requirements.txt") from None
    try:
        with path.open("rb") as file:
            if not (head := file.read(128)).startswith(b"MATLAB 5.0 MAT-file"):
                said = "MATLAB 7.3 (HDF5): save it with -v6 or -v7" if head.startswith(b"MATLAB 7.3") else "no MATLAB 5 file, or cut off"
                raise UserError(f"{path} is {said}")
        found = io.loadmat(str(path), appendmat=False, variable_names=names)
        keys = [name for name, _, _ in io.whosmat(str(path), appendmat=False)]
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or 'cut off'})") from error
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in scipy, zlib and struct in their own ways
        raise UserError(f"{path} is damaged or cut off: copy it again") from error
    arrays = {name: found[name] for name in names if name in found}
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            raise UserError(f"{path}: {name} is no array of finite numbers")
    return arrays if arrays else _foreign(path, keys)


def _foreign(path: Path, keys: list[str]) -> dict:
    raise UserError(f"{path} has the keys {', '.join(keys[:8]) or '(none)'}: a network has weights_conv1 ... biases_fc2, or U, W, bU, bW; "
                    "a data set has images and labels")


def load_network(path: str | Path) -> tuple[nn.Sequential, str]:
    """The network in a file, in eval mode on the CPU, and its kind: "cnn" or "fc1", which the file's keys tell.

    Raises UserError in one line for missing keys and for shapes that do not fit one another.
    """
    arrays = read_arrays(path, CNN_KEYS + FC1_KEYS)
    kind = "fc1" if "U" in arrays or "W" in arrays else "cnn"
    if missing := [name for name in KINDS[kind] if name not in arrays]:
        raise UserError(f"{path} is a network of the kind {kind}, but lacks {', '.join(missing)}")
    image_shape = _image_shape(arrays, kind)
    for name, shape in {"cnn": _cnn_shapes, "fc1": _fc1_shapes}[kind](arrays, image_shape).items():
        if arrays[name].shape != shape:
            raise UserError(f"{path}: {name} has the shape {arrays[name].shape} where this kind of network ({kind}) has {shape}")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(arrays[name], dtype=np.float32)) for name in KINDS[kind]}
    return {"cnn": _cnn, "fc1": _fc1}[kind](tensors, image_shape).eval(), kind


def _image_shape(arrays: dict[str, np.ndarray], kind: str) -> tuple[int, int, int]:
    """(C, H, W) of the square images that the weights are for: C from the first kernel, for fc1 3 where that makes a square, else 1."""
    if kind == "cnn":
        kernel = arrays["weights_conv1"].shape
        side = 4 * math.isqrt(arrays["weights_fc1"].shape[0] // 32)
        return (kernel[2] if len(kernel) == 4 else 1), max(side, 4), max(side, 4)
    pixels = arrays["U"].shape[0]
    channels = 3 if 3 * math.isqrt(pixels // 3) ** 2 == pixels else 1
    return channels, (side := math.isqrt(pixels // channels)), side


def _cnn_shapes(arrays: dict[str, np.ndarray], image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    channels, height, width = image_shape
    classes = arrays["weights_fc2"].shape[-1]
    return {"weights_conv1": (4, 4, channels, 16), "biases_conv1": (1, 16), "weights_conv2": (4, 4, 16, 32), "biases_conv2": (1, 32),
            "weights_fc1": (height * width * 2, 100), "biases_fc1": (1, 100), "weights_fc2": (100, classes), "biases_fc2": (1, classes)}


def _fc1_shapes(arrays: dict[str, np.ndarray], image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    hidden, classes = arrays["U"].shape[-1], arrays["W"].shape[-1]
    return {"U": (math.prod(image_shape), hidden), "bU": (1, hidden), "W": (hidden, classes), "bW": (1, classes)}


def _channels_first(rows: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A weight [H * W * C, out] for features in the order H, W, C as one [out, C * H * W] for them in torch's order C, H, W."""
    channels, height, width = shape
    return rows.view(height, width, channels, -1).permute(3, 2, 0, 1).reshape(rows.shape[1], -1)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    return _filled(nn.Linear(weight.shape[1], weight.shape[0]), weight, bias)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    layer.load_state_dict({"weight": weight.contiguous(), "bias": bias.flatten()})
    return layer


def _cnn(t: dict[str, Tensor], image_shape: tuple[int, int, int]) -> nn.Sequential:
    channels, height, width = image_shape
    conv1, conv2 = (_filled(nn.Conv2d(count, out, 4, stride=2, padding=1), t[f"weights_{name}"].permute(3, 2, 0, 1), t[f"biases_{name}"])
                    for name, count, out in (("conv1", channels, 16), ("conv2", 16, 32)))
    fc1 = _linear(_channels_first(t["weights_fc1"], (32, height // 4, width // 4)), t["biases_fc1"])
    return nn.Sequential(conv1, nn.ReLU(), conv2, nn.ReLU(), nn.Flatten(), fc1, nn.ReLU(), _linear(t["weights_fc2"].T, t["biases_fc2"]))


def _fc1(t: dict[str, Tensor], image_shape: tuple[int, int, int]) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), _linear(_channels_first(t["U"], image_shape), t["bU"]), nn.ReLU(), _linear(t["W"].T, t["bW"]))


def read_images(path: str | Path) -> Split:
    """The image set in a file: `images` uint8 (N, H, W, C), `labels` integers from 0.  Raises UserError in one line for another form."""
    arrays = read_arrays(path, ("images", "labels"))
    images, labels = (arrays.get(name) for name in ("images", "labels"))
    return image_split(path, images, labels.ravel() if labels is not None else None)


def image_split(path: str | Path, images: np.ndarray | None, labels: np.ndarray | None) -> Split:
    """`images` uint8 [N, H, W] or [N, H, W, C] and `labels` [N] from the file `path` as a Split.  Raises UserError for another form."""
    if images is None or labels is None:
        raise UserError(f"{path} lacks images or labels: an image set has both")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise UserError(f"{path}: images is {images.dtype} {list(images.shape)}, not uint8 [N, H, W, C]")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
        raise UserError(f"{path}: labels is {labels.dtype} {list(labels.shape)}, not integers from 0 for {len(images):,} images")
    pixels = torch.from_numpy(images)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return Split(pixels.contiguous(), torch.from_numpy(labels.astype(np.int64)), torch.arange(len(labels)))
