"""The context in which a model is attacked: parameters frozen, mode chosen, everything as before on the way
out."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_running: list[object] = []  # a mark for each context that is open, the outermost first


@contextmanager
def frozen(model: nn.Module, mode: str | None = "eval") -> Iterator[nn.Module]:
    """Yield the bare module with its parameters frozen: no pass through it computes a weight gradient.

    mode "eval" or "train" sets every submodule for the duration, None leaves the modes alone. In train mode
    BatchNorm takes batch statistics, moves its running statistics at every forward, and dropout is active.
    The bare module is what DistributedDataParallel wraps: its hooks do not support autograd.grad. The mode of
    every submodule and the flag of every parameter come back on exit, exceptions included; gradients are not
    touched.
    """
    if mode not in ("eval", "train", None):
        raise ValueError(f"mode is 'eval', 'train' or None, not {mode!r}")
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    modes = [(module, module.training) for module in bare.modules()]
    thawed = [parameter for parameter in bare.parameters() if parameter.requires_grad]
    _running.append(mark := object())
    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        if mode is not None:
            bare.train(mode == "train")
        yield bare
    finally:
        _running.remove(mark)
        for parameter in thawed:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


def current() -> object | None:
    """The mark of the attack that runs, or None: what is computed from frozen parameters holds for one."""
    return _running[0] if _running else None


def predict(model: nn.Module, x: Tensor, mode: str | None = "eval") -> Tensor:
    """Logits [B, K] of `x` without a graph, in the mode of the attack: what a KL attack moves away from."""
    with frozen(model, mode) as bare, torch.no_grad():
        return bare(x)
