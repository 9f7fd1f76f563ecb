"""Checkpoints: tensors and plain values only, whole or not there at all, and everyone else's opened safely."""
import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.errors import UserError

FORMAT = 1
OWN = {"name", "num_classes", "in_channels", "mean", "std"}  # what the architecture entry of our own checkpoints holds
WRAPPERS = ("model", "state_dict", "net", "model_state_dict")  # keys under which the field stores its parameters
PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile


def save(path: Path, contents: dict) -> None:
    """Write `contents` (tensors and plain values) so that `path` is at every moment the old file or the whole new one."""
    buffer = io.BytesIO()  # torch.save into a full disk raises a RuntimeError without a reason; write() gives the reason
    torch.save(contents, buffer)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read(path: str | Path) -> dict:
    """The contents of a checkpoint file, on the CPU; nothing in the file is executed.

    Raises UserError in one line for a file that is missing, cut off, no checkpoint, or that holds anything but tensors and plain
    values (a pickle that would run code).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol: what matters is refused below
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _looks_like_checkpoint(path, head):
            raise UserError(f"{path} {_what_it_is(head)}") from error
        reason = str(error).split("\n")[-1] if "WeightsUnpickler" not in str(error) else str(error).split("WeightsUnpickler error:")[-1]
        raise UserError(f"{path} is refused: it holds more than tensors and plain values, and loading it could run code "
                        f"({reason.strip().splitlines()[0][:100]}); save its state_dict() instead") from error
    except Exception as error:  # a damaged file fails in torch, zipfile, struct, ... in their own ways
        raise UserError(f"{path} {_what_it_is(head)}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, not a state dict")
    return contents


def _looks_like_checkpoint(path: Path, head: bytes) -> bool:
    return zipfile.is_zipfile(path) or head[:1] == b"\x80"


def _what_it_is(head: bytes) -> str:
    if not head:
        return "is empty"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not a checkpoint: download the file itself"
    if head[:2] == b"PK":
        return "is damaged or cut off: copy or download it again"
    return "is not a checkpoint that torch can read: damaged, cut off, or another kind of file"


def parameters_of(contents: dict, path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters in a checkpoint's contents, under their bare names, and a note on each thing that was stripped."""
    notes, found = [], contents
    for key in WRAPPERS:
        if isinstance(found.get(key), dict):
            found = found[key]
            notes.append(f"parameters under '{key}'")
            break
    if not found or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
        shown = ", ".join(map(str, list(contents)[:6])) or "nothing"
        raise UserError(f"{path} holds no state dict: its keys are {shown}; expected parameters, or one of {', '.join(WRAPPERS)}")
    while prefix := next((p for p in PREFIXES if all(str(name).startswith(p) for name in found)), None):
        found = {name[len(prefix):]: value for name, value in found.items()}
        notes.append(f"prefix '{prefix}' stripped")
    if any(prefix in name for name in found for prefix in PREFIXES):
        found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    return found, notes


def own_architecture(contents: dict) -> dict | None:
    """The architecture that one of our own checkpoints names, None for a foreign one."""
    entry = contents.get("architecture")
    return entry if isinstance(entry, dict) and set(entry) >= OWN else None


def load_model(path: str | Path, arch: str | None = None, num_classes: int = 10, in_channels: int = 3, *,
               build: Callable[..., nn.Module], report: Callable[[str], None] | None = None) -> nn.Module:
    """The network in a checkpoint, in eval mode on the CPU.

    Our own checkpoints name their architecture; for any other, `arch` is a name `build` knows or `file.py:callable`, built with
    `num_classes` and `in_channels`. Parameters may stand bare or under `model`, `state_dict`, `net`, with or without `module.` and
    `_orig_mod.`. Parameters that the network has no place for are reported when they form whole unused blocks; anything missing
    or of another shape is an error. build: (name, num_classes, in_channels, mean, std) -> module, `models.build_model` or another.

    A checkpoint never names the code to run: one trained with a
    user's file is loaded with that file given as `arch`. Raises UserError in one line for whatever does not fit.
    """
    return model_from(read(path), path, arch, num_classes, in_channels, build=build, report=report)


def model_from(contents: dict, path: str | Path, arch: str | None = None, num_classes: int = 10, in_channels: int = 3, *,
               build: Callable[..., nn.Module], report: Callable[[str], None] | None = None) -> nn.Module:
    """`load_model` for contents already read from `path`."""
    parameters, notes = parameters_of(contents, path)
    mean = std = None
    if own := own_architecture(contents):
        num_classes, in_channels, mean, std = (own[key] for key in ("num_classes", "in_channels", "mean", "std"))
        if arch is None and ".py:" in own["name"]:
            raise UserError(f"{path} was trained with the network {own['name']}, and a checkpoint does not choose the code to run: "
                            f"add --arch {own['name']} if you trust that file")
        arch = arch or own["name"]
    if arch is None:
        raise UserError(f"{path} does not name its architecture: add --arch NAME (lenet, resnet18, ...) or --arch file.py:callable")
    try:
        model = build(arch, num_classes, in_channels, mean, std)
    except ValueError as error:
        raise UserError(str(error)) from error
    _fill(model, parameters, path, arch, notes)
    if notes and report and not own:
        report(f"{path}: {', '.join(notes)}")
    return model.eval()


def _fill(model: nn.Module, parameters: dict[str, Tensor], path: str | Path, arch: str, notes: list[str]) -> None:
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in parameters and not name.endswith("num_batches_tracked")]
    spare = [name for name in parameters if name not in wanted]
    wrong = [name for name in wanted if name in parameters and parameters[name].shape != wanted[name].shape]
    if missing or wrong:
        first = (f"{wrong[0]} is {tuple(parameters[wrong[0]].shape)} where the network has {tuple(wanted[wrong[0]].shape)}" if wrong else
                 f"it lacks {missing[0]}")
        raise UserError(f"{path} does not fit --arch {arch}: {first} ({len(missing)} parameters missing, {len(wrong)} of another shape, "
                        f"{len(spare)} spare)")
    blocks = sorted({name.split(".")[0] for name in spare})
    if any(name.split(".")[0] in blocks for name in wanted):
        raise UserError(f"{path} does not fit --arch {arch}: it has parameters the network lacks, {spare[0]} first ({len(spare)} in all)")
    if spare:
        notes.append(f"{len(spare)} parameters of unused blocks left out: {', '.join(blocks)}")
    model.load_state_dict({name: parameters[name] for name in wanted if name in parameters}, strict=False)
