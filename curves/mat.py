"""MATLAB 5 files of the robust-network collection of Croce & Hein (AISTATS 2019, ICLR 2020): two small ReLU
networks, and image sets.

cnn   conv 4x4 stride 2 (16), conv 4x4 stride 2 (32), linear (100), linear (K): TensorFlow's layouts, kernels
      HWIO, padding "same" (one pixel a side at these sizes), features flattened in the order height, width,
      channel
fc1   linear (hidden), linear (K), on images flattened in that order too

Inputs are in [0, 1] without normalisation. Only arrays of numbers are read; nothing in a file is executed.
"""
import math
from pathlib import Path

import numpy as np
import torch
from scipy import io
from torch import Tensor, nn

from harness.datasets.arrays import image_split
from harness.datasets.split import Split
from harness.errors import UserError

CNN_KEYS = ("weights_conv1", "biases_conv1", "weights_conv2", "biases_conv2",
            "weights_fc1", "biases_fc1", "weights_fc2", "biases_fc2")
FC1_KEYS = ("U", "W", "bU", "bW")
Shape = tuple[int, int, int]  # C, H, W


def read_arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of `names` that a MATLAB 5 file holds, numbers alone.  Raises UserError for any other file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(128)
        if not head.startswith(b"MATLAB 5.0 MAT-file"):
            later = head.startswith(b"MATLAB 7.3")
            raise UserError(f"{path} is MATLAB 7.3 (HDF5): save it with -v6 or -v7" if later else
                            f"{path} is no MATLAB 5 file, or cut off")
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
    if not arrays:
        raise UserError(f"{path} has the keys {', '.join(keys[:8]) or '(none)'}: a network has weights_conv1 "
                        "... biases_fc2, or U, W, bU, bW; a data set has images and labels")
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            raise UserError(f"{path}: {name} is no array of finite numbers")
    return arrays


def load_network(path: str | Path) -> tuple[nn.Sequential, str]:
    """The network in a file, in eval mode on the CPU, and its kind: "cnn" or "fc1", which its keys tell.

    Raises UserError in one line for missing keys and for shapes that do not fit one another.
    """
    arrays = read_arrays(path, CNN_KEYS + FC1_KEYS)
    kind = "fc1" if "U" in arrays or "W" in arrays else "cnn"
    keys = FC1_KEYS if kind == "fc1" else CNN_KEYS
    if missing := [name for name in keys if name not in arrays]:
        raise UserError(f"{path} is a network of the kind {kind}, but lacks {', '.join(missing)}")
    image_shape, shapes = (_fc1_shapes if kind == "fc1" else _cnn_shapes)(arrays)
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise UserError(f"{path}: {name} has the shape {arrays[name].shape} where this kind of network "
                            f"({kind}) has {shape}")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(arrays[name], dtype=np.float32)) for name in keys}
    return (_fc1 if kind == "fc1" else _cnn)(tensors, image_shape).eval(), kind


def _cnn_shapes(arrays: dict[str, np.ndarray]) -> tuple[Shape, dict[str, tuple[int, ...]]]:
    """The square images that the weights are for, and the shape that each array must have."""
    kernel = arrays["weights_conv1"].shape
    channels = kernel[2] if len(kernel) == 4 else 1
    side = max(4 * math.isqrt(arrays["weights_fc1"].shape[0] // 32), 4)
    weights = {"conv1": (4, 4, channels, 16), "conv2": (4, 4, 16, 32), "fc1": (2 * side**2, 100),
               "fc2": (100, arrays["weights_fc2"].shape[-1])}
    return (channels, side, side), {f"{kind}_{layer}": shape if kind == "weights" else (1, shape[-1])
                                    for layer, shape in weights.items() for kind in ("weights", "biases")}


def _fc1_shapes(arrays: dict[str, np.ndarray]) -> tuple[Shape, dict[str, tuple[int, ...]]]:
    """The same; with three channels where that makes the images square, else with one."""
    pixels, hidden, classes = arrays["U"].shape[0], arrays["U"].shape[-1], arrays["W"].shape[-1]
    channels = 3 if 3 * math.isqrt(pixels // 3) ** 2 == pixels else 1
    side = math.isqrt(pixels // channels)
    return (channels, side, side), {"U": (channels * side**2, hidden), "bU": (1, hidden),
                                    "W": (hidden, classes), "bW": (1, classes)}


def _cnn(t: dict[str, Tensor], image_shape: Shape) -> nn.Sequential:
    channels, height, width = image_shape
    conv1, conv2 = (_filled(nn.Conv2d(count, out, 4, stride=2, padding=1),
                            t[f"weights_{name}"].permute(3, 2, 0, 1), t[f"biases_{name}"])
                    for name, count, out in (("conv1", channels, 16), ("conv2", 16, 32)))
    fc1 = _linear(_channels_first(t["weights_fc1"], (32, height // 4, width // 4)), t["biases_fc1"])
    fc2 = _linear(t["weights_fc2"].T, t["biases_fc2"])
    return nn.Sequential(conv1, nn.ReLU(), conv2, nn.ReLU(), nn.Flatten(), fc1, nn.ReLU(), fc2)


def _fc1(t: dict[str, Tensor], image_shape: Shape) -> nn.Sequential:
    first = _linear(_channels_first(t["U"], image_shape), t["bU"])
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), _linear(t["W"].T, t["bW"]))


def _channels_first(rows: Tensor, shape: Shape) -> Tensor:
    """[H * W * C, out] for features in the order H, W, C as [out, C * H * W] for torch's order C, H, W."""
    channels, height, width = shape
    return rows.view(height, width, channels, -1).permute(3, 2, 0, 1).reshape(rows.shape[1], -1)


def _linear(weight: Tensor, bias: Tensor) -> nn.Module:
    return _filled(nn.Linear(weight.shape[1], weight.shape[0]), weight, bias)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    layer.load_state_dict({"weight": weight.contiguous(), "bias": bias.flatten()})
    return layer


def read_images(path: str | Path) -> Split:
    """The image set in a file, as `image_split` takes it; labels of any shape."""
    found = read_arrays(path, ("images", "labels"))
    labels = found["labels"].ravel() if "labels" in found else None
    return image_split(path, found.get("images"), labels)
