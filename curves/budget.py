"""Accuracy under an attacker with a mean budget, from the minimal distances of a robustness curve.

He may move every test point by a distance of its own, t_i, as long as (mean_i t_i^p)^(1/p) <= epsilon:

    A_p(epsilon) = min { mean_i 1[t_i < d_i] : mean_i t_i^p <= epsilon^p },    A_inf(epsilon) = 1 - R(epsilon)

That is the worst accuracy in a p-Wasserstein ball around the test set, labels fixed: the threat model of Bai,
He, Jiang & Obloj, "Wasserstein distributional robustness of neural networks", NeurIPS 2023. There a point's
mass may be split, so the optimum is that of the fractional knapsack.
"""
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from curves.canvas import FEW, NORM_NAMES, Look, legend_above, save, style
from curves.curve import Curve
from curves.figures import shared_norms
from curves.store import Results
from harness.evaluation.report import dumps
from harness.folder import write_csv, write_text
from harness.reporting.figures import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = 100          # mean budgets between 0 and a norm's largest distance, where none are named
LEFT = (0.9, 0.5, 0.1)  # accuracies of which the summary says what mean budget leaves them
TOGETHER = 64       # resamples in memory at once


class Knapsack:
    """The points of n distances: d = 0 is wrong unattacked, inf has no known adversarial example.

    Breaking point i costs d_i^p of a total of n epsilon^p. The best is to break the points in rising order of
    their distances until the total is spent, the last one in part: what is wrong unattacked costs nothing,
    and a point without an adversarial example stays right.
    """

    def __init__(self, distances: np.ndarray):
        curve = Curve(distances)
        self.n, self.wrong = len(curve), int(curve.count(0.0))
        self.prices = curve.distances[self.wrong:self.n - curve.censored]  # [m], rising, all > 0 and finite
        self.scale = float(self.prices[-1]) if len(self.prices) else 1.0

    def _spent(self, order: float, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What breaking the first k points costs and how many that are, k = 0 ... m.  [R, n] -> [R, m + 1]"""
        known = counts[:, self.wrong:self.wrong + len(self.prices)]
        spent, broken = np.zeros((2, len(counts), len(self.prices) + 1))
        np.cumsum(known * (self.prices / self.scale) ** order, axis=1, out=spent[:, 1:])
        np.cumsum(known, axis=1, out=broken[:, 1:])
        return spent, broken + counts[:, :self.wrong].sum(1, keepdims=True)

    def accuracies(self, budgets: np.ndarray, order: float, counts: np.ndarray) -> np.ndarray:
        """A_p at mean budgets [E] of resamples, p = `order` at least 1 or inf.  -> [R, E]

        counts: how often each resample has each point, in rising order of distance, [R, n].
        """
        if order == np.inf:
            _, broken = self._spent(1.0, counts)
            return 1 - broken[:, np.searchsorted(self.prices, budgets, side="right")] / self.n
        totals = self.n * (budgets / self.scale) ** order
        rows = [np.interp(totals, spent, broken) for spent, broken in zip(*self._spent(order, counts))]
        return 1 - np.array(rows) / self.n

    def accuracy(self, budgets: np.ndarray, order: float) -> np.ndarray:
        """A_p at mean budgets [E], p = `order` at least 1 or inf."""
        return self.accuracies(np.asarray(budgets, dtype=float), order, np.ones((1, self.n)))[0]

    def budget(self, accuracy: float, order: float) -> float | None:
        """The smallest mean budget that leaves at most this accuracy, None where none does."""
        spent, broken = (part[0] for part in self._spent(1.0 if order == np.inf else order,
                                                         np.ones((1, self.n))))
        needed = self.n * (1 - accuracy) - 1e-9
        if needed > broken[-1]:
            return None
        if order == np.inf:
            return float(np.append(0.0, self.prices)[np.searchsorted(broken, needed)])
        return float(self.scale * (np.interp(needed, broken, spent) / self.n) ** (1 / order))

    def bands(self, budgets: np.ndarray, orders: tuple[float, ...], confidence: float, num_resamples: int,
              seed: int) -> dict[float, np.ndarray]:
        """Order -> (lower, upper) [2, E]: bootstrap over the points, percentiles at each budget by itself."""
        random, found = np.random.default_rng(seed), {order: [] for order in orders}
        for first in range(0, num_resamples, TOGETHER):
            drawn = random.integers(0, self.n, (min(TOGETHER, num_resamples - first), self.n))
            counts = np.stack([np.bincount(row, minlength=self.n) for row in drawn])
            for order in orders:
                found[order].append(self.accuracies(budgets, order, counts))
        tails = (1 - confidence) / 2, (1 + confidence) / 2
        return {order: np.quantile(np.concatenate(parts), tails, axis=0) for order, parts in found.items()}


def columns_of(upper: np.ndarray, lower: np.ndarray, budgets: np.ndarray, orders: tuple[float, ...],
               confidence: float = 0.95, num_resamples: int = 2000,
               seed: int = 0) -> dict[float, dict[str, np.ndarray]]:
    """Order -> columns over mean budgets [E], from distances found and lower bounds of the true ones [n].

    accuracy         from the distances found, which are upper bounds: the true one is at most this
    lower, upper     its bootstrap band
    certified        where lower bounds are known (> 0): the true one is at least this
    """
    knapsack = Knapsack(upper)
    bands = knapsack.bands(budgets, orders, confidence, num_resamples, seed)
    found = {}
    for order in orders:
        columns = {"accuracy": knapsack.accuracy(budgets, order), "lower": bands[order][0],
                   "upper": bands[order][1]}
        if (lower > 0).any():
            columns["certified"] = Knapsack(lower).accuracy(budgets, order)
        found[order] = columns
    return found


def grid_of(several: list[Results], norm: str, budgets: tuple[float, ...]) -> np.ndarray:
    """The mean budgets of a norm: those named, with 0, or GRID steps to the largest distance of a model."""
    if budgets:
        return np.unique([0.0, *budgets])
    largest = max(Knapsack(results.upper(norm)).scale for results in several)
    return np.linspace(0.0, largest, GRID + 1)


def write(several: list[Results], budgets: tuple[float, ...], orders: tuple[float, ...], folder: Path,
          look: Look, num_resamples: int, seed: int, facts: Callable[[], dict]) -> None:
    """budget.csv, summary.json, the figure, and on the screen the mean budget that halves the accuracy.

    orders: finite ones; p = inf, the robustness curve, is always there. facts(): what else the summary says.
    """
    orders = (*dict.fromkeys(orders), np.inf)
    panels, rows, left = {}, [], {results.name: {} for results in several}
    pairs = [(norm, results) for norm in shared_norms(several) for results in several]
    for norm, results in tqdm(pairs, desc="mean budgets", unit="curve", disable=None, leave=False):
        name, upper, lower = results.labelled(norm)
        grid = grid_of(several, norm, budgets)
        found = columns_of(upper, lower, grid, orders, look.confidence, num_resamples, seed)
        panels.setdefault(norm, {})[name] = grid, found
        rows += _rows(name, norm, grid, found)
        knapsack = Knapsack(upper)
        left[name][norm] = {f"{order:g}": {str(share): knapsack.budget(share, order) for share in LEFT}
                            for order in orders}
    write_csv(folder / "budget.csv", rows)
    summary = facts() | {"confidence": look.confidence, "num_resamples": num_resamples, "seed": seed,
                         "points": {results.name: len(results) for results in several},
                         "mean_budget_that_leaves": left}
    write_text(folder / "summary.json", dumps(summary))
    _print(left)
    if look.plot:
        draw(panels, folder / "budget", look)
    print(f"written: {folder}")


def _print(left: dict[str, dict]) -> None:
    """The mean budgets that leave the accuracies in LEFT."""
    width = max(map(len, left))
    print(f"\n{'model':<{width}}  norm    p   mean budget that leaves "
          + "  ".join(f"{100 * share:>5.0f} %" for share in LEFT))
    for name, norms in left.items():
        for norm, orders in norms.items():
            for order, found in orders.items():
                cells = "  ".join("      -" if value is None else f"{value:7.4f}" for value in found.values())
                print(f"{name:<{width}}  {norm:<4}  {order:>3}  {cells:>{24 + 9 * len(LEFT) - 2}}")


def _rows(model: str, norm: str, grid: np.ndarray,
          found: dict[float, dict[str, np.ndarray]]) -> Iterator[dict[str, str]]:
    """The rows of budget.csv for one curve of each order."""
    for order, columns in found.items():
        for k, budget in enumerate(grid):
            values = {"mean_budget": budget} | {name: column[k] for name, column in columns.items()}
            yield ({"model": model, "norm": norm, "p": f"{order:g}"}
                   | {name: f"{value:.9g}" for name, value in values.items()})


def draw(panels: dict[str, dict[str, tuple[np.ndarray, dict]]], stem: Path, look: Look) -> list[Path]:
    """Accuracy against the mean budget: a column a norm, a row an order, a line a model.

    panels: norm -> model -> (mean budgets [E], order -> `columns_of`); dotted, what lower bounds prove.
    """
    orders = next(iter(next(iter(panels.values())).values()))[1]
    figure, axes = new_axes(len(orders), len(panels), height=3.2)
    for column, (norm, models) in zip(axes.T, panels.items()):
        for axis, order in zip(column, orders):
            shown = r"$\infty$ (the robustness curve)" if order == np.inf else f"{order:g}"
            band = _panel(axis, {name: (look.scale * grid, found[order])
                                 for name, (grid, found) in models.items()})
            axis.set_title(f"{NORM_NAMES[norm]}, p = {shown}; {100 * look.confidence:g} % band {band}",
                           fontsize=10)
            largest = max(_reach(grid, found[order]["accuracy"]) for grid, found in models.values())
            axis.set(xlim=(0, look.scale * largest or 1.0), ylim=(0, 101))
        column[-1].set_xlabel(look.size_label(norm, r"mean budget $\epsilon$"))
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy, %")
    legend_above(figure, axes[0])
    return save(figure, stem, look)


def _reach(grid: np.ndarray, accuracy: np.ndarray) -> float:
    """The first mean budget at which the accuracy is as low as it gets."""
    return float(grid[np.argmax(accuracy <= accuracy[-1])])


def _panel(axis: "Axes", models: dict[str, tuple[np.ndarray, dict]]) -> str:
    """One line a model; returns where its band is: shaded, or with more than FEW models its half-width."""
    widest = 0.0
    for k, (name, (grid, columns)) in enumerate(models.items()):
        colour = style(k)["color"]
        low, high = 100 * columns["lower"], 100 * columns["upper"]
        axis.plot(grid, 100 * columns["accuracy"], linewidth=1.4, label=name, **style(k))
        if len(models) <= FEW:
            axis.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
        if "certified" in columns:
            axis.plot(grid, 100 * columns["certified"], linewidth=1.1, linestyle=":", color=colour,
                      label=f"{name}, certified: at least this")
        widest = max(widest, float(np.max(high - low)) / 2)
    return "shaded" if len(models) <= FEW else f"$\\pm$ {widest:.1f} points at most"
