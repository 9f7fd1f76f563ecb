"""The papers' tables with our numbers beside them, from any set of results: mean ± standard deviation over the seeds (number of seeds).

Reads the JSON files that the eval scripts write, joins those that differ in nothing but the seed of their training, and prints Markdown:
every table of Zeng et al. (AAAI 2021) and VIR that a result fits, with the paper's number and the difference (ours - paper), and then
all results; † marks a mean in which a network at chance counts.
A result fits a table by its defense, data set, epsilon and kind of network; in what else it differs is said below the table.
The papers' numbers and settings are in results/paper.

    python tables.py                                               # everything under results/ and runs/
    python tables.py results/mnist runs/vir                        # files, or folders searched for eval*.json; they come first
    python tables.py --table vir_table1                            # one of the papers' tables
    python tables.py --checkpoint_kind best --out tables.md        # best.pt instead of last.pt; to a file as well
"""
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.config import run_script
from harness.errors import UserError
from harness.evaluation.report import output_path
from harness.folder import write_text
from harness.reporting import tables
from harness.reporting.papers import Target, paper_tables, same

COLUMNS = ("A_nat", "A_rob", "A_sa", "A_tr", *tables.ATTACKS.values())  # in this order


@dataclass(frozen=True)
class Config:
    paths: tuple[str, ...] = ()                           # result files, or folders with eval*.json in them; default: results and runs
    table: str | None = None                              # one of the papers' tables; default: all that a result fits, then all results
    checkpoint_kind: Literal["last", "best", "last_ema", "best_ema"] = "last"  # which checkpoint of a run counts
    out: str | None = None                                # Markdown file to write too, never over another


def paper_section(name: str, setting: dict, targets: list[Target], rows: list[tables.Row]) -> str | None:
    """A paper's table with our numbers, one line a number, and below it in what the settings differ; None when no result fits."""
    pairs = [(target, row) for target in targets for row in rows if target.fits(row, setting)]
    if not any(row.values(target.source(row)) for target, row in pairs):
        return None
    ours = list({id(row): row for _, row in pairs}.values())
    apart = dict(zip(map(id, ours), tables.setting_column(ours, without={field for target in targets for field, _ in target.fields})))
    lines = []
    for target, row in pairs:
        values = row.values(target.source(row))
        printed = f"{target.mean:.2f}" + (f" ± {target.std:.2f}" if target.std is not None else "")
        metric = f"{target.dataset} {target.column}" if len(setting["test_images"]) > 1 else target.column
        numbers = row.cell(target.source(row)), printed, tables.difference(values, target.mean)
        lines.append([metric, target.defense, apart[id(row)], *numbers])
    table = tables.markdown(["metric", "defense", "setting", "ours", "paper", "ours - paper"], lines, left=3)
    absent = [defense for defense in dict.fromkeys(target.defense for target in targets) if defense not in {line[1] for line in lines}]
    below = [differences(pairs, setting), setting["remark"], f"No result of ours: {'; '.join(absent)}." if absent else ""]
    return f"## {setting['title']} ({name})\n\n{table}\n\n" + "\n\n".join(filter(None, below))


def differences(pairs: list[tuple[Target, tables.Row]], setting: dict) -> str:
    """In what our rows differ from the paper's setting, as a sentence."""
    found = defaultdict(list)  # name -> (ours, the paper's, defense, whether they differ)
    for target, row in pairs:
        for name, mine, theirs in compared(target, row, setting) if row.values(target.source(row)) else ():
            found[name].append((tables.shown(mine), "not stated" if theirs is None else tables.shown(theirs), target.label,
                                not same(mine, theirs)))
    parts = []
    for name, entries in found.items():
        everyone, values = {entry[2] for entry in entries}, []
        for value in dict.fromkeys(entry[0] for entry in entries):
            whose = dict.fromkeys(entry[2] for entry in entries if entry[0] == value and entry[3])
            values.append(value + (f" for {', '.join(whose)}" if whose and whose.keys() != everyone else ""))
        if any(entry[3] for entry in entries):
            parts.append(f"{name} {', '.join(values)} (paper: {', '.join(dict.fromkeys(entry[1] for entry in entries))})")
    return f"Ours differ from the paper in: {'; '.join(parts)}." if parts else "Ours have the paper's setting, as far as it is compared."


def compared(target: Target, row: tables.Row, setting: dict) -> Iterator[tuple[str, object, object]]:
    """(name, ours, the paper's) of what may differ between a row and the number it stands beside."""
    training, source = row.settings, target.source(row)
    tested = row.protocol | row.attack_settings(source)
    yield "data set", row.protocol["dataset"], target.dataset
    yield "network", training["model"], setting["model"]
    yield "epochs", training.get("stopped after epoch", training.get("epochs")), setting["epochs"]
    yield "attack steps in training", training.get("num_steps"), setting["num_steps"]
    if training.get("max_batches"):
        yield "batches an epoch", training["max_batches"], "all"
    if not same(training.get("epsilon"), setting["epsilon"], tolerance=0.02):
        yield "epsilon in training", training.get("epsilon"), setting["epsilon"]
    if (printed := setting["inv_lambda"].get(target.label.split("+")[0].split(",")[0])) is not None:
        yield "1/lambda", training.get("inv_lambda"), printed
    if "vir_norm" in training:
        yield "vir_norm", training["vir_norm"], "none"
    yield "test images", tested["num_examples"], setting["test_images"][target.dataset]
    yield "epsilon at test time", tested["epsilon"], setting["epsilon"]
    if source.startswith(("A_rob", "A_sa", "A_tr")):
        yield "attack steps at test time", tested.get("num_steps"), setting["test"]["num_steps"]
        yield "step at test time", tested.get("step_size"), setting["test"]["step_size"]
        yield "restarts", tested.get("num_restarts"), setting["test"]["num_restarts"]


def all_results(rows: list[tables.Row]) -> str:
    """Every row, one table a protocol."""
    text = "## All results"
    for protocol in {str(row.protocol): row.protocol for row in rows}.values():
        alike = [row for row in rows if row.protocol == protocol]
        columns = sorted({column for row in alike for result in row.results for column in result.measured}, key=_place)
        lines = [[row.label, tables.shown(row.settings["model"]), tables.shown(row.settings.get("epochs")), setting,
                  *(row.cell(column) for column in columns)]
                 for row, setting in zip(alike, tables.setting_column(alike, without=("model", "epochs")))]
        told = defaultdict(lambda: "-", {name: tables.shown(value) for name, value in protocol.items()})
        text += "\n\n{dataset}, {num_examples} test images; {norm}, epsilon {epsilon}; ".format_map(told)
        text += "PGD, {num_steps} steps of {step_size}, {start} start, restarts: {num_restarts}\n\n".format_map(told)
        text += tables.markdown(["defense", "network", "epochs", "setting", *columns], lines, left=4)
    return text


def _place(column: str) -> tuple[int, float, str]:
    """Where a column stands among the others."""
    metric, *alpha = column.split()
    known = metric in COLUMNS
    return COLUMNS.index(metric) if known else len(COLUMNS), float(alpha[0]) if known and alpha else 0.0, column


def main(cfg: Config) -> None:
    papers = paper_tables()
    if cfg.table and cfg.table not in papers:
        raise UserError(f"--table {cfg.table}: there is no such table; choose one of {', '.join(papers)}")
    out = output_path(cfg.out, Path(cfg.out), whole_run=False) if cfg.out else None
    paths = cfg.paths or [name for name in ("results", "runs") if Path(name).is_dir()]
    files = tables.find_files(paths)
    results, notes = tables.read_results(files, cfg.checkpoint_kind)
    if not results:
        reason = f"{len(notes)} of {len(files)} files left out, first: {notes[0]}" if notes else "no eval*.json there"
        raise UserError(f"no {cfg.checkpoint_kind} result in {', '.join(paths) or 'results and runs'} ({reason}): evaluate a run first "
                        "(python eval_mnist.py), or name other files or folders")
    rows, more = tables.group(results)
    chosen = [cfg.table] if cfg.table else papers
    sections = [section for name in chosen if (section := paper_section(name, *papers[name], rows))]
    if cfg.table and not sections:
        raise UserError(f"none of the {len(results)} results fits {cfg.table} by defense, data set, epsilon and network: "
                        f"{papers[cfg.table][0]['title']}")
    sections.insert(0, f"Accuracies in %: mean ± standard deviation over the seeds of training (number of seeds). {len(results)} results, "
                       f"{cfg.checkpoint_kind}.pt of each run.")
    sections += [] if cfg.table else [all_results(rows)]
    sections += ["## Notes\n\n" + "\n".join(f"- {note}" for note in notes + more)] if notes + more else []
    text = "\n\n".join(sections)
    print(text)
    if out:
        write_text(out, text + "\n")


def with_flag(words: list[str]) -> list[str]:
    """A command line whose leading words, those before the first flag, are the values of --paths."""
    return ["--paths", *words] if words and not words[0].startswith("-") else words


if __name__ == "__main__":
    sys.argv[1:] = with_flag(sys.argv[1:])
    run_script(main, Config)
