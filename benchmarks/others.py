"""Attacks of other projects behind one form, attack(model, x, y, epsilon=, norm=) -> x_adv: what benchmarks/attacks.py holds ours against.

FGSM, PGD and SPSA of torchattacks, FMN of foolbox, and CW, MD and MDMT as the repository of Ma et al. ("Imbalanced Gradients") runs them,
from a folder that the user names. Each has the settings of ours; random numbers are torch's global ones.
"""
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn

INSTALL = {"torchattacks": "pip install --no-deps torchattacks", "foolbox": "pip install foolbox"}  # without the old packages it pins
REPOSITORY = "https://github.com/HanxunH/MDAttack"
SHORT = {"num_steps": 20, "num_samples": 128, "delta": 0.001, "lr": 0.03}  # of SPSA on many images: 5,120 passes each
RELEASED = {  # name -> module and class in the folder `attacks` of MDAttack, and its arguments
    "cw": ("PGD", "PGDAttack", lambda epsilon: {"num_steps": 20, "step_size": epsilon / 8, "random_start": True, "type": "CW"}),
    "md": ("MD", "MDAttack", lambda epsilon: {"num_steps": 50, "change_point": 20}),
    "mdmt": ("MD", "MDMTAttack", lambda epsilon: {"num_steps": 50, "change_point": 20}),
}


def others(md_attack: str | None) -> dict[str, Callable[..., Tensor]]:
    """Name -> attack, which raises ValueError with what to do where its package is missing; md_attack: the folder of MDAttack, if any."""
    found = {
        "fgsm": torchattack("FGSM", lambda epsilon: {}),
        "pgd100": torchattack("PGD", lambda epsilon: {"alpha": epsilon / 8, "steps": 100}),
        "spsa": torchattack("SPSA", lambda epsilon: {"delta": 0.001, "lr": 0.01, "nb_iter": 100, "nb_sample": 256}),
        "spsa-short": torchattack("SPSA", lambda epsilon: {
            "delta": SHORT["delta"], "lr": SHORT["lr"], "nb_iter": SHORT["num_steps"], "nb_sample": SHORT["num_samples"]}),
        "fmn100": foolbox_fmn,
    }
    return found | {name: partial(released, md_attack, *entry) for name, entry in RELEASED.items()}


def torchattack(name: str, settings: Callable[[float], dict]) -> Callable[..., Tensor]:
    """The attack of torchattacks of that name; settings(epsilon) are its arguments beside eps."""
    def attack(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, norm: str) -> Tensor:
        return getattr(package("torchattacks"), name)(model, eps=epsilon, **settings(epsilon))(x, y)

    return attack


def foolbox_fmn(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, norm: str) -> Tensor:
    """foolbox's FMN, in l_inf alone: its l_2 form does not project."""
    foolbox = package("foolbox")
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    return import_module("foolbox.attacks").LInfFMNAttack(steps=100)(network, x, y, epsilons=None)[0]


def released(folder: str | None, module: str, name: str, settings: Callable[[float], dict], model: nn.Module, x: Tensor, y: Tensor,
             epsilon: float, norm: str) -> Tensor:
    """The attack of MDAttack of that name, on any device; its random starts may leave [0, 1] and are clamped once it is done."""
    require_released(folder, module)
    parent = ModuleType("mdattack")  # its own package is called attacks, as ours is, and its __init__ needs what is not there
    parent.__path__ = [str(Path(folder) / "attacks")]
    sys.modules["mdattack"] = parent
    attack = getattr(import_module(f"mdattack.{module}"), name)
    with _on_device_of(x):
        return attack(model, epsilon=epsilon, **settings(epsilon)).perturb(x, y).detach().clamp(0, 1)


def require_released(folder: str | None, module: str) -> None:
    """Raise ValueError, with what to do, unless `folder` is a clone of MDAttack with that module."""
    if folder is None:
        raise ValueError(f"cw, md and mdmt are held against a clone of {REPOSITORY}: give --md_attack FOLDER, or --sides ours")
    if not (Path(folder) / "attacks" / f"{module}.py").is_file():
        raise ValueError(f"{folder} holds no attacks/{module}.py: give --md_attack the folder of a clone of {REPOSITORY}")


@contextmanager
def _on_device_of(x: Tensor) -> Iterator[None]:
    """What asks for CUDA by name gets the device of x."""
    with patch.object(torch.Tensor, "cuda", lambda tensor: tensor.to(x.device)), \
            patch.object(torch.cuda, "FloatTensor", lambda *shape: torch.empty(*shape, device=x.device)):
        yield


def package(name: str) -> object:
    """The module of that name.  Raises ValueError, with the command that installs it, where it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"the other implementation comes from {name} ({error}): {INSTALL[name]}") from error
