"""The arithmetic of training: bfloat16 or float32, channels last, compiled where that has been proved."""
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.training.attack_view import AttackView
from harness.training.compilation import Compilation


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on `device`, its convolution weights channels last (on a CPU 2.4x faster for LeNet, 1.3x for SmallCNN)."""
    return model.to(device, memory_format=torch.channels_last)


class TrainingPrecision(nn.Module):
    """`module` with its convolutions and products in `dtype` (autocast), channels last; logits come out in float32.

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
        self.view = AttackView(module) if attack_view else None

    def forward(self, x: Tensor) -> Tensor:
        alone = torch.compiler.is_compiling() or self.compilation is None  # or a part of what is being compiled
        return (self.plain(x) if alone else self.compilation.run(self, x)).to(torch.float32, copy=True)

    def plain(self, x: Tensor) -> Tensor:
        """The pass itself, its logits in the type that they come in."""
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.module(x) if self.view is None else self.view(x)

    def pgd_step(self, steps: Callable, whole_step: Callable, x_adv: Tensor, settings: dict[str, object]) -> Callable:
        """The steps of an attack on this model, in one of the two forms that `attacks.pgd.pgd` offers."""
        if self.compilation is None:
            return steps(self, **settings)
        return self.compilation.pgd_step(self, steps, whole_step, x_adv, settings)


def bare(model: nn.Module) -> nn.Module:
    """The network itself, in float32, without the wrappers of training."""
    while isinstance(model, (DistributedDataParallel, TrainingPrecision)):
        model = model.module
    return model
