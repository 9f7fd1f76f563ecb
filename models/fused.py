"""Convolution, normalisation, addition and ReLU as one step where the parameters are frozen: most of the work of an attack.

    y = relu( norm(conv(x)) + add )

In float64 this is just that sequence of modules. With frozen parameters, the first two on a GPU as well, all on a CPU,
  - BatchNorm in eval mode, an affine map per channel, is folded into the convolution: W' = W s, b' = (b - mean) s + beta with
    s = gamma / sqrt(var + eps), computed in float32 and rounded once (Jacob et al., CVPR 2018, Eq. 14);
  - the weights are folded and cast once for each value of the parameters, not in every pass;
  - addition and ReLU happen while the convolution writes its result;
  - the input gradient of a convolution of few input channels, for which the library leaves most of its vector units idle, is a
    convolution of the flipped kernel at the places of a tile at once, its stride the tile: its channels become the tile's pixels.
With trainable parameters too, a 3x3 convolution in bfloat16 on a map of 4x4 pixels or less is a matrix product of its patches, where the
library's takes three times as long, and its weight gradient six times. Without a norm, on larger maps and with more channels it is
bit for bit what the modules give; else the same function up to rounding. A convolution whose attribute `fuse` is False stays a module,
and so does every one where torch.compile traces it, which fuses by itself.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_MAP, SMALL_MAP_CHANNELS = 16, 128  # at most so many pixels a map, at least so many channels, for patches to be worth it
FEW_CHANNELS = 8  # at most so many channels of the input, for a tile to be worth it
ENABLED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
BF16 = ENABLED and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # on this CPU


def conv_norm_relu(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, add: Tensor | None = None, relu: bool = True) -> Tensor:
    """relu(norm(conv(x)) + add) for x [B, C, H, W]; differentiable in x and `add`, and in the parameters where they are trainable."""
    kind = "cpu" if x.is_meta else x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    here, small = _here(x, conv), _small(x, conv, dtype)
    if (here or _folds_elsewhere(x, conv, norm)) and _fusible(conv, norm, dtype):
        frozen = _frozen(conv, norm, dtype)
        if here and not small:
            return _FusedConvolution.apply(x.to(dtype), add if add is None else add.to(dtype), frozen, relu)
        out = (_convolve_patches(x.to(dtype), frozen.weight, frozen.bias, conv.stride) if here else
               F.conv2d(x.to(dtype), frozen.weight, frozen.bias, conv.stride, conv.padding))
    else:
        out = _convolve_patches(*(t if t is None else t.to(dtype) for t in (x, conv.weight, conv.bias)), conv.stride) if small else conv(x)
        if norm is not None:
            out = norm(out)
    if add is not None:
        out += add
    return F.relu(out, inplace=True) if relu else out


def _here(x: Tensor, conv: nn.Conv2d) -> bool:
    return ENABLED and _may_fuse(conv) and x.device.type == "cpu"


def _folds_elsewhere(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> bool:
    """Whether a norm is to be folded off the CPU: without one the convolution stays a module there."""
    return norm is not None and _may_fuse(conv) and x.device.type not in ("cpu", "meta")


def _may_fuse(conv: nn.Conv2d) -> bool:
    return getattr(conv, "fuse", True) and not torch.compiler.is_compiling()


def _fusible(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> bool:
    parameters = [*conv.parameters(), *(norm.parameters() if norm is not None else ())]
    return ((dtype == torch.float32 or (dtype == torch.bfloat16 and (BF16 or conv.weight.device.type != "cpu")))
            and conv.weight.dtype == torch.float32 and not any(parameter.requires_grad for parameter in parameters)
            and (norm is None or not norm.training) and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros")


@dataclass
class _Frozen:
    """A convolution with its norm folded in, in the type of the computation; weight [K, C, h, w] channels last, bias [K] or None."""

    state: tuple
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    tiled: Tensor | None  # what makes the input gradient of few channels, see `_tiled`; None where the library's is used


def _frozen(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> _Frozen:
    """The frozen form of `conv` and `norm` in `dtype`, kept with `conv` until a parameter or a running statistic changes."""
    sources = [conv.weight, conv.bias, *((norm.weight, norm.bias, norm.running_mean, norm.running_var) if norm is not None else ())]
    state = (dtype, *((tensor.data_ptr(), tensor._version) for tensor in sources if tensor is not None))
    if getattr(conv, "frozen", None) is None or conv.frozen.state != state:
        with torch.no_grad(), torch.autocast(conv.weight.device.type, enabled=False):
            weight, bias = conv.weight, conv.bias
            if norm is not None:
                scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
                weight = weight * scale[:, None, None, None]
                bias = norm.bias + ((0.0 if bias is None else bias) - norm.running_mean) * scale
            weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
            bias = None if bias is None else bias.to(dtype)
            conv.frozen = _Frozen(state, weight, bias, conv.stride, conv.padding, _tiled(conv, weight))
    return conv.frozen


class _FusedConvolution(torch.autograd.Function):
    """relu(conv(x) + add) with gradients for x and `add` only."""

    @staticmethod
    def forward(ctx, x: Tensor, add: Tensor | None, conv: _Frozen, relu: bool) -> Tensor:
        """x [B, C, H, W], add [B, K, H', W'] or None -> [B, K, H', W']."""
        shape = (conv.padding, conv.stride, (1, 1), 1)
        if add is None:
            out = torch.ops.mkldnn._convolution_pointwise(x, conv.weight, conv.bias, *shape, "relu" if relu else "none", [], "")
        else:
            out = torch.ops.mkldnn._convolution_pointwise.binary(x, add, conv.weight, conv.bias, *shape, "add", None,
                                                                 "relu" if relu else None, [], None)
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
    """Rows and columns of the input whose gradients are channels of one convolution: those measured to be fastest.

    The more channels, up to a vector of 16 numbers, and the fewer taps of the larger kernel, the better; in bfloat16 the rows of the map
    are to stay long as well.
    """
    if dtype == torch.float32:
        return (4, 4) if channels == 1 else (2, 2)
    return (1, 4) if channels <= 4 else (1, 2)


def _tiled(conv: nn.Conv2d, weight: Tensor) -> Tensor | None:
    """The flipped kernel of `weight` [K, C, h, w] at each place of a tile of r x c pixels, [r c C, K, h + r - 1, w + c - 1]."""
    if conv.in_channels > FEW_CHANNELS or conv.stride != (1, 1) or not all(0 <= p < k for p, k in zip(conv.padding, conv.kernel_size)):
        return None
    rows, columns = _tile(conv.in_channels, weight.dtype)
    flipped = weight.flip(2, 3).transpose(0, 1)  # [C, K, h, w]
    places = [F.pad(flipped, (column, columns - 1 - column, row, rows - 1 - row)) for row in range(rows) for column in range(columns)]
    return torch.cat(places).contiguous(memory_format=torch.channels_last)


def _input_gradient(gradient: Tensor, x: Tensor, conv: _Frozen) -> Tensor:
    """The gradient [B, C, H, W] with respect to the input x from that with respect to the output."""
    batch, channels, height, width = x.shape
    rows, columns = _tile(channels, x.dtype)
    if conv.tiled is None or height % rows or width % columns or width == columns:
        return torch.ops.aten.convolution_backward(gradient, x, conv.weight, None, conv.stride, conv.padding, (1, 1), False, (0, 0), 1,
                                                   (True, False, False))[0]
    padding = [size - 1 - pad for size, pad in zip(conv.weight.shape[2:], conv.padding)]
    tiles = F.conv2d(gradient, conv.tiled, None, (rows, columns), padding)  # [B, r c C, H / r, W / c]
    tiles = tiles.permute(0, 2, 3, 1).reshape(batch, height // rows, width // columns, rows, columns, channels)
    return tiles.transpose(2, 3).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def _small(x: Tensor, conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    pixels = -(-x.shape[2] // conv.stride[0]) * -(-x.shape[3] // conv.stride[1])
    return (_here(x, conv) and dtype == torch.bfloat16 and conv.kernel_size == (3, 3) and conv.padding == (1, 1) and pixels <= SMALL_MAP
            and min(conv.in_channels, conv.out_channels) >= SMALL_MAP_CHANNELS)


def _convolve_patches(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
    """3x3 convolution with padding 1 of x [B, C, H, W] by one matrix product; the result is channels last."""
    out = _PatchConvolution.apply(x, weight, bias, stride)
    return out.view(len(x), -(-x.shape[2] // stride[0]), -(-x.shape[3] // stride[1]), -1).permute(0, 3, 1, 2)


class _PatchConvolution(torch.autograd.Function):
    """Weights [K, 9 C] times patches [B H' W', 9 C], transposed: [B H' W', K], with all its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
        """x [B, C, H, W], weight [K, C, 3, 3], bias [K] or None -> [B H' W', K]."""
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()  # [B, H + 2, W + 2, C]
        patches = _patches(padded, stride)  # [B, H', W', 3, 3, C], a view
        ctx.save_for_backward(padded, weight)
        ctx.stride = stride
        out = (_flat(weight) @ patches.flatten(3).flatten(0, 2).t()).t().contiguous()  # this order keeps two cores busy, the other does not
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients with respect to x, weight and bias, each where it is wanted."""
        padded, weight = ctx.saved_tensors
        gradient_x = gradient_weight = gradient_bias = None
        if ctx.needs_input_grad[0]:
            total = torch.zeros(padded.shape, dtype=torch.float32)
            shares = (gradient @ _flat(weight)).view(_patches(total, ctx.stride).shape)
            for row in range(3):  # within one position of the window no two patches share a pixel
                for column in range(3):
                    _patches(total, ctx.stride)[:, :, :, row, column] += shares[:, :, :, row, column]
            gradient_x = total[:, 1:-1, 1:-1].to(gradient.dtype).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            product = gradient.t() @ _patches(padded, ctx.stride).flatten(3).flatten(0, 2)
            gradient_weight = product.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[2]:
            gradient_bias = gradient.sum(0)
        return gradient_x, gradient_weight, gradient_bias, None


def _patches(padded: Tensor, stride: tuple[int, int]) -> Tensor:
    """The 3x3 windows of padded [B, H + 2, W + 2, C] as a view [B, H', W', 3, 3, C]."""
    batch, height, width, channels = padded.shape
    b, h, w, c = padded.stride()
    shape = (batch, (height - 3) // stride[0] + 1, (width - 3) // stride[1] + 1, 3, 3, channels)
    return padded.as_strided(shape, (b, h * stride[0], w * stride[1], h, w, c))


def _flat(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)  # [K, 9 C]
