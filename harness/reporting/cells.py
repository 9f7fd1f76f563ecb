"""What the tables of the pages are made of: result files, and numbers as text."""
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
NETWORKS = {"lenet": "LeNet", "small_cnn": "SmallCNN", "resnet18": "ResNet-18",
            "resnet18_w16": "ResNet-18, width 16", "wrn34_10": "WRN-34-10",
            "wrn28_10": "WRN-28-10"}

# Student's t at 97.5 % with 1 to 9 degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def load(path: str | Path) -> dict:
    """A JSON file under results/."""
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def rows_of(*names: str) -> list[dict]:
    """The rows of these files of results/speed, one after the other."""
    return [row for name in names for row in load(f"speed/{name}.json")["rows"]]


def number(value: float, digits: int = 2) -> str:
    return f"{value:,.{digits}f}"


def numbers(row: dict, **digits: int) -> list[str]:
    """The values of these names in a row, each with so many digits."""
    return [number(row[name], count) for name, count in digits.items()]


def pair(ours: float, theirs: float, digits: int = 1) -> str:
    return f"{number(ours, digits)} / {number(theirs, digits)}"


def spread(values: Iterable[float]) -> str:
    """Mean ± sample standard deviation; of one value, the value."""
    values = list(values)
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.mean(values))} ± {number(statistics.stdev(values))}"


def difference(values: list[float], images: float) -> tuple[float, float]:
    """Mean of one to ten seeds' differences on the same test images, and half its 95 % interval.

    images: half the interval that the images leave open (`paired_half_width`). With several seeds Student's
    interval over them is added to it in squares. It cannot be left out: all seeds share the images' luck.
    """
    if len(values) == 1:
        return values[0], images
    seeds = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), math.hypot(seeds, images)


def extremes(values: list[float]) -> str:
    """Minimum / median / maximum; of no values, nothing."""
    found = (min(values), statistics.median(values), max(values)) if values else ()
    return " / ".join(number(value, 1) for value in found)
