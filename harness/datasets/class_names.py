"""Which output of a network is which class of an image folder."""
import torch

from harness.datasets.split import Split
from harness.errors import UserError

SHOWN = 5  # class names in a message


def match_classes(split: Split, classes: tuple[str, ...], known: tuple[str, ...] | None, num_outputs: int,
                  ) -> tuple[Split, tuple[str, ...], str | None]:
    """The split with the network's numbers as its labels, the classes by that number, and a note on how.

    classes: those of the data; known: those that the network was trained on, None where nothing says. By
    name; else by number, where every name is a whole number below `num_outputs` (names such as "3" or
    "3 - three"); else, for a network that says nothing and has one output for each class, in the order of
    the names. Raises UserError where none of these fits.
    """
    if known is not None and classes == known:
        return split, classes, None
    if known is not None and set(classes) <= set(known):
        places = [known.index(name) for name in classes]
        return _relabelled(split, places), known, _said(classes, places, "by name")
    numbers = [_number(name) for name in classes]
    numbered = known is None or all(_number(name) == k for k, name in enumerate(known))
    if numbered and len(set(numbers)) == len(numbers) and all(0 <= k < num_outputs for k in numbers):
        names = known or tuple(map(str, range(num_outputs)))
        note = None if numbers == list(range(num_outputs)) else _said(classes, numbers, "by number")
        return _relabelled(split, numbers), names, note
    if known is None and len(classes) == num_outputs:
        return split, classes, _said(classes, list(range(num_outputs)), "by the order of their names")
    theirs = f"{num_outputs} outputs" if known is None else f"the classes {_list(known)}"
    raise UserError(f"the images have the classes {_list(classes)}, the network {theirs}: name the folders "
                    "as the network's classes, or after their numbers")


def _number(name: str) -> int:
    """The number that a class is called by; -1 for none."""
    first = name.split(" - ")[0].strip()  # torchvision calls MNIST's classes "0 - zero"
    return int(first) if first.isdecimal() else -1


def _relabelled(split: Split, places: list[int]) -> Split:
    return Split(split.images, torch.tensor(places)[split.labels], split.index)


def _list(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _said(classes: tuple[str, ...], places: list[int], how: str) -> str:
    pairs = [f"{name} = {place}" for name, place in zip(classes, places)]
    return f"note: classes matched {how}: {_list(tuple(pairs))}"
