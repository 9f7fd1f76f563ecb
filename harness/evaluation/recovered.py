"""A_sa at KL budgets from results whose examples are gone: what their other figures leave open.

A result from before `A_sa_kl` still has A_rob, and A_sa with its effective size at alpha = 1, 1.5 and 2. Let
mu be the distribution of the margins, right ones in (0, 1], and Z(a) = mean exp(-a m). Then

    A_rob = mu(m > 0),    A_sa(a) Z(a) = mean 1[m > 0] exp(-a m),    n_eff(a) / N = Z(a)^2 / Z(2a)

For a given Z(1) these are linear in mu, but for Z(3) = Z(1.5)^2 N / n_eff(1.5), which is linearised again and
again. Of the distributions on a grid that agree with them to their printed digits, linear programs find the
extreme ones, in several directions and for every Z(1) that is possible. Of each A_sa_kl is exact, and all of
them nearly agree. The range is of those found, which proves nothing of others; the tests compare it with the
examples' own A_sa_kl.

    python -m harness.evaluation.recovered results/mnist results/vir --out recovered.json
"""
import argparse
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq, linprog
from tqdm import tqdm

from harness.device import command_line, environment
from harness.errors import UserError
from harness.evaluation.report import dumps, output_path
from harness.folder import write_text
from harness.reporting.strengths import draw_strengths
from harness.reporting.tables import find_files, group, read_results

ALPHAS = (1.0, 1.5, 2.0)
BUDGETS = (0.05, 0.2, 0.5)
MARGINS = np.concatenate([np.linspace(-1, 0, 121)[:-1], np.linspace(0, 1, 241)[1:]])  # [M]
RIGHT = MARGINS > 0
LEVELS = np.geomspace(math.exp(-1), math.e, 41)  # of Z(1), which lies between these
LARGEST = 1e3  # alpha; margins of the grid are then apart by more than e^8
PLACES = ("A_rob", "worst_case")  # the examples of A_rob, or the worst case under strong attacks
KEPT = 9     # levels that are possible, of which the extremes are looked for
ROUNDS = 6   # of the linearisation, at most
DIRECTIONS = [sign * values for values in (MARGINS, *(np.exp(-a * MARGINS) for a in (0.3, 0.6, 2.5)))
              for sign in (1, -1)]


@dataclass(frozen=True)
class Known:
    """What a result says: shares in [0, 1], and effective sizes over N by alpha, with their rounding."""

    robust: float
    selective: dict[float, float]
    sizes: dict[float, float]
    rounding: dict[float, float]  # of the sizes, relative


def known_of(percent: float, selective: dict[str, float], sizes: dict[str, float], count: int) -> Known:
    """A result's figures in percent, and effective sizes to one decimal.  Raises KeyError without ALPHAS."""
    found = {alpha: sizes[str(alpha)] for alpha in ALPHAS}
    return Known(percent / 100, {alpha: selective[str(alpha)] / 100 for alpha in ALPHAS},
                 {alpha: size / count for alpha, size in found.items()},
                 {alpha: 0.05 / size for alpha, size in found.items()})


def _conditions(known: Known, level: float, guess: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [10, M + 1], right sides [10] and tolerances [10] on (mu, Z(1.5)); level: Z(1), guess: Z(1.5)."""
    slack = known.rounding
    two = level**2 / known.sizes[1.0]
    four = two**2 / known.sizes[2.0]
    rows = [(np.ones_like(MARGINS), 0, 1, 0), (RIGHT, 0, known.robust, 0)]
    for alpha, value, loose in ((1.0, level, 0), (2.0, two, slack[1.0])):
        tilted = np.exp(-alpha * MARGINS)
        rows += [(tilted, 0, value, loose), (RIGHT * tilted, 0, known.selective[alpha] * value, loose)]
    rows.append((np.exp(-4 * MARGINS), 0, four, 2 * slack[1.0] + slack[2.0]))
    middle, size = np.exp(-1.5 * MARGINS), known.sizes[1.5]
    rows += [(middle, -1, 0, 0), (RIGHT * middle, -known.selective[1.5], 0, 0),
             (np.exp(-3 * MARGINS), -2 * guess / size, -guess**2 / size, slack[1.5])]
    matrix = np.array([np.append(row, last) for row, last, _, _ in rows])
    sides, loose = (np.array([row[k] for row in rows], dtype=float) for k in (2, 3))
    return matrix, sides, (loose + 2e-5) * np.abs(sides) + 1e-6


def _solve(known: Known, level: float, guess: float,
           direction: np.ndarray | None = None) -> tuple[float, float, np.ndarray]:
    """(violation, Z(1.5), mu) of the distribution that is lowest in a direction, of those that violate least.

    The violation is by how many tolerances the conditions are missed, 0 where mu agrees with all; with a
    direction mu must agree, and the violation is inf where none does.
    """
    for _ in range(ROUNDS):
        matrix, sides, slack = _conditions(known, level, guess)
        missed = -slack if direction is None else np.zeros_like(slack)
        cost = np.zeros(len(MARGINS)) if direction is None else direction
        found = linprog(np.concatenate([cost, [0, direction is None]]), bounds=(0, None), method="highs-ds",
                        A_ub=np.column_stack([np.vstack([matrix, -matrix]), np.tile(missed, 2)]),
                        b_ub=np.concatenate([sides + slack, slack - sides]))
        if found.status != 0:
            return math.inf, guess, MARGINS
        *mu, middle, violation = found.x
        guess, before = middle, guess
        if abs(guess - before) < 1e-6 * guess:
            return violation, guess, np.array(mu)
    return math.inf, guess, MARGINS


def _possible(known: Known) -> list[tuple[float, float]]:
    """Levels Z(1), from the smallest to the largest at which there is a distribution, with its Z(1.5)."""
    def look(level: float) -> tuple[float, float]:
        return _solve(known, level, level**1.5)[:2]

    violations = [look(level)[0] for level in LEVELS]
    at = int(np.argmin(violations))
    low, high = LEVELS[max(at - 1, 0)], LEVELS[min(at + 1, len(LEVELS) - 1)]
    best, left, right = LEVELS[at], low, high
    while look(best)[0] > 1e-9 and right - left > 1e-7:  # the violation falls and rises once
        third, other = left + (right - left) / 3, right - (right - left) / 3
        left, right = (left, other) if look(third)[0] < look(other)[0] else (third, right)
        best = (left + right) / 2
    if look(best)[0] > 1e-9:
        return []
    ends = []
    for beyond in (LEVELS[0], LEVELS[-1]):
        inside, outside = best, beyond
        while abs(outside - inside) > 1e-4:
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if look(middle)[0] <= 1e-9 else (inside, middle)
        ends.append(inside)
    return [(level, look(level)[1]) for level in np.linspace(*ends, KEPT)]


def accuracy_of(distribution: np.ndarray, budget: float) -> float:
    """A_sa_kl in [0, 1] of a distribution [M] of margins."""
    excess = MARGINS - MARGINS[distribution > 0].min()

    def weights(alpha: float) -> np.ndarray:
        return distribution * np.exp(-alpha * np.maximum(excess, 0))

    def left(alpha: float) -> float:
        tilted = weights(alpha)
        return budget + alpha * (tilted @ excess) / tilted.sum() + math.log(tilted.sum() / distribution.sum())

    alpha = brentq(left, 0, LARGEST) if left(LARGEST) < 0 else LARGEST
    return float(weights(alpha)[RIGHT].sum() / weights(alpha).sum())


def recover(known: Known, budgets: tuple[float, ...] = BUDGETS) -> dict[str, list[float]] | None:
    """Budget -> smallest and largest A_sa_kl found, in percent; None where no distribution agrees."""
    found: dict[str, list[float]] = {str(budget): [] for budget in budgets}
    for level, middle in _possible(known):
        for direction in DIRECTIONS:
            violation, _, mu = _solve(known, level, middle, direction)
            for budget in budgets if violation == 0 else ():
                found[str(budget)].append(100 * accuracy_of(np.maximum(mu, 0), budget))
    return {budget: [round(min(values), 2), round(max(values), 2)]
            for budget, values in found.items() if values} or None


def figures_of(result: dict) -> dict[str, Known]:
    """"A_rob", and with strong attacks "worst_case", of a result -> what it says there."""
    count, worst = result["num_examples"], result.get("worst_case")
    found = {"A_rob": known_of(result["A_rob"], result["A_sa"], result["effective_size"]["A_sa"], count)}
    if worst:
        found["worst_case"] = known_of(worst["accuracy"], worst["A_sa"], worst["effective_size"], count)
    return found


def main() -> None:
    """Recover the results on the command line, print them and write them down."""
    parser = argparse.ArgumentParser("python -m harness.evaluation.recovered", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="result files, or folders with eval*.json")
    parser.add_argument("--at", nargs="+", choices=PLACES, default=PLACES, help="at which examples")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write, never over another")
    parser.add_argument("--figure", metavar="FILE", help="PNG file: A_sa of all at equal alpha and budget")
    options = parser.parse_args()
    try:
        out, rows = output_path(options.out, Path(options.out), whole_run=False), []
        for file in tqdm(find_files(options.paths), unit="result", disable=None):
            rows += _rows(file, options.at)
            facts = {"command": command_line(), "environment": environment(torch.device("cpu"))}
            write_text(out, dumps(facts | {"rows": rows}))
        if options.figure:
            draw(rows, output_path(options.figure, Path(options.figure), whole_run=False))
    except UserError as error:
        parser.error(str(error))


def _rows(file: Path, places: Collection[str]) -> list[dict]:
    """The rows of one result file at these places; says which file it leaves out."""
    try:
        figures = figures_of(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no A_sa at alpha 1, 1.5 and 2 with effective sizes ({type(error).__name__})"
        print(f"{file}: {reason}: left out")
        return []
    rows = []
    for place, known in ((place, figures[place]) for place in places if place in figures):
        found = recover(known)
        print(f"{file} {place}: {'no distribution agrees' if found is None else found}", flush=True)
        rows.append({"file": file.as_posix(), "at": place, "A_sa_kl": found})
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """A_sa at A_rob's examples against alpha and budget, of the middles of what was recovered."""
    found = {row["file"]: row["A_sa_kl"] for row in rows if row["at"] == "A_rob" and row["A_sa_kl"]}
    results, _ = read_results(map(Path, found), "last")
    for result in results:
        result.measured.update({f"A_sa_kl {float(budget):g}": (sum(ends) / 2, {})
                                for budget, ends in found[result.file.as_posix()].items()})
    draw_strengths(group(results)[0], path)


if __name__ == "__main__":
    main()
