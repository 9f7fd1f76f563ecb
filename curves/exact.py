"""Exact l_inf distances of small ReLU networks by mixed-integer programming (Tjeng et al., "Evaluating
Robustness of Neural Networks with Mixed Integer Programming", ICLR 2019), with the solver HiGHS.

From an adversary on, two steps take turns: a linear program moves it as close as its activation pattern
allows; then, for each class that linear bounds cannot exclude, an integer program looks for another one that
is closer by a little, or proves that there is none.
"""
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import optimize, sparse
from torch import Tensor, nn
from tqdm import tqdm

from curves.certified import Layers, affine_layers, certified_distances, crown_bounds, forward, margin_bounds
from curves.found import Exact
from curves.store import OK, Results, saving
from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from losses.margin import logit_margin

try:
    import highspy
except ImportError:
    highspy = None

NEEDS_HIGHSPY = ("highspy is not installed: exact distances fall back on scipy's copy of HiGHS, several "
                 "times slower (pip install highspy)")
CLOSER = 0.95  # a closer adversary is sought from (1 - CLOSER * rel_gap) * distance on
OPTIONS = {"output_flag": False, "threads": 1, "mip_heuristic_effort": 0.0,
           "mip_heuristic_run_feasibility_jump": False, "mip_heuristic_run_rins": False,
           "mip_heuristic_run_rens": False, "mip_detect_symmetry": False, "mip_max_improving_sols": 1,
           "primal_feasibility_tolerance": 1e-9, "mip_feasibility_tolerance": 1e-9}


@dataclass(frozen=True)
class Program:
    """minimise cost . v  subject to  matrix v <= limits,  low <= v <= high,  the last `integers` whole."""

    cost: np.ndarray
    matrix: sparse.csr_matrix
    limits: np.ndarray
    low: np.ndarray
    high: np.ndarray
    integers: int = 0


def exact_distances(model: nn.Module | Layers, x: Tensor, y: Tensor, x_adv: Tensor, *, rel_gap: float = 1e-4,
                    time_limit: float = 60.0) -> list[Exact]:
    """The exact l_inf distance of every point within rel_gap, or a bracket of it after `time_limit` seconds.

    x: [B, C, H, W] in [0, 1] ([B, D] with layers); y: [B]; x_adv: an adversary of each correctly classified
    point, from an attack. One thread; points one after the other, each proof being a program of its own.
    Raises ValueError for a network that is no chain of affine maps and ReLUs and for an x_adv that is not
    misclassified.
    """
    if highspy is None:
        warnings.warn(NEEDS_HIGHSPY, stacklevel=2)
    layers = model if isinstance(model, list) else affine_layers(model, x.shape[1:])
    images, starts = (one.flatten(1).double().cpu() for one in (x, x_adv))
    return [_exact_distance(layers, *point, rel_gap, time_limit) for point in zip(images, y.tolist(), starts)]


def prove(results: Results, layers: Layers, points: Split, folder: Path, rel_gap: float,
          time_limit: float) -> None:
    """Enter the bracket of every point attacked and not tried yet, from its stored adversary, and save."""
    bar = tqdm(results.rows(OK), desc=results.name, unit="point", disable=None)
    with bar, saving(results, folder) as saved:
        for row in bar:
            one = points[slice(row, row + 1)]
            x_adv = torch.from_numpy(results.columns["x_adv_linf"][row:row + 1])
            found, = exact_distances(layers, to_unit(one.images), one.labels, x_adv, rel_gap=rel_gap,
                                     time_limit=time_limit)
            results.put_proof(row, found)
            saved()


def _exact_distance(layers: Layers, x: Tensor, y: int, x_adv: Tensor, rel_gap: float,
                    time_limit: float) -> Exact:
    """`exact_distances` of one point: x and x_adv [D], float64."""
    deadline = time.monotonic() + time_limit
    if int(forward(layers, x[None]).argmax()) != y:
        return Exact(0.0, 0.0, "misclassified", None, 0)
    if _margin(layers, x_adv, y) > 1e-5:
        raise ValueError("an exact distance starts from an adversary, but the x_adv given is classified as "
                         "its label")
    best, rounds = x_adv, 0
    while True:
        rounds += 1
        best, upper = _closest_in_pattern(layers, x, y, best)
        radius = (1 - CLOSER * rel_gap) * upper
        found, proven = _search(layers, x, y, radius, deadline)
        if proven:
            return Exact(radius, upper, "exact", best.numpy(), rounds)
        if found is None:
            within = torch.tensor([radius], dtype=torch.float64)
            bound = certified_distances(layers, x[None], torch.tensor([y]), within)
            return Exact(float(bound), upper, "open", best.numpy(), rounds)
        best = found


def _margin(layers: Layers, x: Tensor, y: int) -> float:
    """z_y - max_{k != y} z_k at x [D]."""
    return float(logit_margin(forward(layers, x[None]), torch.tensor([y])))


# ---- closer within the activation pattern: a linear program ------------------------------------------------

def _closest_in_pattern(layers: Layers, x: Tensor, y: int, x_adv: Tensor) -> tuple[Tensor, float]:
    """The closest point to x with x_adv's activation pattern at which a class ties with y, and its distance.

    Variables: the image and the distance t. Only ReLUs that can switch in the ball of x_adv give constraints.
    """
    upper = float((x_adv - x).abs().max())
    weight, bias = layers[0]  # of each layer as a function of the image, within the pattern
    rows, limits = [], []
    bounds = crown_bounds(layers, x[None], torch.tensor([upper], dtype=torch.float64))
    for (low, high), (following, shift) in zip(bounds, layers[1:]):
        active = weight @ x_adv + bias > 0
        unstable = (low[0] < 0) & (high[0] > 0)
        sign = torch.where(active, -1.0, 1.0).double()[unstable]
        rows.append(sign[:, None] * weight[unstable])
        limits.append(-sign * bias[unstable])
        weight, bias = (following * active) @ weight, (following * active) @ bias + shift
    rival = int((weight @ x_adv + bias).index_fill(0, torch.tensor([y]), -torch.inf).argmax())
    rows.append((weight[y] - weight[rival])[None])
    limits.append((bias[rival] - bias[y])[None])
    one, column = sparse.identity(len(x)), -np.ones((len(x), 1))
    matrix = sparse.bmat([[one, column], [-one, column], [sparse.csr_matrix(torch.cat(rows).numpy()), None]])
    low, high = (np.clip(x.numpy() + step, 0, 1) for step in (-upper, upper))
    program = Program(np.append(np.zeros(len(x)), 1.0), matrix.tocsr(), torch.cat([x, -x, *limits]).numpy(),
                      np.append(low, 0.0), np.append(high, upper))
    found, _ = _solve(program, 60.0)
    if found is None:
        return x_adv, upper
    point = torch.from_numpy(found[:-1]).clamp(0, 1)
    distance = float((point - x).abs().max())
    return (point, distance) if distance < upper and _margin(layers, point, y) <= 1e-6 else (x_adv, upper)


# ---- an adversary in a ball, or the proof that there is none: integer programs -----------------------------

def _search(layers: Layers, x: Tensor, y: int, radius: float, deadline: float) -> tuple[Tensor | None, bool]:
    """(an adversary in the ball, False), (None, True) where there is none, (None, False) out of time."""
    around = torch.tensor([radius], dtype=torch.float64)
    bounds = crown_bounds(layers, x[None], around)
    margins = margin_bounds(layers, bounds, x[None], torch.tensor([y]), around)[0]  # [K], inf at y
    for rival in margins.argsort().tolist():
        if margins[rival] > 0:
            return None, True
        program = _adversary_program(layers, bounds, x, y, rival, radius)
        found, proven = _solve(program, deadline - time.monotonic())
        if found is not None:
            point = torch.from_numpy(found[:len(x)])
            inside = torch.minimum(torch.maximum(point, (x - radius).clamp(min=0)), (x + radius).clamp(max=1))
            return (inside if _margin(layers, inside, y) <= 1e-6 else None), False
        if not proven:
            return None, False
    return None, True


def _adversary_program(layers: Layers, bounds: list[tuple[Tensor, Tensor]], x: Tensor, y: int, rival: int,
                       radius: float) -> Program:
    """Feasible where some x' in the ball has z_rival >= z_y, and then minimises z_y - z_rival.

    Variables: x' and, of each ReLU that can switch, its output a and a binary d: a >= 0, a >= z,
    a <= z - low (1 - d), a <= high d. The others are linear in these. `post`, `shift`: a layer's outputs as a
    function of x' and the outputs a so far.
    """
    unstable = [((low[0] < 0) & (high[0] > 0)).numpy() for low, high in bounds]
    size, count = len(x), int(sum(mask.sum() for mask in unstable))
    post, shift = np.eye(size, size + count), np.zeros(size)
    blocks, limits, tops, used = [], [], [], 0
    for (weight, bias), (low, high), mask in zip(layers, bounds, unstable):
        pre, constant = weight.numpy() @ post, weight.numpy() @ shift + bias.numpy()
        always = low[0].numpy() >= 0
        low, high, number = low[0].numpy()[mask], high[0].numpy()[mask], int(mask.sum())
        own = np.eye(number, size + count, size + used)
        binary = np.eye(number, count, used)
        blocks += [np.hstack([pre[mask] - own, 0 * binary]),
                   np.hstack([own - pre[mask], -low[:, None] * binary]),
                   np.hstack([own, -high[:, None] * binary])]
        limits += [-constant[mask], constant[mask] - low, np.zeros(number)]
        tops.append(high)
        post, shift = pre * always[:, None], constant * always
        post[mask] = own
        used += number
    weight, bias = layers[-1]
    row = (weight[y] - weight[rival]).numpy()
    objective = np.append(row @ post, np.zeros(count))
    limits.append([-(row @ shift + float(bias[y] - bias[rival]))])
    matrix = sparse.csr_matrix(np.vstack([*blocks, objective[None]]))
    low = np.concatenate([np.clip(x.numpy() - radius, 0, 1), np.zeros(2 * count)])
    high = np.concatenate([np.clip(x.numpy() + radius, 0, 1), *tops, np.ones(count)])
    return Program(objective, matrix, np.concatenate(limits), low, high, integers=count)


# ---- the solver --------------------------------------------------------------------------------------------

def _solve(program: Program, time_limit: float) -> tuple[np.ndarray | None, bool]:
    """(a solution, or None; whether the absence of one is proven)."""
    if time_limit <= 0:
        return None, False
    integer = np.arange(len(program.cost)) >= len(program.cost) - program.integers
    if highspy is None:
        constraint = optimize.LinearConstraint(program.matrix, -np.inf, program.limits)
        bounds = optimize.Bounds(program.low, program.high)
        result = optimize.milp(program.cost, integrality=integer, bounds=bounds, constraints=constraint,
                               options={"time_limit": time_limit})
        return result.x, result.status == 2
    solver = highspy.Highs()
    for name, value in (OPTIONS | {"time_limit": time_limit}).items():
        solver.setOptionValue(name, value)
    lp, matrix = highspy.HighsLp(), program.matrix
    lp.num_row_, lp.num_col_ = matrix.shape
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.cost, program.low, program.high
    lp.row_lower_, lp.row_upper_ = np.full(len(program.limits), -np.inf), program.limits
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    if program.integers:
        kinds = highspy.HighsVarType
        lp.integrality_ = [kinds.kInteger if one else kinds.kContinuous for one in integer]
    solver.passModel(lp)
    solver.run()
    if solver.getInfo().primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        return np.array(solver.getSolution().col_value), False
    status = highspy.HighsModelStatus  # every variable is bounded, so that "or unbounded" is infeasible
    return None, solver.getModelStatus() in (status.kInfeasible, status.kUnboundedOrInfeasible)
