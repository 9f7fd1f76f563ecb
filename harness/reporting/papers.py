"""The papers' tables: each number, and which of our rows it is to be compared with."""
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.reporting.tables import Row

PAPER = Path(__file__).resolve().parents[2] / "results" / "paper"


@dataclass(frozen=True)
class Target:
    """One number of a paper's table, and which of our rows it is to be compared with."""

    label: str                                       # the defense
    fields: tuple[tuple[str, float], ...]            # what its training must have set
    defense: str                                     # the defense as shown, with what the table varies
    dataset: str
    column: str
    mean: float
    std: float | None

    def fits(self, row: Row, setting: dict) -> bool:
        """Whether the row is this defense on this data set, under an attack of this radius, on a network of this table."""
        dataset = re.sub("[-_]", "", Path(str(row.protocol["dataset"])).name.lower())
        return (row.label == self.label and all(same(row.settings.get(name), value) for name, value in self.fields)
                and re.match(self.dataset.replace("-", "") + r"(?!\d)", dataset) is not None
                and row.protocol.get("norm") == "linf" and same(row.protocol.get("epsilon"), setting["epsilon"], tolerance=0.02)
                and re.match(setting["networks"], str(row.settings["model"])) is not None
                and bool(row.settings.get("extra_data")) == setting.get("generated", False))

    def source(self, row: Row) -> str:
        """Our column for this number: an A_rob of 20 steps is a PGD20, one of 100 steps of 1/255 a PGD100."""
        steps, step_size = row.protocol.get("num_steps"), row.protocol.get("step_size")
        as_attack = {"PGD20": steps == 20, "PGD100": steps == 100 and same(step_size, 1 / 255, tolerance=0.02)}
        return "A_rob" if as_attack.get(self.column) and not row.values(self.column) else self.column


def same(left: object, right: object, tolerance: float = 1e-6) -> bool:
    """Equality, of numbers up to a relative tolerance."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return abs(left - right) <= tolerance * max(abs(left), abs(right))
    return left == right


def paper_tables() -> dict[str, tuple[dict, list[Target]]]:
    """name -> (setting, numbers column by column), in the papers' order."""
    settings, tables = json.loads((PAPER / "settings.json").read_text(encoding="utf-8")), {}
    for file in sorted(PAPER.glob("*.csv"), key=lambda file: (file.stem.startswith("vir"), len(file.stem), file.stem)):
        setting = settings["common"][file.stem.split("_")[0]] | settings[file.stem]
        with file.open(encoding="utf-8", newline="") as lines:
            targets = list(dict.fromkeys(target for line in csv.DictReader(lines) for target in _targets(line, setting)))
        metrics = [(target.dataset, target.column.split()[0]) for target in targets]
        place = {target: (metrics.index(metric), target.column) for target, metric in zip(targets, metrics)}
        tables[file.stem] = setting, sorted(targets, key=place.get)
    return tables


def _targets(line: dict[str, str], setting: dict) -> Iterator[Target]:
    """The numbers in one line of a paper's table."""
    who = _defense(line, setting)
    for name, value in line.items():
        column = name.removesuffix("_mean")
        if column == name and name not in ("A_nat", "A_rob", "A_sa", "A_tr"):
            continue
        dataset = next((one for one in setting["test_images"] if column.startswith(f"{one.upper()}_")), None)
        column = {"NATURAL": "A_nat"}.get(bare := column.removeprefix(f"{dataset}_".upper()), bare)
        column += f" {float(line['alpha_test']):g}" if column in ("A_sa", "A_tr") else ""
        yield Target(*who, dataset or next(iter(setting["test_images"])), column, float(value),
                     float(line[f"{name.removesuffix('_mean')}_std"]) if name.endswith("_mean") else None)


def _defense(line: dict[str, str], setting: dict) -> tuple[str, tuple[tuple[str, float], ...], str]:
    """(our label, what the training must have set, what is shown) of a line of a paper's table."""
    printed, base = line.get("defense", line.get("reweighting", "")), setting.get("base", "")
    if "defense" in line:
        label = printed.replace("PGD", "AT").replace("+ours", f"+margin (alpha {float(line.get('alpha_train') or 0):g})")
    else:
        label = base if printed.startswith("none") else f"VIR-{base}" + (f", {printed} only" if printed in ("S_v", "S_d") else "")
    varied = {name: float(line[name]) for name in ("alpha", "beta", "gamma") if name in line}
    fields = setting["fields"].get(label, {}) | varied if "fields" in setting else {}
    return label, tuple(fields.items()), ", ".join([label, *(f"{name} {value:g}" for name, value in varied.items())])
