"""Checkpoints: tensors and plain values, whole or not there at all, and everyone else's opened safely."""
import io
import pickle
import re
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from harness.device import allows_tf32, forbid_tf32
from harness.errors import UserError
from harness.folder import whole_file

FORMAT = 1
OWN = {"name", "num_classes", "in_channels", "mean", "std"}  # the architecture entry of our own checkpoints
WRAPPERS = ("model", "state_dict", "net", "model_state_dict")  # the customary keys: they win over others
LISTED = "(list)"  # the key of what was saved as a list or tuple
DEPTH = 3          # wrappers in wrappers, at most
SPOILT = "is damaged or cut off: copy or download it again"
UNPACK = "unpack it and name the checkpoint in it"
MATLAB = ("is a MATLAB file, not a checkpoint: the networks of robustness curves are read by "
          "generate_robustness_curves.py")
MAGIC = (  # the first bytes of files that are no checkpoints, and what to say of them
    (b"version https://git-lfs", "is a Git LFS pointer, not a checkpoint: run 'git lfs pull' to get it"),
    (b"MATLAB 5.0 MAT-file", MATLAB), (b"MATLAB 7.3 MAT-file", f"{MATLAB}, once saved with -v7"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras?), not a checkpoint: convert it to a PyTorch state dict"),
    (b"\x1f\x8b", f"is compressed (gzip): {UNPACK} (gunzip, or tar -xzf for a .tar.gz)"),
    (b"BZh", f"is compressed (bzip2): {UNPACK}"), (b"\xfd7zXZ", f"is compressed (xz): {UNPACK}"),
    (b"\x93NUMPY", "is a NumPy array, not a checkpoint: save a state dict with torch.save"),
)


def save(path: Path, contents: dict) -> None:
    """Write `contents` (tensors and plain values); `path` is always the old file or the whole new one."""
    buffer = io.BytesIO()  # on a full disk torch.save raises a RuntimeError without a reason; write() has it
    torch.save(contents, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def read(path: str | Path) -> dict:
    """The contents of a file of torch.save or safetensors, on the CPU; nothing in the file is executed.

    A list or tuple is given under the key LISTED. Raises UserError in one line for a file that is missing,
    cut off, of another kind, or that holds more than tensors and plain values (a pickle that would run code).
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
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1e8:  # the length of its JSON header
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol: what matters is refused below
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not head.startswith((b"PK\x03\x04", b"\x80")):
            raise UserError(f"{path} {_what_it_is(path, head)}") from error
        raise UserError(f"{path} is refused: it holds more than tensors and plain values, and loading it "
                        f"could run code ({_unpickling(error)}); save its state_dict() instead") from error
    except Exception as error:  # a damaged file fails in torch, zipfile, struct, ... in their own ways
        raise UserError(f"{path} {_what_it_is(path, head)}") from error
    if isinstance(contents, (list, tuple)) and _holds_parameters(contents):
        return {LISTED: contents}
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, not a state dict")
    return contents


def _unpickling(error: pickle.UnpicklingError) -> str:
    """What torch refused to unpickle, without its advice to load the file all the same."""
    _, found, reason = str(error).partition("WeightsUnpickler error:")
    reason = reason.strip().splitlines()[0].split(". ")[0] if found else str(error).split("\n")[-1]
    return textwrap.shorten(reason, 100, placeholder=" ...")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path} is a safetensors file: pip install safetensors to read it") from None
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"{path} {SPOILT}") from error


def _what_it_is(path: Path, head: bytes) -> str:
    """What a file is that torch cannot read, and what to do."""
    if not head:
        return "is empty"
    if said := next((said for magic, said in MAGIC if head.startswith(magic)), None):
        return said
    if head[:2] == b"PK":
        return _what_zip(path)
    if head[257:262] == b"ustar":
        return f"is a tar archive: {UNPACK}"
    if re.match(rb"\x08[\x01-\x20][\x12\x1a\x22\x3a]", head) or path.suffix == ".onnx":
        return "is an ONNX file, not a checkpoint: name the state dict of the network that it was made from"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not a checkpoint: download the file itself"
    text = head.decode("utf-8", "ignore")
    readable = all(letter.isprintable() or letter.isspace() for letter in text)
    if not readable or len(text.encode()) < len(head) - 3:  # the last letter may be cut
        return "is not a checkpoint that torch can read: damaged, cut off, or another kind of file"
    if path.suffix == ".py":
        return f"is a Python file, not a checkpoint: name it as --arch {path}:NAME, beside a checkpoint"
    return "is a text file, not a checkpoint"


def _what_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a damaged file fails in zipfile and struct in their own ways
        return SPOILT
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return ("is a TorchScript archive, which holds code: save its parameters, "
                f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pt')")
    exported = {"archive_format", "models/model.json", "serialized_exported_program.json"}
    if path.suffix == ".pt2" or exported & inner.union(names):
        return ("is a program of torch.export: save its parameters, "
                f"torch.save(torch.export.load('{path.name}').state_dict, 'weights.pt')")
    if "data.pkl" in inner:
        return SPOILT
    if names and all(name.endswith(".npy") for name in names):
        return "is a NumPy archive (.npz), not a checkpoint: save its arrays as tensors with torch.save"
    if "model.weights.h5" in names:
        return "is a Keras model, not a checkpoint: convert its arrays to a PyTorch state dict"
    return f"is a zip archive, not a checkpoint: {UNPACK}"


def parameters_of(contents: dict, path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters in a checkpoint's contents, under their names there, and notes on the rest."""
    found, notes = contents, []
    for _ in range(DEPTH):
        if (key := _wrapper(found, path)) is None:
            break
        found = found[key]
        if key != LISTED:
            notes.append(f"parameters under '{key}'")
        if isinstance(found, (list, tuple)):
            found = _only_one(found, path, notes)
    named = {name: value for name, value in found.items() if _is_parameter(name, value)}
    if not named:
        shown = ", ".join(map(str, list(contents)[:6])) or "nothing"
        raise UserError(f"{path} holds no state dict: its keys are {shown}; expected parameters, or one of "
                        f"{', '.join(WRAPPERS)}")
    if others := [str(name) for name in found if name not in named]:
        notes.append(f"left out, as no tensors: {_some(others)}")
    return named, notes


def last_length(parameters: dict[str, Tensor]) -> int:
    """The length of the last parameter: in nearly every network the number of its outputs."""
    return next((len(value) for value in reversed(parameters.values()) if value.dim()), 0)


def _wrapper(contents: dict, path: str | Path) -> str | None:
    """The key that the parameters stand under, None where they stand bare or nowhere."""
    if known := [key for key in (LISTED, *WRAPPERS) if _holds_parameters(contents.get(key))]:
        return known[0]
    if any(_is_parameter(name, value) and "." in name for name, value in contents.items()):
        return None
    found = [key for key, value in contents.items() if isinstance(key, str) and _holds_parameters(value)]
    if len(found) > 1:
        raise UserError(f"{path} holds several state dicts ({_some(found)}): save the one that is meant "
                        "alone (torch.save) and name that file")
    return found[0] if found else None


def _is_parameter(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _holds_parameters(value: object, depth: int = DEPTH) -> bool:
    if isinstance(value, dict):
        inner = [value.get(key) for key in WRAPPERS]
        if any(_is_parameter(name, entry) for name, entry in value.items()):
            return True
    else:
        inner = list(value) if isinstance(value, (list, tuple)) else []
    return depth > 1 and any(_holds_parameters(entry, depth - 1) for entry in inner)


def _only_one(entries: list | tuple, path: str | Path, notes: list[str]) -> dict:
    found = [entry for entry in entries if _holds_parameters(entry)]
    kind = type(entries).__name__
    if len(found) != 1:
        raise UserError(f"{path} holds a {kind} of {len(found)} state dicts: save the one that is meant "
                        "alone (torch.save) and name that file")
    notes.append(f"the state dict in a {kind} of {len(entries)}")
    return found[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")


def own_architecture(contents: dict) -> dict | None:
    """The architecture that one of our own checkpoints names, None for a foreign one."""
    entry = contents.get("architecture")
    return entry if isinstance(entry, dict) and set(entry) >= OWN else None


def architecture_of(contents: dict, path: str | Path, arch: str | None) -> str:
    """The network to build: `arch`, or what a checkpoint of ours names. Raises UserError if nothing says."""
    own = own_architecture(contents)
    if arch is None and own and ".py:" in own["name"]:
        raise UserError(f"{path} was trained with the network {own['name']}, and a checkpoint does not "
                        f"choose the code to run: add --arch {own['name']} if you trust that file")
    if arch is None and not own:
        raise UserError(f"{path} does not name its architecture: add --arch NAME (lenet, resnet18, ...) or "
                        "--arch file.py:callable")
    return arch or own["name"]


def load_model(path: str | Path, arch: str | None = None, num_classes: int = 10, in_channels: int = 3, *,
               build: Callable[..., nn.Module], report: Callable[[str], None] | None = None,
               ignore_extra: bool = False) -> nn.Module:
    """The network in a checkpoint, in eval mode on the CPU.

    Our own checkpoints name their architecture; for any other, `arch` is a name `build` knows or
    `file.py:callable`, built with `num_classes` and `in_channels`. Parameters may stand bare, under WRAPPERS
    or the one key that holds any, and in a list that holds one state dict. Their names are tried as they are;
    if they do not fit the network, without the `module.`, `encoder.`, ... that all of them begin with.
    Parameters that the network has no place
    for are left out and reported when they form whole unused blocks, and all of them with `ignore_extra`;
    anything missing or of another shape is an error. build: (name, num_classes, in_channels, mean, std) ->
    module, `models.build_model` or another.

    A checkpoint never names the code to run: one trained with a user's file is loaded with that file given as
    `arch`. Raises UserError in one line for whatever does not fit.
    """
    return model_from(read(path), path, arch, num_classes, in_channels, build=build, report=report,
                      ignore_extra=ignore_extra)


def model_from(contents: dict, path: str | Path, arch: str | None = None, num_classes: int = 10,
               in_channels: int = 3, *, build: Callable[..., nn.Module],
               report: Callable[[str], None] | None = None, ignore_extra: bool = False) -> nn.Module:
    """`load_model` for contents already read from `path`."""
    parameters, notes = parameters_of(contents, path)
    mean = std = None
    if own := own_architecture(contents):
        known = ("num_classes", "in_channels", "mean", "std")
        num_classes, in_channels, mean, std = (own[key] for key in known)
        notes = []
    arch = architecture_of(contents, path, arch)
    model = built(build, arch, num_classes, in_channels, mean, std)
    try:
        _fill(model, parameters, notes, ignore_extra)
    except ValueError as error:
        raise UserError(f"{path} does not fit --arch {arch}: {error}") from error
    if notes and report:
        report(f"{path}: {', '.join(notes)}")
    return model.eval()


def built(build: Callable[..., nn.Module], *given: Any) -> nn.Module:
    """build(*given); where TF32 is forbidden it stays so, whatever the file of a user's network sets.

    Raises UserError for a ValueError of build.
    """
    forbidden = not allows_tf32()
    try:
        return build(*given)
    except ValueError as error:
        raise UserError(str(error)) from error
    finally:
        if forbidden:
            forbid_tf32()


def _spellings(parameters: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """The parameters as they are named, then without what wraps a network; each with what was taken off."""
    found = [(parameters, [])]
    while len(heads := {"".join(name.partition(".")[:2]) for name in parameters}) == 1:
        prefix = heads.pop()
        if not prefix.endswith("."):
            break
        parameters = {name.removeprefix(prefix): value for name, value in parameters.items()}
        found.append((parameters, [*found[-1][1], f"prefix '{prefix}' stripped"]))
    yield from found
    for parameters, notes in found:  # a network that was compiled in part
        bare = {name.replace("_orig_mod.", ""): value for name, value in parameters.items()}
        yield bare, [*notes, "'_orig_mod.' taken out of names"]


def _fill(model: nn.Module, parameters: dict[str, Tensor], notes: list[str], ignore_extra: bool) -> None:
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}

    def misfits(named: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        missing = [name for name in wanted if name not in named and not name.endswith("num_batches_tracked")]
        fixed = [name for name in wanted if name in named and not is_lazy(wanted[name])]
        wrong = [name for name in fixed if named[name].shape != wanted[name].shape]
        return missing, wrong

    named, stripped = min(_spellings(parameters), key=lambda spelling: sum(map(len, misfits(spelling[0]))))
    notes += stripped
    missing, wrong = misfits(named)
    spare = [name for name in named if name not in wanted]
    if missing or wrong:
        first = f"it lacks {missing[0]}" if missing else ""
        if wrong:
            shapes = [tuple(values[wrong[0]].shape) for values in (named, wanted)]
            first = f"{wrong[0]} is {shapes[0]} where the network has {shapes[1]}"
        counts = f"{len(missing)} parameters missing, {len(wrong)} of another shape, {len(spare)} spare"
        raise ValueError(f"{first} ({', '.join((counts, *notes))})")
    used = {name.split(".")[0] for name in wanted}
    inside = [name for name in spare if name.split(".")[0] in used]
    if inside and not ignore_extra:
        raise ValueError(f"it has parameters the network lacks, {_some(inside)}: --ignore_extra leaves them "
                         "out")
    if inside:
        notes.append(f"{len(inside)} parameters that the network lacks left out: {_some(inside)}")
    if blocks := sorted({name.split(".")[0] for name in spare} - used):
        notes.append(f"{len(spare) - len(inside)} parameters of unused blocks left out: {', '.join(blocks)}")
    model.load_state_dict({name: named[name] for name in wanted if name in named}, strict=False)
