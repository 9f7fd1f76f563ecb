"""Write the tables of README.md and docs/ from the files in results/.

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`. Never edit what is between them.

    python -m harness.reporting.docs            # write every table again
    python -m harness.reporting.docs --check    # change nothing; exit code 1 names the tables that are stale
"""
import argparse
import re
import sys
from pathlib import Path

from harness.errors import UserError
from harness.reporting import campaign_tables, defense_tables, page_tables, speed_tables

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^<!-- table: (\S+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
MADE_BY = {defense_tables: ("mnist", "family", "equal_budget", "equal_budget_family", "equal_budget_strong",
                            "losses", "mean_one", "fast", "strong", "cifar10", "equal_budget_cifar10"),
           page_tables: ("attacks", "curves", "members", "mean_budget", "stability"),
           campaign_tables: ("paired", "logged", "hours"),
           speed_tables: ("train_step", "gains", "precisions", "expectation", "memory", "evaluation",
                          "recipes", "accept")}
TABLES = {name: getattr(module, name) for module, names in MADE_BY.items() for name in names}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fill(text: str) -> tuple[str, list[str]]:
    """(the page with every table made again, the names of the tables that were not as they should be).

    Raises UserError for a table of an unknown name, and for one that does not end.
    """
    stale = []

    def table(block: re.Match[str]) -> str:
        """The block with its table made again."""
        name, old = block.groups()
        if name not in TABLES:
            raise UserError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        new = f"\n{TABLES[name]()}\n\n"  # Markdown renders a table only after an empty line
        if new != old:
            stale.append(name)
        return f"<!-- table: {name} -->\n{new}<!-- end -->"

    if len(re.findall("^<!-- table: ", text, re.MULTILINE)) != len(BLOCK.findall(text)):
        raise UserError("a table has no line `<!-- end -->`")
    return BLOCK.sub(table, text), stale


def main() -> None:
    """Write the tables of every page, or with --check name those that are stale (exit code 1)."""
    parser = argparse.ArgumentParser("python -m harness.reporting.docs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is stale")
    check, failed = parser.parse_args().check, False
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            filled, stale = fill(text)
        except UserError as error:
            parser.exit(2, f"{parser.prog}: error: {page.name}: {error}\n")
        for name in stale:
            print(f"{page.relative_to(ROOT)}: table {name} is {'stale' if check else 'written'}")
        if stale and not check:
            page.write_text(filled, encoding="utf-8")
        failed |= check and bool(stale)
    sys.exit(failed)


if __name__ == "__main__":
    main()
