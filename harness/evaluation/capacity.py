"""How many images an evaluation attacks at once by default: what fits, and on a CPU what is fast."""
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from attacks.memory import out_of_memory
from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from harness.device import free_memory, peak_memory, release_memory
from harness.evaluation.predictions import MULTIPLE, BatchInvariant

T = TypeVar("T")
PROBE = MULTIPLE  # images of the pass that is measured: attacks pad their batches to multiples of it
SHARE = 0.5       # of the free memory for a forward and backward pass; the rest is for the attacks' own
# On a CPU larger batches gain next to nothing, and an interrupted evaluation loses one.
FASTEST_ON_CPU = 512  # images


def fitting_batch_size(model: nn.Module, split: Split, copies: int = 1, free: Callable = free_memory,
                       peak: Callable = peak_memory) -> int:
    """The number of images whose forward and backward pass, to the images alone, takes SHARE of free memory.

    model: in eval mode, on the device of the N images of `split`; copies: of each image that an attack holds
    at once. One pass of PROBE images is measured; what it takes beyond the images counts as theirs. A
    multiple of PROBE, unless fewer fit; at most FASTEST_ON_CPU on a CPU; at least 1, at most N rounded up to
    a multiple of PROBE. Off the CPU, that many are tried, and half as many as long as they do not fit, since
    other programs and the libraries' own needs are not counted. No verdict depends on it. free(device) and
    peak(device, work) -> bytes.
    """
    device, gradient = split.images.device, partial(input_gradient, model, split.images)
    measured = _unless_full(device, lambda: peak(device, gradient))
    each = copies * max((free(device) if measured is None else measured) / PROBE, 1.0)
    fit = int(SHARE * free(device) / each)
    fit = fit // PROBE * PROBE if fit >= PROBE else max(fit, 1)
    fit = min(fit, FASTEST_ON_CPU if device.type == "cpu" else fit, -(-len(split) // PROBE) * PROBE)
    tried = device.type not in ("cpu", "meta")
    while tried and fit > 1 and _unless_full(device, partial(gradient, copies * fit)) is None:
        fit = fit // 2 // PROBE * PROBE or fit // 2
    return fit


def _unless_full(device: torch.device, work: Callable[[], T]) -> T | None:
    """What work() returns, None where the device's memory is too small for it."""
    try:
        return work()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    finally:
        release_memory(device)


def input_gradient(model: nn.Module, images: Tensor, count: int = PROBE) -> Tensor:
    """An attack step's gradient at `count` images, the first ones again and again; parameters frozen."""
    x = to_unit(images[torch.arange(count, device=images.device) % len(images)]).requires_grad_()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            return torch.autograd.grad(BatchInvariant(model)(x).sum(), x)[0]
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
