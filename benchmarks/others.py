"""Attacks of other projects behind one form, attack(model, x, y, epsilon=, norm=) -> x_adv.

FGSM, PGD and SPSA of torchattacks, FMN of foolbox, and CW, MD and MDMT as the repository of Ma et al.
("Imbalanced Gradients") runs them, from a folder that the user names. Each has the settings of ours; random
numbers are torch's global ones. All raise UserError, with what to do, where a package is missing.
"""
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from harness.errors import UserError

# without the old packages that it pins
INSTALL = {"torchattacks": "pip install --no-deps torchattacks", "foolbox": "pip install foolbox"}
REPOSITORY = "https://github.com/HanxunH/MDAttack"
SHORT = {"num_steps": 20, "num_samples": 128, "delta": 0.001, "lr": 0.03}  # SPSA: 5,120 passes an image
TORCHATTACKS = {  # name -> its class, and its arguments beside eps
    "fgsm": ("FGSM", lambda epsilon: {}),
    "pgd100": ("PGD", lambda epsilon: {"alpha": epsilon / 8, "steps": 100}),
    "spsa": ("SPSA", lambda epsilon: {"delta": 0.001, "lr": 0.01, "nb_iter": 100, "nb_sample": 256}),
    "spsa-short": ("SPSA", lambda epsilon: {
        "delta": SHORT["delta"], "lr": SHORT["lr"], "nb_iter": SHORT["num_steps"],
        "nb_sample": SHORT["num_samples"]}),
}
RELEASED = {  # name -> module and class in the folder `attacks` of MDAttack, and its arguments
    "cw": ("PGD", "PGDAttack", lambda epsilon: {
        "num_steps": 20, "step_size": epsilon / 8, "random_start": True, "type": "CW"}),
    "md": ("MD", "MDAttack", lambda epsilon: {"num_steps": 50, "change_point": 20}),
    "mdmt": ("MD", "MDMTAttack", lambda epsilon: {"num_steps": 50, "change_point": 20}),
}


def others(md_attack: str | None) -> dict[str, Callable[..., Tensor]]:
    """Name -> attack; md_attack: the folder of MDAttack, if any."""
    return {"fmn100": foolbox_fmn,
            **{name: partial(torchattack, *entry) for name, entry in TORCHATTACKS.items()},
            **{name: partial(released, md_attack, *entry) for name, entry in RELEASED.items()}}


def torchattack(name: str, settings: Callable[[float], dict[str, Any]], model: nn.Module, x: Tensor,
                y: Tensor, *, epsilon: float, norm: str) -> Tensor:
    """The attack of torchattacks of that name."""
    return getattr(package("torchattacks"), name)(model, eps=epsilon, **settings(epsilon))(x, y)


def foolbox_fmn(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, norm: str) -> Tensor:
    """foolbox's FMN, in l_inf alone: its l_2 form does not project."""
    network = package("foolbox").PyTorchModel(model, bounds=(0, 1), device=x.device)
    return package("foolbox.attacks").LInfFMNAttack(steps=100)(network, x, y, epsilons=None)[0]


def released(folder: str | None, module: str, name: str, settings: Callable[[float], dict[str, Any]],
             model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, norm: str) -> Tensor:
    """The attack of MDAttack of that name, on any device; what leaves [0, 1] is clamped at the end."""
    require_released(folder, module)
    # its own package is called attacks, as ours is, and its __init__ needs what is not there
    parent = ModuleType("mdattack")
    parent.__path__ = [str(Path(folder) / "attacks")]
    sys.modules["mdattack"] = parent
    attack = getattr(import_module(f"mdattack.{module}"), name)
    with _on_device_of(x):
        return attack(model, epsilon=epsilon, **settings(epsilon)).perturb(x, y).detach().clamp(0, 1)


def require_released(folder: str | None, module: str) -> None:
    """Raise UserError unless `folder` is a clone of MDAttack with that module."""
    if folder is None:
        raise UserError(f"cw, md and mdmt are held against a clone of {REPOSITORY}: give --md_attack FOLDER, "
                        "or --sides ours")
    if not (Path(folder) / "attacks" / f"{module}.py").is_file():
        raise UserError(f"{folder} holds no attacks/{module}.py: give --md_attack the folder of a clone of "
                        + REPOSITORY)


@contextmanager
def _on_device_of(x: Tensor) -> Iterator[None]:
    """What asks for CUDA by name gets the device of x."""
    with patch.object(torch.Tensor, "cuda", lambda tensor: tensor.to(x.device)), \
            patch.object(torch.cuda, "FloatTensor", lambda *shape: torch.empty(*shape, device=x.device)):
        yield


def package(name: str) -> ModuleType:
    """The module of that name."""
    try:
        return import_module(name)
    except ImportError as error:
        top = name.split(".")[0]
        raise UserError(f"the other implementation comes from {top} ({error}): {INSTALL[top]}") from error
