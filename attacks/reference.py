"""The published AutoAttack as its PyPI package runs it (Croce & Hein, ICML 2020; `pyautoattack`, an optional
extra), behind one function.

For whoever needs that very implementation: it draws its random numbers batch by batch from a seed, so its
verdicts depend on batch size and order. `attacks.autoattack` is our own.
"""
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attacks.checks import check_batch
from attacks.frozen import frozen

EXTRA = "pyautoattack==0.2.0"
NORMS = {"linf": "Linf", "l2": "L2"}
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
MEMBERS = (*STANDARD, "apgd-dlr")


def autoattack_reference(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, norm: str = "linf",
                         seed: int = 0, batch_size: int = 250, members: tuple[str, ...] = STANDARD) -> Tensor:
    """x_adv of the released standard ensemble, or of some of its members in the order given; x: [B, C, H, W]
    in [0, 1], y: [B].

    The model is in eval mode with frozen parameters, which changes no bit of the result; torch's global
    generators and the tracing function of the interpreter, which the package sets, are restored. Raises
    ValueError where the package is missing, for a member it does not have, for images outside [0, 1] and for
    an unknown norm.
    """
    check_batch(x, y, norm, tuple(NORMS))
    if unknown := [name for name in members if name not in MEMBERS]:
        raise ValueError(f"unknown attack {unknown[0]!r}: choose from {', '.join(MEMBERS)}")
    package = require_package()
    with frozen(model) as bare, _globals_kept(x.device):
        attack = package.AutoAttack(_OwnLogits(bare), norm=NORMS[norm], eps=epsilon, seed=seed,
                                    version="standard", device=x.device)
        attack.attacks_to_run = list(members)
        x_adv, _ = attack.run_standard_evaluation(x.detach(), y, batch_size=batch_size)
    return x_adv.detach()


class _OwnLogits(nn.Module):
    """The model with logits that the caller may overwrite, as the package does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).clone()


def require_package():
    """The published package.  Raises ValueError, with the command that installs it, where it is missing."""
    try:
        from pyautoattack import autoattack
    except ImportError:
        raise ValueError(f"the published AutoAttack is an optional extra: pip install {EXTRA}") from None
    return autoattack


@contextmanager
def _globals_kept(device: torch.device) -> Iterator[None]:
    accelerator = {} if device.type == "cpu" else {"device_type": device.type}
    devices = [] if device.type == "cpu" else [torch.device(device.type, device.index or 0)]
    tracing = sys.gettrace()
    with torch.random.fork_rng(devices=devices, **accelerator):
        try:
            yield
        finally:
            sys.settrace(tracing)
