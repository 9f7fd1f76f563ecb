"""The papers' tables with our numbers beside them: mean ± standard deviation (number of seeds).

Reads the JSON files that the eval scripts write, joins those that differ in nothing but the seed of their
training, and prints Markdown: every table of Zeng et al. (AAAI 2021) and VIR that a result fits, with the
paper's number and the difference (ours - paper), and then all results; † marks a mean in which a network at
chance counts. A result fits a table by its defense, data set, epsilon and kind of network; in what else it
differs is said below the table. The papers' numbers and settings are in results/paper.

    python tables.py                                         # everything under results/ and runs/
    python tables.py results/mnist runs/vir                  # files, or folders searched for eval*.json
    python tables.py --table vir_table1                      # one of the papers' tables
    python tables.py --checkpoint_kind best --out tables.md  # best.pt instead of last.pt; to a file as well
    python tables.py results/mnist --figure sa.png           # A_sa against alpha and against the KL budget
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.config import run_script
from harness.errors import UserError
from harness.evaluation.report import output_path
from harness.folder import write_text
from harness.reporting.papers import paper_section, paper_tables
from harness.reporting.results import Result, find_files, read_results
from harness.reporting.strengths import draw_strengths
from harness.reporting.tables import all_results, group


@dataclass(frozen=True)
class Config:
    paths: tuple[str, ...] = ()  # result files, or folders with eval*.json; default: results and runs
    table: str | None = None     # one of the papers' tables; default: all that a result fits, and all results
    checkpoint_kind: Literal["last", "best", "last_ema", "best_ema"] = "last"  # which one of a run counts
    out: str | None = None       # Markdown file to write too, never over another
    figure: str | None = None    # PNG file for A_sa against the attacker's strength, never over another


def read(cfg: Config) -> tuple[list[Result], list[str]]:
    """The results that the command line names, and notes on what was left out."""
    paths = cfg.paths or [name for name in ("results", "runs") if Path(name).is_dir()]
    files = find_files(paths)
    results, notes = read_results(files, cfg.checkpoint_kind)
    if not results:
        reason = "no eval*.json there"
        if notes:
            reason = f"{len(notes)} of {len(files)} files left out, first: {notes[0]}"
        where = ", ".join(paths) or "results and runs"
        raise UserError(f"no {cfg.checkpoint_kind} result in {where} ({reason}): evaluate a run first "
                        "(python eval_mnist.py), or name other files or folders")
    return results, notes


def main(cfg: Config) -> None:
    papers = paper_tables()
    if cfg.table and cfg.table not in papers:
        known = ", ".join(papers)
        raise UserError(f"--table {cfg.table}: there is no such table; choose one of {known}")
    if cfg.figure and not cfg.figure.endswith(".png"):
        raise UserError(f"--figure {cfg.figure}: name a file that ends in .png")
    out, figure = (output_path(path, Path(path), whole_run=False) if path else None
                   for path in (cfg.out, cfg.figure))
    results, notes = read(cfg)
    rows, more = group(results)
    notes += more
    sections = [paper_section(name, *papers[name], rows) for name in ([cfg.table] if cfg.table else papers)]
    if cfg.table and not sections[0]:
        raise UserError(f"none of the {len(results)} results fits {cfg.table} by defense, data set, epsilon "
                        f"and network: {papers[cfg.table][0]['title']}")
    head = ("Accuracies in %: mean ± standard deviation over the seeds of training (number of seeds). "
            f"{len(results)} results, {cfg.checkpoint_kind}.pt of each run.")
    everything = "" if cfg.table else all_results(rows)
    listed = "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""
    text = "\n\n".join(part for part in (head, *sections, everything, listed) if part)
    print(text)
    if out:
        write_text(out, text + "\n")
    if figure:
        draw_strengths(rows, figure)


def with_flag(words: list[str]) -> list[str]:
    """A command line whose leading words, those before the first flag, are the values of --paths."""
    return ["--paths", *words] if words and not words[0].startswith("-") else words


if __name__ == "__main__":
    sys.argv[1:] = with_flag(sys.argv[1:])
    run_script(main, Config)
