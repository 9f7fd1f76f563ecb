"""Results as tables: joined over seeds, and written as Markdown."""
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from harness.reporting.results import ATTACKS, CHANCE_MARK, Result

COLUMNS = ("A_nat", "A_rob", "A_sa", "A_tr", "A_sa_kl", *ATTACKS.values())  # in this order


@dataclass
class Row:
    """The results that differ in nothing but the seed of their training."""

    label: str
    settings: dict[str, Any]
    protocol: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    def values(self, column: str) -> list[float]:
        """What was measured in `column`, a value a result, by the attack settings of most results."""
        return [result.measured[column][0] for result in self._counted(column)]

    def cell(self, column: str) -> str:
        """The mean and the spread of `column`, with a mark where a result at chance is in them."""
        mark = f" {CHANCE_MARK}" if any(result.at_chance for result in self._counted(column)) else ""
        return mean_and_spread(self.values(column)) + mark

    def attack_settings(self, column: str) -> dict[str, Any]:
        """What the attack of `column` sets by itself, in most results."""
        found = [result.measured[column][1] for result in self.results if column in result.measured]
        return max(found, key=found.count, default={})

    def _counted(self, column: str) -> list[Result]:
        usual = self.attack_settings(column)
        return [result for result in self.results
                if column in result.measured and result.measured[column][1] == usual]


def group(results: Iterable[Result]) -> tuple[list[Row], list[str]]:
    """The results as rows, by label, and notes on seeds that occur twice and on attacks with own settings."""
    rows: dict[str, Row] = {}
    for result in results:
        key = json.dumps([result.label, result.settings, result.protocol], sort_keys=True)
        rows.setdefault(key, Row(result.label, result.settings, result.protocol)).results.append(result)
    notes = []
    for row in rows.values():
        for seed, count in Counter(result.seed for result in row.results).items():
            if count > 1:
                files = ", ".join(str(result.file) for result in row.results if result.seed == seed)
                notes.append(f"{row.label}: {count} trainings with seed {seed}, each counted: {files}")
        for column, count in Counter(name for result in row.results for name in result.measured).items():
            if left := count - len(row.values(column)):
                notes.append(f"{row.label}: {left} of the values of {column} left out, measured in another "
                             "way")

    def place(row: Row) -> tuple[bool, str, str]:
        return not row.settings.get("script"), row.label, str(row.settings.get("model"))

    return sorted(rows.values(), key=place), notes


def setting_column(rows: list[Row], *, without: Iterable[str] = ()) -> list[str]:
    """What tells each row from those of the same label, as text; for two scripts, in the fields of both."""
    facts = [row.settings | {f"test {name}": value for name, value in row.protocol.items()} for row in rows]
    texts = []
    for row, own in zip(rows, facts):
        alike = [those for other, those in zip(rows, facts) if other.label == row.label]
        one_script = len({those.get("script") for those in alike}) == 1
        names = dict.fromkeys(name for those in alike for name in those
                              if one_script or all(name in each for each in alike))
        apart = [name for name in names if name not in without
                 and len({str(those.get(name)) for those in alike}) > 1]
        texts.append(", ".join(f"{name} {shown(own.get(name))}" for name in apart))
    return texts


# ---- text --------------------------------------------------------------------------------------------------

def all_results(rows: list[Row]) -> str:
    """Every row, one table a protocol."""
    text = "## All results"
    for protocol in {str(row.protocol): row.protocol for row in rows}.values():
        alike = [row for row in rows if row.protocol == protocol]
        measured = {name for row in alike for result in row.results for name in result.measured}
        columns = sorted(measured, key=_place)
        lines = []
        for row, setting in zip(alike, setting_column(alike, without=("model", "epochs"))):
            facts = row.label, shown(row.settings["model"]), shown(row.settings.get("epochs")), setting
            lines.append([*facts, *(row.cell(column) for column in columns)])
        told = defaultdict(lambda: "-", {name: shown(value) for name, value in protocol.items()})
        text += ("\n\n{dataset}, {num_examples} test images; {norm}, epsilon {epsilon}; PGD, {num_steps} "
                 "steps of {step_size}, {start} start, restarts: {num_restarts}\n\n").format_map(told)
        text += markdown(["defense", "network", "epochs", "setting", *columns], lines, left=4)
    return text


def _place(column: str) -> tuple[int, float, str]:
    """Where a column stands among the others."""
    metric, *alpha = column.split()
    if metric not in COLUMNS:
        return len(COLUMNS), 0.0, column
    return COLUMNS.index(metric), float(alpha[0]) if alpha else 0.0, column


def shown(value: object) -> str:
    """A setting as text."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


def mean_and_spread(values: list[float]) -> str:
    """`mean ± sample standard deviation (number of values)`; `-` is the spread of one value, and nothing."""
    if not values:
        return "-"
    spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
    return f"{statistics.mean(values):.2f} ± {spread} ({len(values)})"


def difference(values: list[float], printed: float) -> str:
    """Our mean, as it is shown, minus the paper's number."""
    return f"{float(f'{statistics.mean(values):.2f}') - printed:+.2f}" if values else "-"


def markdown(head: list[str], rows: list[list[str]], left: int) -> str:
    """An aligned Markdown table without its empty columns, the first `left` ones to the left."""
    kept = [k for k in range(len(head)) if any(row[k] for row in rows)]
    lines = [[line[k].replace("|", "\\|") for k in kept] for line in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    sides = ["<" if k < left else ">" for k in kept]
    texts = ["| " + " | ".join(map("{:{}{}}".format, line, sides, widths)) + " |" for line in lines]
    rules = [f":{'-' * width}-" if side == "<" else f"-{'-' * width}:" for side, width in zip(sides, widths)]
    return "\n".join([texts[0], f"|{'|'.join(rules)}|", *texts[1:]])
