"""Convolution, normalisation, addition and ReLU as one step where parameters are frozen: most of an attack.

    y = relu( norm(conv(x)) + add )

In float64 this is just that sequence of modules. With frozen parameters, the first two on a GPU as well, all
on a CPU,
  - BatchNorm in eval mode, an affine map per channel, is folded into the convolution: W' = W s and
    b' = (b - mean) s + beta with s = gamma / sqrt(var + eps), computed in float32 and rounded once (Jacob et
    al., CVPR 2018, Eq. 14);
  - the weights are folded and cast once for each attack, not in every pass;
  - addition and ReLU happen while the convolution writes its result;
  - the input gradient of a convolution of few input channels, for which the library leaves most of its vector
    units idle, is a convolution of the flipped kernel at the places of a tile at once, its stride the tile:
    its channels become the tile's pixels.
Without a norm and with more channels it is bit for bit what the modules give; else the same function up to
rounding.
"""
import operator
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.frozen import current

FEW_CHANNELS = 8  # at most so many channels of the input, for a tile to be worth it
ENABLED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
BF16 = ENABLED and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # on this CPU

_as_modules = False


@contextmanager
def as_modules(so: bool = True) -> Iterator[None]:
    """Every step is the sequence of its modules meanwhile, bit for bit."""
    global _as_modules
    before, _as_modules = _as_modules, so
    try:
        yield
    finally:
        _as_modules = before


def conv_norm_relu(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, add: Tensor | None = None,
                   relu: bool = True, plus: Callable = operator.add,
                   folded: "MutableMapping[nn.Module, Folded] | None" = None) -> Tensor:
    """relu(norm(conv(x)) + add) for x [B, C, H, W].

    Differentiable in x and `add`, and in the parameters where they are trainable. plus: the addition where
    the summands have not one type and shape. folded: holds the weights during an attack
    (`attacks.frozen.current`); without one, and between attacks, they are folded in every pass, for a write
    to `.data` leaves no sign that weights have changed.
    """
    kind = x.device.type
    double = x.dtype == torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and not double else x.dtype
    here, elsewhere = ENABLED and kind == "cpu", _is_elsewhere(kind)
    if elsewhere and norm is not None and norm.training:  # that stays, but the weights' cast can be kept
        out = norm(conv_norm_relu(x, conv, relu=False, folded=folded))
        return _add_relu(out, add, relu, plus)
    regular = not _as_modules and x.ndim == 4 and _regular(conv)
    gains = elsewhere and (norm is not None or dtype != conv.weight.dtype)
    if regular and (here or gains) and _fusible(conv, norm, dtype):
        frozen = _frozen(conv, norm, dtype, {} if folded is None else folded)
        if here:
            fits = add is not None and _fits(add, shape := _shape(x, conv), dtype)
            fits = fits and shape[2:] != (1, 1)  # torch 2.6 refuses an addition to one pixel
            last = relu and (fits or add is None)
            out = _FusedConvolution.apply(x.to(dtype), add if fits else None, frozen, last)
            return out if fits or add is None else _add_relu(out, add, relu, plus)
        out = F.conv2d(x.to(dtype), frozen.weight, frozen.bias, conv.stride, conv.padding)
    else:
        out = conv(x) if norm is None else norm(conv(x))
    return _add_relu(out, add, relu, plus)


def max_pool(x: Tensor) -> Tensor:
    """F.max_pool2d(x, 2), [..., H, W] -> [..., H // 2, W // 2]: the same numbers.

    Where no gradient wants the places of the largest pixels, a CPU takes two maxima instead. torch looks for
    the places all the same, and is up to twenty times as slow.
    """
    wanted = x.requires_grad and torch.is_grad_enabled()
    if wanted or x.device.type != "cpu" or min(x.shape[-2:]) < 2:  # which torch refuses
        return F.max_pool2d(x, 2)
    height, width = (side // 2 * 2 for side in x.shape[-2:])
    x = torch.maximum(x[..., :height:2, :width], x[..., 1:height:2, :width])
    return torch.maximum(x[..., ::2], x[..., 1::2])


def _add_relu(out: Tensor, add: Tensor | None, relu: bool, plus: Callable) -> Tensor:
    """relu(out + add), in the memory of `out` where that holds it."""
    if add is not None:
        out = out.add_(add) if _fits(add, out.shape, out.dtype) else plus(out, add)
    return F.relu(out, inplace=True) if relu else out


def _fits(add: Tensor, shape: torch.Size, dtype: torch.dtype) -> bool:
    return isinstance(add, Tensor) and add.dtype == dtype and add.shape == shape


def _shape(x: Tensor, conv: nn.Conv2d) -> torch.Size:
    """The shape of conv(x)."""
    sides = ((side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride
             in zip(x.shape[2:], conv.padding, conv.kernel_size, conv.stride))
    return torch.Size((len(x), conv.out_channels, *sides))


def _is_elsewhere(kind: str) -> bool:
    return kind not in ("cpu", "meta")


def is_plain(tensor: Tensor) -> bool:
    """Whether this is torch's own tensor: an operation on a subclass may be anything."""
    return type(tensor) in (Tensor, nn.Parameter)


def _regular(conv: nn.Conv2d) -> bool:
    """A convolution of all channels with all channels, with zeros at the border."""
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return plain and type(conv.padding) is tuple and is_plain(conv.weight)


def _fusible(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> bool:
    narrow = dtype == torch.bfloat16 and (BF16 or conv.weight.device.type != "cpu")
    if not (dtype == torch.float32 or narrow) or conv.weight.dtype != torch.float32:
        return False
    if norm is not None and (norm.training or norm.running_var is None or norm.weight is None):
        return False
    return not any(tensor is not None and tensor.requires_grad for tensor in _sources(conv, norm))


def _sources(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> list[Tensor | None]:
    """The tensors that the folded weights are made of."""
    of_norm = () if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [conv.weight, conv.bias, *of_norm]


@dataclass
class Folded:
    """A convolution with its norm folded in, in the pass's type; weight [K, C, h, w], bias [K] or None."""

    state: tuple
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    tiled: Tensor | None  # makes the input gradient of few channels (`_tiled`); None: the library's is used


def _frozen(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype,
            folded: MutableMapping[nn.Module, Folded]) -> Folded:
    """`conv` and `norm` in `dtype`, kept in `folded` during an attack until one of their tensors changes."""
    attack = current()
    versions = ((tensor.data_ptr(), tensor._version) for tensor in _sources(conv, norm) if tensor is not None)
    state = (attack, dtype, *versions)
    found = folded.get(conv)
    if attack is None or found is None or found.state != state:
        folded[conv] = found = _fold(conv, norm, dtype, state)
    return found


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype, state: tuple) -> Folded:
    with torch.no_grad(), torch.autocast(conv.weight.device.type, enabled=False):
        weight, bias = conv.weight, conv.bias
        if norm is not None:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            weight = weight * scale[:, None, None, None]
            bias = norm.bias + ((0.0 if bias is None else bias) - norm.running_mean) * scale
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        bias = None if bias is None else bias.to(dtype)
        return Folded(state, weight, bias, conv.stride, conv.padding, _tiled(conv, weight))


class _FusedConvolution(torch.autograd.Function):
    """relu(conv(x) + add) with gradients for x and `add` only."""

    @staticmethod
    def forward(ctx, x: Tensor, add: Tensor | None, conv: Folded, relu: bool) -> Tensor:
        """x [B, C, H, W], add [B, K, H', W'] or None -> [B, K, H', W']."""
        shape = (conv.padding, conv.stride, (1, 1), 1)
        if add is None:
            last = "relu" if relu else "none"
            out = torch.ops.mkldnn._convolution_pointwise(x, conv.weight, conv.bias, *shape, last, [], "")
        else:
            last = "relu" if relu else None
            binary = torch.ops.mkldnn._convolution_pointwise.binary
            out = binary(x, add, conv.weight, conv.bias, *shape, "add", None, last, [], None)
        ctx.save_for_backward(x, out if relu else None)
        ctx.conv, ctx.added = conv, add is not None
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients with respect to x and `add`, each where it is wanted."""
        x, out = ctx.saved_tensors
        conv = ctx.conv
        if out is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        gradient_x = None
        if ctx.needs_input_grad[0]:
            gradient_x = _input_gradient(gradient, x, conv)
        return gradient_x, gradient if ctx.added else None, None, None


def _tile(channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of the input whose gradients are channels of one convolution: the fastest measured.

    The more channels, up to a vector of 16 numbers, and the fewer taps of the larger kernel, the better; in
    bfloat16 the rows of the map are to stay long as well.
    """
    if dtype == torch.float32:
        return (4, 4) if channels == 1 else (2, 2)
    return (1, 4) if channels <= 4 else (1, 2)


def _tiled(conv: nn.Conv2d, weight: Tensor) -> Tensor | None:
    """The flipped kernel [C, K, h, w] at each place of a tile of r x c: [r c C, K, h + r - 1, w + c - 1]."""
    inside = all(0 <= pad < kernel for pad, kernel in zip(conv.padding, conv.kernel_size))
    if conv.in_channels > FEW_CHANNELS or conv.stride != (1, 1) or not inside:
        return None
    rows, columns = _tile(conv.in_channels, weight.dtype)
    flipped = weight.flip(2, 3).transpose(0, 1)  # [C, K, h, w]
    places = [F.pad(flipped, (column, columns - 1 - column, row, rows - 1 - row))
              for row in range(rows) for column in range(columns)]
    return torch.cat(places).contiguous(memory_format=torch.channels_last)


def _input_gradient(gradient: Tensor, x: Tensor, conv: Folded) -> Tensor:
    """The gradient [B, C, H, W] with respect to the input x from that with respect to the output."""
    batch, channels, height, width = x.shape
    rows, columns = _tile(channels, x.dtype)
    if conv.tiled is None or height % rows or width % columns or width == columns:
        shape = (conv.stride, conv.padding, (1, 1), False, (0, 0), 1)
        backward = torch.ops.aten.convolution_backward
        return backward(gradient, x, conv.weight, None, *shape, (True, False, False))[0]
    padding = [size - 1 - pad for size, pad in zip(conv.weight.shape[2:], conv.padding)]
    tiles = F.conv2d(gradient, conv.tiled, None, (rows, columns), padding)  # [B, r c C, H / r, W / c]
    tiles = tiles.permute(0, 2, 3, 1)
    tiles = tiles.reshape(batch, height // rows, width // columns, rows, columns, channels)
    return tiles.transpose(2, 3).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
