"""Losses and instance weights: pure functions on logits and labels that return one value per example, [B]."""
import torch
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """Half-precision logits in float32, wider ones unchanged: nothing here is computed in 16 bits."""
    return logits if logits.itemsize >= 4 else logits.float()


def with_mean_one(weights: Tensor) -> Tensor:
    """Weights rescaled to sum to the batch size, w * B / sum(w): [B] -> [B].  All zero stays all zero."""
    return len(weights) * (weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny))
