"""Normalisation as a model's first layer: images and epsilon stay in [0, 1] (Cohen et al., ICML 2019)."""
import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel, with mean and std as buffers that travel in the checkpoint."""

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"need one mean and one positive std per channel, not mean {mean} and std {std}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Normalized(nn.Module):
    """`network` behind a `Normalize` layer."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.normalize(x))
