"""Random numbers that belong to an example: the same key gives the same numbers on every device, in any batch
or order."""
import math

import torch
from torch import Tensor

# Multipliers of the SplitMix64 generator (Steele, Lea & Flood, OOPSLA 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def example_keys(index: Tensor, *stream: int) -> Tensor:
    """One int64 key per example, [B], from its index in the data set and a stream, such as (seed, restart)."""
    keys = index.to(torch.int64)
    for number in stream:
        keys = _mix(keys ^ _signed(_GAMMA * (number + 1)))
    return _mix(keys)


def keyed_uniform(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform float32 numbers in [0, 1) with 24 random bits, [B, *shape], row i determined by keys[i] alone."""
    count = math.prod(shape)
    counter = torch.arange(1, count + 1, device=keys.device) * _GAMMA
    bits = _mix(keys[:, None] + counter)  # [B, count], wraps modulo 2**64
    return (bits >> 40).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24).view(len(keys), *shape)


def keyed_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers, [B, *shape], row i determined by keys[i] alone (Box-Muller)."""
    radius, angle = keyed_uniform(keys, (2, *shape)).unbind(dim=1)
    return (-2.0 * torch.log1p(-radius)).sqrt_() * torch.cos(2.0 * math.pi * angle)


def _mix(bits: Tensor) -> Tensor:
    for by, factor in ((30, _MIX1), (27, _MIX2)):
        bits = _shift(bits, by).bitwise_xor_(bits).mul_(factor)
    return _shift(bits, 31).bitwise_xor_(bits)


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _shift(bits: Tensor, by: int) -> Tensor:
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)  # a logical shift: >> on int64 copies the sign
