"""The papers' tables: each number, which of our rows it is to be compared with, and the two side by side."""
import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.reporting.tables import Row, difference, markdown, setting_column, shown

PAPER = Path(__file__).resolve().parents[2] / "results" / "paper"


@dataclass(frozen=True)
class Target:
    """One number of a paper's table, and which of our rows it is to be compared with."""

    label: str                             # the defense
    fields: tuple[tuple[str, float], ...]  # what its training must have set
    defense: str                           # the defense as shown, with what the table varies
    dataset: str
    column: str
    mean: float
    std: float | None

    def fits(self, row: Row, setting: dict) -> bool:
        """Whether the row is this defense on this data set, attacked at this radius, on such a network."""
        dataset = re.sub("[-_]", "", Path(str(row.protocol["dataset"])).name.lower())
        return (row.label == self.label
                and all(same(row.settings.get(name), value) for name, value in self.fields)
                and re.match(self.dataset.replace("-", "") + r"(?!\d)", dataset) is not None
                and row.protocol.get("norm") == "linf"
                and same(row.protocol.get("epsilon"), setting["epsilon"], tolerance=0.02)
                and re.match(setting["networks"], str(row.settings["model"])) is not None
                and bool(row.settings.get("extra_data")) == setting.get("generated", False))

    def source(self, row: Row) -> str:
        """Our column for this number: an A_rob of 20 steps is a PGD20, one of 100 steps of 1/255 a PGD100."""
        steps, step_size = row.protocol.get("num_steps"), row.protocol.get("step_size")
        as_attack = {"PGD20": steps == 20,
                     "PGD100": steps == 100 and same(step_size, 1 / 255, tolerance=0.02)}
        return "A_rob" if as_attack.get(self.column) and not row.values(self.column) else self.column


def same(left: object, right: object, tolerance: float = 1e-6) -> bool:
    """Equality, of numbers up to a relative tolerance."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return abs(left - right) <= tolerance * max(abs(left), abs(right))
    return left == right


# ---- reading -----------------------------------------------------------------------------------------------

def paper_tables() -> dict[str, tuple[dict, list[Target]]]:
    """name -> (setting, numbers column by column), in the papers' order."""
    settings, tables = json.loads((PAPER / "settings.json").read_text(encoding="utf-8")), {}
    names = (file.stem for file in PAPER.glob("*.csv"))
    for name in sorted(names, key=lambda name: (name.startswith("vir"), len(name), name)):
        setting = settings["common"][name.split("_")[0]] | settings[name]
        with (PAPER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            found = (target for line in csv.DictReader(file) for target in _targets(line, setting))
            targets = list(dict.fromkeys(found))
        metrics = [(target.dataset, target.column.split()[0]) for target in targets]
        place = {target: (metrics.index(metric), target.column) for target, metric in zip(targets, metrics)}
        tables[name] = setting, sorted(targets, key=place.__getitem__)
    return tables


def _targets(line: dict[str, str], setting: dict) -> Iterator[Target]:
    """The numbers in one line of a paper's table."""
    who = _defense(line, setting)
    for name, value in line.items():
        column = name.removesuffix("_mean")
        std = float(line[f"{column}_std"]) if column != name else None
        if std is None and name not in ("A_nat", "A_rob", "A_sa", "A_tr"):
            continue
        datasets = list(setting["test_images"])
        dataset = next((one for one in datasets if column.startswith(f"{one.upper()}_")), datasets[0])
        column = column.removeprefix(f"{dataset}_".upper()).replace("NATURAL", "A_nat")
        if column in ("A_sa", "A_tr"):
            column += f" {float(line['alpha_test']):g}"
        yield Target(*who, dataset, column, float(value), std)


def _defense(line: dict[str, str], setting: dict) -> tuple[str, tuple[tuple[str, float], ...], str]:
    """(our label, what the training must have set, what is shown) of a line of a paper's table."""
    if "defense" in line:
        margin = f"+margin (alpha {float(line.get('alpha_train') or 0):g})"
        label = line["defense"].replace("PGD", "AT").replace("+ours", margin)
    else:
        base, printed = setting["base"], line.get("reweighting", "")
        terms = f", {printed} only" if printed in ("S_v", "S_d") else ""
        label = base if printed.startswith("none") else f"VIR-{base}{terms}"
    varied = {name: float(line[name]) for name in ("alpha", "beta", "gamma") if name in line}
    fields = setting["fields"].get(label, {}) | varied if "fields" in setting else {}
    title = ", ".join([label, *(f"{name} {value:g}" for name, value in varied.items())])
    return label, tuple(fields.items()), title


# ---- side by side ------------------------------------------------------------------------------------------

def paper_section(name: str, setting: dict, targets: list[Target], rows: list[Row]) -> str | None:
    """A paper's table with ours, a line a number, and in what settings differ; None if no result fits."""
    pairs = [(target, row) for target in targets for row in rows if target.fits(row, setting)]
    if not any(row.values(target.source(row)) for target, row in pairs):
        return None
    ours = list({id(row): row for _, row in pairs}.values())
    varied = {field for target in targets for field, _ in target.fields}
    apart = dict(zip(map(id, ours), setting_column(ours, without=varied)))
    lines = []
    for target, row in pairs:
        source = target.source(row)
        printed = f"{target.mean:.2f}" + (f" ± {target.std:.2f}" if target.std is not None else "")
        metric = f"{target.dataset} {target.column}" if len(setting["test_images"]) > 1 else target.column
        numbers = row.cell(source), printed, difference(row.values(source), target.mean)
        lines.append([metric, target.defense, apart[id(row)], *numbers])
    table = markdown(["metric", "defense", "setting", "ours", "paper", "ours - paper"], lines, left=3)
    there = {line[1] for line in lines}
    absent = [one for one in dict.fromkeys(target.defense for target in targets) if one not in there]
    missing = f"No result of ours: {'; '.join(absent)}." if absent else ""
    parts = f"## {setting['title']} ({name})", table, differences(pairs, setting), setting["remark"], missing
    return "\n\n".join(filter(None, parts))


def differences(pairs: list[tuple[Target, Row]], setting: dict) -> str:
    """In what our rows differ from the paper's setting, as a sentence."""
    found = defaultdict(list)  # name -> (ours, the paper's, defense, whether they differ)
    for target, row in pairs:
        for name, mine, theirs in compared(target, row, setting) if row.values(target.source(row)) else ():
            printed = "not stated" if theirs is None else shown(theirs)
            found[name].append((shown(mine), printed, target.label, not same(mine, theirs)))
    parts = []
    for name, entries in found.items():
        everyone, values = {who for _, _, who, _ in entries}, []
        for value in dict.fromkeys(mine for mine, *_ in entries):
            whose = dict.fromkeys(who for mine, _, who, differs in entries if mine == value and differs)
            values.append(value + (f" for {', '.join(whose)}" if whose and whose.keys() != everyone else ""))
        if any(differs for *_, differs in entries):
            printed = ", ".join(dict.fromkeys(theirs for _, theirs, *_ in entries))
            parts.append(f"{name} {', '.join(values)} (paper: {printed})")
    if not parts:
        return "Ours have the paper's setting, as far as it is compared."
    return f"Ours differ from the paper in: {'; '.join(parts)}."


def compared(target: Target, row: Row, setting: dict) -> Iterator[tuple[str, object, object]]:
    """(name, ours, the paper's) of what may differ between a row and the number it stands beside."""
    training, source, test = row.settings, target.source(row), setting["test"]
    tested = row.protocol | row.attack_settings(source)
    yield "data set", row.protocol["dataset"], target.dataset
    yield "network", training["model"], setting["model"]
    yield "epochs", training.get("stopped after epoch", training.get("epochs")), setting["epochs"]
    yield "attack steps in training", training.get("num_steps"), setting["num_steps"]
    if training.get("max_batches"):
        yield "batches an epoch", training["max_batches"], "all"
    if not same(training.get("epsilon"), setting["epsilon"], tolerance=0.02):
        yield "epsilon in training", training.get("epsilon"), setting["epsilon"]
    if (printed := setting["inv_lambda"].get(re.split("[+,]", target.label)[0])) is not None:
        yield "1/lambda", training.get("inv_lambda"), printed
    if "vir_norm" in training:
        yield "vir_norm", training["vir_norm"], "none"
    yield "test images", tested["num_examples"], setting["test_images"][target.dataset]
    yield "epsilon at test time", tested["epsilon"], setting["epsilon"]
    if source.startswith(("A_rob", "A_sa", "A_tr")):
        yield "attack steps at test time", tested.get("num_steps"), test["num_steps"]
        yield "step at test time", tested.get("step_size"), test["step_size"]
        yield "restarts", tested.get("num_restarts"), test["num_restarts"]
