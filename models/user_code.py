"""The user's own code: a file and whatever it imports, apart from our modules and from any other user's file.

Each file is loaded as a member of a package of its own, `user_code_0`, whose modules are the file's
neighbours: in their code `import models` means `user_code_0.models` if their folder has it, at import and
ever after. No entry of sys.modules is replaced, so their names never answer to our code or to an installed
package.
"""
import argparse
import builtins
import importlib
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NoReturn

_OURS = Path(__file__).resolve().parents[1]
_NUMBERS = itertools.count()


def load(path: Path) -> ModuleType:
    """The module in a user's file, imported anew.

    Raises whatever the file raises, and ValueError if it ends the program.
    """
    code = _UserCode(path.resolve())
    sys.meta_path.insert(0, code)
    importlib.invalidate_caches()  # the file may have been written a moment ago
    error, argparse.ArgumentParser.error = argparse.ArgumentParser.error, _leave
    try:
        return importlib.import_module(code.main)
    except SystemExit:
        raise ValueError(f"{path.name} ends the program at import: guard what runs there with "
                         "if __name__ == '__main__'") from None
    finally:
        argparse.ArgumentParser.error = error


def _leave(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """The end of a parser of theirs that meets our command line: without its usage, which is not ours."""
    raise SystemExit(2)


def plain(error: BaseException) -> str:
    """What an error of the user's code says, in one line, with the names of modules that the user knows."""
    text = " ".join(re.sub(r"\buser_code_\d+\.", "", str(error)).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


class _UserCode:
    """The package in which one file is loaded, and what `import` means to the modules in it.

    A name is looked up in the file's folder first. The folder around it (around the whole package, if the
    file is in one) and what their code adds to sys.path count too, for names to which nothing installed
    answers.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder, around = path, path.parent, path.parent.parent
        while (around / "__init__.py").is_file():
            around = around.parent
        self.package = f"user_code_{next(_NUMBERS)}"
        self.installed = list(sys.path)
        spec = ModuleSpec(self.package, None, is_package=True)
        spec.submodule_search_locations = self.search = [str(self.folder), str(around)]
        sys.modules[self.package] = module_from_spec(spec)
        parts = self.folder.relative_to(around).parts
        if not (self.folder / "__init__.py").is_file() or "." in "".join(parts):
            parts = ()  # no package, or no name of one
        if not (parts and path.stem == "__init__"):
            parts += (path.stem.replace(".", "_"),)
        self.main = ".".join((self.package, *parts))
        self.builtins = {**vars(builtins), "__import__": self._import}

    def find_spec(self, fullname: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        """Where a module of the package is: what Python asks the entries of sys.meta_path."""
        if not fullname.startswith(f"{self.package}."):
            return None
        spec = (spec_from_file_location(fullname, self.path) if fullname == self.main
                else PathFinder.find_spec(fullname, path))
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path, self.builtins)
        return spec

    def _import(self, name: str, globals: Mapping | None = None, locals: Mapping | None = None,
                fromlist: Sequence[str] = (), level: int = 0) -> ModuleType:
        top = name.partition(".")[0]
        importer = globals or {}
        is_itself = importer.get("__name__") == f"{self.package}.{top}" and "__path__" not in importer
        if level == 0 and not is_itself and self._has(top):  # in their torch.py, torch is the installed one
            module = builtins.__import__(f"{self.package}.{name}", globals, locals, fromlist)
            return module if fromlist else sys.modules[f"{self.package}.{top}"]
        module = builtins.__import__(name, globals, locals, fromlist, level)
        if module is importlib:
            module = ModuleType("importlib")
            vars(module).update(vars(importlib), import_module=self._import_module)
        return module

    def _import_module(self, name: str, package: str | None = None) -> ModuleType:
        inside = not name.startswith(".") and self._has(name.partition(".")[0])
        return importlib.import_module(f"{self.package}.{name}" if inside else name, package)

    def _has(self, name: str) -> bool:
        """Whether their code means a module of its own by the top-level `name`."""
        self.search += [path for path in sys.path if path not in self.installed + self.search]
        spec = PathFinder.find_spec(f"{self.package}.{name}", self.search)
        if spec is None or _is_ours(spec, name):
            return False
        if spec.origin and self.folder in Path(spec.origin).parents:
            return True
        path, sys.path = sys.path, self.installed
        try:
            other = find_spec(name)
        except ValueError:  # a module without a spec
            return False
        finally:
            sys.path = path
        return other is None or other.origin is None or _is_ours(other, name)


class _Loader(SourceFileLoader):
    """Runs a module with the `import` of its package."""

    def __init__(self, fullname: str, path: str, builtins: dict) -> None:
        super().__init__(fullname, path)
        self.builtins = builtins

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = self.builtins
        super().exec_module(module)


def _is_ours(spec: ModuleSpec, name: str) -> bool:
    files = (_OURS / f"{name}.py", _OURS / name / "__init__.py")
    return spec.origin is not None and Path(spec.origin).resolve() in files
