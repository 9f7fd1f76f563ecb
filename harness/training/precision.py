"""The arithmetic of training: bfloat16 or float32, in the network's memory format, compiled if asked for."""
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.training.attack_view import AttackView
from harness.training.compilation import Compilation


def memory_format_of(network: nn.Module) -> torch.memory_format:
    """The memory format of a network's convolution weights, which its images are given in."""
    maps = [parameter for parameter in network.parameters() if parameter.ndim == 4]
    last = torch.channels_last
    if any(value.is_contiguous(memory_format=last) and not value.is_contiguous() for value in maps):
        return last
    return torch.contiguous_format


class TrainingPrecision(nn.Module):
    """`module` with its convolutions and products in `dtype` (autocast); logits come out in float32.

    The images are given in the memory format of the weights.

    With `attack_view` it is passed in a faster form where one is recognised and checked
    (`harness.training.attack_view`). With a `compilation` its passes and the steps of a PGD on it are
    compiled, once that has been proved to be the same and faster. The logits are a copy: a CUDA graph writes
    its own outputs again in the next pass, when those of this one may still be needed.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, compilation: Compilation | None = None,
                 attack_view: bool = True):
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.compilation = compilation
        self.memory_format = memory_format_of(module)
        self.view = AttackView(module) if attack_view else None

    def forward(self, x: Tensor) -> Tensor:
        alone = torch.compiler.is_compiling() or self.compilation is None  # or a part of what is compiled
        return (self.plain(x) if alone else self.compilation.run(self, x)).to(torch.float32, copy=True)

    def plain(self, x: Tensor) -> Tensor:
        """The pass itself, its logits in the type that they come in."""
        x = x.contiguous(memory_format=self.memory_format)
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.module(x) if self.view is None else self.view(x)

    def pgd_step(self, steps: Callable, whole_step: Callable, x_adv: Tensor,
                 settings: dict[str, object]) -> Callable:
        """The steps of an attack on this model, in one of the two forms that `attacks.pgd.pgd` offers."""
        if self.compilation is None:
            return steps(self, **settings)
        return self.compilation.pgd_step(self, steps, whole_step, x_adv, settings)


def bare(model: nn.Module) -> nn.Module:
    """The network itself, in float32, without the wrappers of training."""
    while isinstance(model, (DistributedDataParallel, TrainingPrecision)):
        model = model.module
    return model
