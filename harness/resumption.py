"""What a run was started with, read from its config.json, and what may differ where it goes on."""
import dataclasses
import inspect
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from harness.errors import UserError

MAY_CHANGE_ON_RESUME = {"resume", "epochs", "data_dir", "device", "compile", "graphs", "max_batches", "shard",
                        "stop_on_collapse", "stop_after_minutes"}

OFF_BEFORE = {"max_grad_norm": 0.0}  # what a run did that is older than the field


class AnyConfig(Protocol):
    """A dataclass whose fields are the flags of a script."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


C = TypeVar("C", bound=AnyConfig)


def refuse_changes(base: AnyConfig, given: dict[str, Any]) -> None:
    """Raise UserError for flags that would make another run of the one that `base` was started with.

    MAY_CHANGE_ON_RESUME may differ, and the class's own `may_change_on_resume`.
    """
    free = {*MAY_CHANGE_ON_RESUME, *getattr(base, "may_change_on_resume", ())}
    fixed = [name for name in given if name not in free]
    changed = [f"--{name}" for name in fixed if given[name] != getattr(base, name)
               and not _is_moved(name, getattr(base, name), given[name])]
    if changed:
        raise UserError(f"--resume continues the run as it was: leave out {', '.join(changed)}")


def _is_moved(name: str, before: Any, now: Any) -> bool:
    """Whether a file or folder may be at another place; what is in it is compared where it is read."""
    if isinstance(before, tuple) and name == "model":
        return [Path(file).name for file in before] == [Path(file).name for file in now]
    if name == "dataset":
        return Path(now).is_dir()
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    if name in ("model", "arch"):
        return ".py:" in before and ".py:" in now and before.rpartition(":")[2] == now.rpartition(":")[2]
    return name in ("checkpoint", "extra_data")


def resumed(cls: type[C], folder: Path) -> C:
    """The Config that the run in `folder` was started with; a result's name stands for the record beside it.

    A field that is newer than the run has its default, and one line says so. A field that the script no
    longer has is left out.
    """
    folder = folder.with_suffix(".record") if folder.suffix == ".json" else folder
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError(f"it holds a {type(saved).__name__}, not settings")
    except FileNotFoundError:
        raise UserError(f"--resume {folder}: no run there (no config.json)") from None
    except (ValueError, OSError) as error:
        raise UserError(f"--resume {folder}: cannot read {path}: {error}") from None
    script = Path(inspect.getsourcefile(cls) or "").stem
    if saved.get("script") != script:
        raise UserError(f"--resume {folder}: that run is of {saved.get('script')}.py, not of {script}.py")
    if "fuse" in saved:
        saved.setdefault("attack_view", saved["fuse"])  # its name before it was one for any network
    fields = [field for field in fields_of(cls) if field.name in saved]
    newer = {field.name: OFF_BEFORE.get(field.name, field.default)
             for field in fields_of(cls) if field not in fields}
    if newer:
        shown = ", ".join(f"{name}, here {value}" for name, value in newer.items())
        print(f"note: {path} lacks {shown}", file=sys.stderr)
    if isinstance(saved.get("compile"), str):
        saved["compile"] = saved["compile"] == "on"  # as it was written when it had a third value, auto
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {name: newer[name] for name in OFF_BEFORE if name in newer}
    for field in fields:
        value = saved[field.name]
        if type(value) not in _json_types(hints[field.name]):
            shown = json.dumps(value)
            raise UserError(f"--resume {folder}: {field.name} in {path} is {shown}, which it cannot be")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _json_types(hint: Any) -> set[type]:
    """The types that a value of this type hint may have in a JSON file."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return {kind for part in typing.get_args(hint) for kind in _json_types(part)}
    if origin is typing.Literal:
        return {type(choice) for choice in typing.get_args(hint)}
    return {float: {float, int}, tuple: {list}}.get(origin or hint, {hint})


def fields_of(cls: type[AnyConfig]) -> list[dataclasses.Field]:
    """The fields of `cls`, its own first, then those that it inherits, class by class."""
    classes = [vars(part).get("__annotations__", {}) for part in cls.__mro__]
    first = {field.name: next(k for k, names in enumerate(classes) if field.name in names)
             for field in dataclasses.fields(cls)}
    return sorted(dataclasses.fields(cls), key=lambda field: first[field.name])
