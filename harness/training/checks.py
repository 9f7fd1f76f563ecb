"""What can be wrong in the command of a training, said before any data is read or downloaded."""
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from harness import distributed
from harness.device import choose_device
from harness.errors import UserError
from harness.folder import check_free
from harness.training.options import RunOptions


def check_command(cfg: RunOptions, build_model: Callable[..., nn.Module]) -> None:
    """Raise UserError for a device, a network, a run folder or a file that is not there, or is taken."""
    distributed.expected()
    choose_device(cfg.device)
    if cfg.out_dir and not cfg.resume and distributed.expected()[0] == 0:
        check_free(Path(cfg.out_dir))
    if (extra := getattr(cfg, "extra_data", None)) and not Path(extra).is_file():
        raise UserError(f"--extra_data: there is no file {extra}")
    check_network(cfg.model, build_model)


def check_network(name: str, build_model: Callable[..., nn.Module]) -> None:
    """Raise UserError for an unknown network, and for a network's file that is not there; run no file."""
    if ".py:" in name:
        if not Path(name.rpartition(":")[0]).is_file():
            raise UserError(f"model '{name}': there is no file {name.rpartition(':')[0]}")
        return
    try:
        with torch.device("meta"):
            build_model(name, 10, 3)
    except ValueError as error:
        raise UserError(str(error)) from error
