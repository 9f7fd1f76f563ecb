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
    for flag, name in (("extra_data", getattr(cfg, "extra_data", None)), ("model", _file_of(cfg.model))):
        if name and not Path(name).is_file():
            raise UserError(f"--{flag}: there is no file {name}")
    if not _file_of(cfg.model):
        try:
            with torch.device("meta"):
                build_model(cfg.model, 10, 3)
        except ValueError as error:
            raise UserError(str(error)) from error


def _file_of(model: str) -> str | None:
    return model.rpartition(":")[0] if ".py:" in model else None
