"""What can be wrong in the command of a training, said before any data is read or downloaded."""
import ast
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from harness import distributed
from harness.device import choose_device
from harness.errors import UserError
from harness.folder import check_free
from harness.training.options import RunOptions

# in a file whose names reading cannot tell
DEFINES_MORE = ("*", "globals", "locals", "vars", "setattr", "exec", "__getattr__", "__dict__")


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
    """Raise UserError for an unknown network, and for a file in which there can be none; run no file."""
    if ".py:" in name:
        file, _, attribute = name.rpartition(":")
        if not Path(file).is_file():
            raise UserError(f"model '{name}': there is no file {file}")
        if not _names(Path(file)) & {attribute, *DEFINES_MORE}:
            raise UserError(f"model '{name}': {file} defines no callable '{attribute}'")
        return
    try:
        with torch.device("meta"):
            build_model(name, 10, 3)
    except ValueError as error:
        raise UserError(str(error)) from error


def _names(path: Path) -> set[str]:
    """The names in a program; raises UserError for a file that is no Python."""
    try:
        tree = ast.parse(path.read_bytes(), path.name)
    except (SyntaxError, ValueError) as error:  # ValueError: bytes that are no text
        place = f", line {error.lineno}," if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"{path}{place} is not Python: {getattr(error, 'msg', error)}") from None
    fields = ("id", "name", "asname")
    words = [getattr(node, field, None) for node in ast.walk(tree) for field in fields]
    attributes = {getattr(node, "attr", None) for node in ast.walk(tree)} & {"__dict__"}
    return attributes | {word for word in words if isinstance(word, str)}
