"""Turn the Config at the top of a script into its command line, and a user's mistake into one line."""
import argparse
import dataclasses
import difflib
import inspect
import io
import math
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from attacks.memory import out_of_memory
from harness.errors import Collapsed, RunError, UserError
from harness.folder import forget
from harness.resumption import AnyConfig, fields_of, refuse_changes, resumed
from harness.signals import ended_by_signals
from harness.training.options import RunOptions
from harness.training.seeds import one_a_seed

# What a field of this name may hold, in any Config: (smallest, largest).
LIMITS = {
    "epochs": (1, math.inf), "batch_size": (1, math.inf), "num_steps": (0, math.inf),
    "val_num_steps": (0, math.inf), "num_restarts": (1, math.inf), "num_examples": (1, math.inf),
    "max_batches": (1, math.inf), "val_size": (0, math.inf), "epsilon": (0, 1), "step_size": (0, 1),
    "val_step_size": (0, 1), "alpha": (0, math.inf), "alphas": (0, math.inf), "beta": (0, math.inf),
    "lr": (0, math.inf), "momentum": (0, 1), "weight_decay": (0, math.inf), "lr_drop_factor": (0, 1),
    "lr_drop_after": (0, math.inf), "epsilon_warmup_epochs": (0, math.inf), "max_grad_norm": (0, math.inf),
    "lr_warmup_epochs": (0, math.inf), "crop_padding": (0, math.inf), "seed": (0, 2**31 - 1),
    "seeds": (0, 2**31 - 1), "ema_decay": (0, 0.999999), "burn_in_epochs": (0, math.inf),
    "inv_lambda": (0, math.inf), "gamma": (0, math.inf), "margin_alpha": (0, math.inf),
    "extra_fraction": (0, 1),
    "n_points": (1, math.inf), "num_starts": (1, math.inf), "num_resamples": (100, 10**6),
    "rel_gap": (1e-6, 0.5), "time_limit": (0.1, math.inf), "confidence": (0.5, 0.9999), "epsilons": (0, 1),
    "thresholds_linf": (0, math.inf), "thresholds_l2": (0, math.inf), "thresholds_l1": (0, math.inf),
    "lr_scales": (0, math.inf), "gairat_lambda": (-math.inf, math.inf), "mail_slope": (0, math.inf),
    "mail_bias": (-1, 1), "num_replays": (1, math.inf), "num_passes": (1, math.inf),
    "num_spsa_examples": (1, math.inf), "kl_budgets": (0, math.inf), "mean_budgets": (0, math.inf),
    "orders": (1, 64), "stop_after_minutes": (0, math.inf),
}


C = TypeVar("C", bound=AnyConfig)
R = TypeVar("R", bound=RunOptions)


def run_script(main: Callable[[C], object], cls: type[C], recipes: dict[str, C] | None = None,
               sources: dict[str, dict[str, str]] | None = None) -> None:
    """Parse the command line into `cls`, call main(config), and end with an exit code.

    0: well; 1: failed under way; 2: refused before the work; 130: Ctrl-C; 143: a signal. `--seeds` calls
    main once with each seed, in a folder of its own. `--dry_run` prints every value and its source instead
    of calling main. sources: recipe name -> field -> source, for the fields that the recipe sets.
    """
    name = Path(sys.argv[0]).name
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that are not UTF-8, terminals that know ASCII alone
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"note: {' '.join(str(message).split())}\n"
    try:
        with ended_by_signals():
            config, given, recipe = _parse(cls, None, recipes)
            if getattr(config, "dry_run", False):
                _print_values(config, given, (sources or {}).get(recipe or "", {}))
            elif isinstance(config, RunOptions) and config.seeds:
                _each_seed(main, config, name)
            else:
                main(config)
    except UserError as error:
        _fail(name, error, 2)
    except RunError as error:
        _fail(name, error, 1)
    except OSError as error:  # a full disk, or a folder that went away
        place = f": {error.filename}" if error.filename else ""
        _fail(name, f"{error.strerror or error}{place}; what was saved before is intact", 1)
    except KeyboardInterrupt:
        _fail(name, "interrupted", 130)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        _fail(name, "the accelerator's memory is full: try a smaller --batch_size", 1)
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        _leave()


def _each_seed(main: Callable[[R], object], config: R, name: str) -> None:
    """main(config) with each of its seeds.  Raises Collapsed at the end if some of them collapsed."""
    collapsed = []
    for one in one_a_seed(config, Path(name).stem):
        try:
            main(one)
        except UserError:
            if one.out_dir and not config.resume:
                forget(Path(one.out_dir).parent)
            raise
        except Collapsed as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            collapsed.append(one.seed)
    if collapsed:
        named = " ".join(map(str, collapsed))
        raise Collapsed(f"{len(collapsed)} of {len(config.seeds)} seeds collapsed: {named}")


def _leave() -> None:
    """End a process of torchrun, its work done, without waiting: another one's may take half an hour more.

    Without the interpreter's own end: gloo's threads may still hold tensors. Freeing these aborts about one
    process in some tens of runs (pytorch pull request 179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _fail(name: str, message: object, code: int) -> NoReturn:
    print(f"{name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        os._exit(code)  # under torchrun the other processes may wait for this one in a collective
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    """Errors become one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the message, and for an unknown flag with those that come close."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[1], flags, 1)
            message = f"unknown flag {unknown[1]}" + (f": did you mean {close[0]}?" if close else "")
        recipe = re.match(r"argument --recipe: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if recipe:
            names = re.findall(r"[\w-]+", recipe[2])
            close = difflib.get_close_matches(recipe[1], names, 3, 0)
            near = f"did you mean {' or '.join(close)}?"
            choice = near if len(names) > 12 else f"choose one of {', '.join(names)}"
            message = f"unknown recipe '{recipe[1]}': {choice}"
        raise UserError(f"{message} (--help lists the flags)")


def parse_config(cls: type[C], argv: list[str] | None = None, recipes: dict[str, C] | None = None) -> C:
    """Build the dataclass `cls` from `--field value` flags over the recipe, the resumed run or the defaults.

    A field's trailing comment is its help. Floats accept `8/255`; a tuple takes several values; a Literal
    lists its choices. `--recipe NAME` picks an entry of `recipes`. With `--resume DIR` the values are those
    of DIR/config.json, and a flag that would change them is refused, unless it changes nothing of what was
    done so far (MAY_CHANGE_ON_RESUME, or the class's own `may_change_on_resume`). Raises UserError for
    whatever does not fit.
    """
    return _parse(cls, argv, recipes)[0]


def _parse(cls: type[C], argv: list[str] | None,
           recipes: dict[str, C] | None) -> tuple[C, dict[str, Any], str | None]:
    """The config, the flags that were given, and the recipe's name."""
    parser = _build_parser(cls, recipes)
    given = vars(parser.parse_args([_spelling(word) for word in (sys.argv[1:] if argv is None else argv)]))
    recipe = given.pop("recipe", None)
    given = {name: _home(value) for name, value in given.items()}
    base = recipes[recipe] if recipes and recipe else cls()
    if given.get("resume"):
        if recipe:
            raise UserError("--resume continues a run with its own recipe: leave --recipe out")
        base = resumed(cls, Path(given["resume"]))
        refuse_changes(base, given)
    config = dataclasses.replace(base, **given)
    check_limits(config)
    return config, given, recipe


def _home(value: Any) -> Any:
    """A value of the command line: lists as tuples, `~` as the user's folder, as in `--out_dir=~/x`."""
    if isinstance(value, list):
        return tuple(map(_home, value))
    if not isinstance(value, str):
        return value
    kind, colon, path = value.partition(":~")
    return f"{kind}:{os.path.expanduser('~' + path)}" if colon else os.path.expanduser(value)


def layer(source: str, **values: Any) -> tuple[str, dict[str, Any]]:
    """Values of a recipe and where they come from, for `compose`."""
    return source, values


def compose(cls: type[C], layers: dict[str, tuple]) -> tuple[dict[str, C], dict[str, dict[str, str]]]:
    """Recipes out of layers: name -> (layer, ...), a later layer over an earlier one.

    Returns the recipes, name -> config, and where their values come from, name -> field -> source.
    """
    recipes, sources = {}, {}
    for name, parts in layers.items():
        recipes[name] = cls(**{field: value for _, values in parts for field, value in values.items()})
        sources[name] = {field: source for source, values in parts for field in values}
    return recipes, sources


def _print_values(config: AnyConfig, given: dict[str, Any], sources: dict[str, str]) -> None:
    """One line per field: name, value and source, written at once: the reader of a pipe may leave early.

    The source is the command line, the recipe, or what stands in brackets in the field's comment.
    """
    comments, lines = _comments(type(config)), []
    for field in fields_of(type(config)):
        bracket = re.search(r"\[([^\[\]]+)\]$", comments.get(field.name, ""))
        default = bracket[1] if bracket else "default"
        source = "command line" if field.name in given else sources.get(field.name, default)
        value = getattr(config, field.name)
        shown = f"{value:.6g}" if isinstance(value, float) else _words(value)
        lines.append(f"{field.name:<22} {shown:<14} {source}\n")
    sys.stdout.write("".join(lines))


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_limits(config: AnyConfig) -> None:
    """Raise UserError for the first field outside its LIMITS, or not finite."""
    for field in dataclasses.fields(config):
        low, high = LIMITS.get(field.name, (-math.inf, math.inf))
        if field.name in ("epsilon", "step_size") and getattr(config, "norm", "linf") != "linf":
            high = math.inf  # a ball of l_2 may be larger than a pixel's range
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                continue
            if not (low <= number <= high) or not math.isfinite(number):
                bounds = f"finite and at least {low}" if high == math.inf else f"between {low} and {high}"
                raise UserError(f"--{field.name} must be {bounds}, not {number}")


def number(text: str) -> float:
    """Parse '0.1', '1e-3' or '8/255'."""
    try:
        return float(Fraction(text.replace(" ", ""))) if "/" in text else float(text)
    except ZeroDivisionError:
        raise ValueError(f"division by zero in {text}") from None


def _spelling(word: str) -> str:
    """`--num-steps` as `--num_steps`; `--no-flip` and `--no_flip` as argparse's own `--no-flip`."""
    if not re.match(r"--[a-z]", word):
        return word
    flag, equals, value = word[2:].partition("=")
    return "--" + re.sub("^no_", "no-", flag.replace("-", "_")) + equals + value


def _comments(cls: type) -> dict[str, str]:
    """The trailing comment of each field, of the inherited ones too."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if dataclasses.is_dataclass(part):
            lines = re.findall(r"^\s+(\w+):[^#\n]*#\s*(.+)$", inspect.getsource(part), re.MULTILINE)
            found |= dict(lines)
    return found


def _build_parser(cls: type[AnyConfig], recipes: dict | None) -> _Parser:
    comments = _comments(cls)
    parser = _Parser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    if recipes:
        parser.add_argument("--recipe", choices=list(recipes), metavar="NAME",
                            help="a named set of hyperparameters at the top of the script; any other flag "
                                 f"overrides it (default: the values below): {', '.join(recipes)}")
    hints = typing.get_type_hints(cls)
    for field in fields_of(cls):
        default = _words(field.default) if field.default is not None else ""
        text = f"{comments.get(field.name, '')} (default: {default or 'none'})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", help=text, **_options(hints[field.name]))
    return parser


def _options(kind: Any) -> dict[str, Any]:
    """argparse options for a type hint: a plain type, Literal, tuple[T, ...], bool or T | None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        return {**_options(typing.get_args(kind)[0]), "nargs": "*"}
    return {"type": number if kind is float else kind, "metavar": {float: "X", int: "N"}.get(kind, "NAME")}
