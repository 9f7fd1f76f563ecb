"""Max-pooling."""
import torch
import torch.nn.functional as F
from torch import Tensor

FEW_CHANNELS = 16  # below so many the library looks at one value at a time


def max_pool(x: Tensor) -> Tensor:
    """2x2 max-pooling with stride 2 of x [B, C, H, W]; the gradient goes to the first maximum of a window, row by row, as in the library.

    Of a map of even sides on a CPU two maxima, of columns and of rows: for finite numbers the same bits, the gradient's too. Without a
    gradient that takes a fifth of the library's time for a channels-last map of few channels, as the library keeps the places too; with
    one, and only for few channels in float32 or bfloat16, two thirds.
    """
    batch, channels, height, width = x.shape
    needs_places = torch.is_grad_enabled() and x.requires_grad
    if x.device.type != "cpu" or height % 2 or width % 2 or torch.compiler.is_compiling():
        return F.max_pool2d(x, 2)
    if not needs_places:
        rows = x.permute(0, 2, 3, 1).reshape(-1, 2, width * channels)  # [B H/2, 2, W C]
        columns = torch.maximum(*rows.unbind(1)).view(batch, height // 2, width // 2, 2, channels)
        return torch.maximum(*columns.unbind(3)).permute(0, 3, 1, 2)
    if channels < FEW_CHANNELS and x.dtype in (torch.float32, torch.bfloat16) and not torch._C._are_functorch_transforms_active():
        return _FewChannels.apply(x)
    return F.max_pool2d(x, 2)


class _FewChannels(torch.autograd.Function):
    """Computed in float32, which holds every value of bfloat16 and is faster here."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the maxima [B, C, H/2, W/2] in the type of x."""
        batch, channels, height, width = x.shape
        columns = torch.maximum(*_pairs(x).unbind(3))  # [B, H, W/2, C]
        ctx.save_for_backward(x, columns)
        # no view is returned: the caller may change it in place
        shape = (batch, channels, height // 2, width // 2)
        out = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
        rows = columns.view(batch, height // 2, 2, width // 2 * channels)
        torch.maximum(*rows.unbind(2), out=out.permute(0, 2, 3, 1).view(batch, height // 2, width // 2 * channels))
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """The gradient with respect to x [B, C, H, W]; of equal values the first has it all."""
        x, columns = ctx.saved_tensors
        batch, channels, height, width = x.shape
        gradient = gradient.permute(0, 2, 3, 1).to(torch.float32).reshape(batch, height // 2, width // 2 * channels)
        gradient = _share(gradient, columns.detach().view(batch, height // 2, 2, width // 2 * channels), 2).view(columns.shape)
        return _share(gradient, _pairs(x.detach()), 3).view(batch, height, width, channels).permute(0, 3, 1, 2).to(x.dtype)


def _pairs(x: Tensor) -> Tensor:
    """Columns two by two: x [B, C, H, W] as [B, H, W/2, 2, C], in float32."""
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).to(torch.float32).contiguous().view(batch, height, width // 2, 2, channels)


def _share(gradient: Tensor, pairs: Tensor, dim: int) -> Tensor:
    """Give the gradient of max(first, second) to the larger one, of two equal ones to the first; pairs [..., 2, ...] along `dim`."""
    first, second = pairs.unbind(dim)
    chosen = torch.ge(first, second, out=torch.empty_like(first, memory_format=torch.contiguous_format))  # 1 or 0
    if torch.is_grad_enabled():  # the gradient is to be differentiated again
        return torch.stack((gradient * chosen, gradient * (1.0 - chosen)), dim)
    result = gradient.new_empty(pairs.shape)
    to_first, to_second = result.unbind(dim)
    torch.mul(gradient, chosen, out=to_first)
    torch.sub(gradient, to_first, out=to_second)
    return result
