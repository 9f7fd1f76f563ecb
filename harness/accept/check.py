"""What a check is, and how it runs a training script."""
import contextlib
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import checkpoint
from harness.config import parse_config


class NotChecked(Exception):
    """What a check needs is not here."""


@dataclass(frozen=True)
class Found:
    """Whether what is asked holds, in words, and the figures behind it."""

    holds: bool
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """Where a check is made: a device, and a folder of its own.

    real_gpu: the device is a GPU, and is there; build: as in `harness.checkpoint.load_model`.
    """

    device: torch.device
    real_gpu: bool
    folder: Path
    build: Callable[..., nn.Module]


@dataclass(frozen=True)
class Check:
    """One line of the report: its name, what it asks, and how it finds out."""

    name: str
    asks: str
    run: Callable[[Site], Found]
    seconds: int = 60  # that it may take
    needs_gpu: bool = False


def networks() -> Callable[..., nn.Module]:
    """What builds networks by name, as the scripts that are checked know it."""
    return importlib.import_module("train_at_mnist").build_model


def run(script: str, words: tuple[object, ...]) -> str:
    """What a script says to these words.

    Checks run the scripts themselves, which no other module of `harness` knows.
    """
    module, said = importlib.import_module(script), io.StringIO()
    with contextlib.redirect_stdout(said):
        module.main(parse_config(module.Config, [*map(str, words)], getattr(module, "RECIPES", None)))
    return said.getvalue()


def train(script: str, words: tuple[object, ...], device: torch.device, folder: Path) -> tuple[dict, str]:
    """The contents of last.pt of a training script, and what it has said."""
    said = run(script, (*words, "--device", device.type, "--out_dir", folder))
    return checkpoint.read(folder / "last.pt"), said


def weights_of(state: dict[str, Tensor]) -> Tensor:
    """The floating-point values of a network's state as one vector, on the CPU."""
    values = (value.detach().cpu() for value in state.values())
    values = [value.flatten().double() for value in values if value.is_floating_point()]
    return torch.cat([torch.empty(0), *values])
