"""Exact l_inf distances of small ReLU networks by mixed-integer programming (Tjeng et al., "Evaluating Robustness of Neural Networks with
Mixed Integer Programming", ICLR 2019), with the solver HiGHS.

From an adversary on, two steps take turns: a linear program moves it as close as its activation pattern allows; then, for each class that
linear bounds cannot exclude, an integer program looks for another one that is closer by a little, or proves that there is none.
"""
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize, sparse
from torch import Tensor, nn

from curves.certified import Bounds, Layers, affine_layers, crown_bounds, forward, margin_bounds

try:
    import highspy
except ImportError:
    highspy = None

NEEDS_HIGHSPY = "highspy is not installed: exact distances fall back on scipy's copy of HiGHS, several times slower (pip install highspy)"
CLOSER = 0.95        # a closer adversary is sought from (1 - CLOSER * rel_gap) * distance on
OPTIONS = {"output_flag": False, "threads": 1, "mip_heuristic_effort": 0.0, "mip_heuristic_run_feasibility_jump": False,
           "mip_heuristic_run_rins": False, "mip_heuristic_run_rens": False, "mip_detect_symmetry": False, "mip_max_improving_sols": 1,
           "primal_feasibility_tolerance": 1e-9, "mip_feasibility_tolerance": 1e-9}


@dataclass(frozen=True)
class Exact:
    """The bracket of one point's distance: `status` is "exact" where upper / lower <= 1 + rel_gap, "open" where time ran out, and
    "misclassified" with distance 0. x_adv proves the upper end: margin 0 up to the solver's tolerance; None where misclassified."""

    lower: float
    upper: float
    status: str
    x_adv: np.ndarray | None
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Program:
    """minimise cost . v  subject to  row_low <= matrix v <= row_high,  low <= v <= high,  v integer where `integer`."""

    cost: np.ndarray
    matrix: sparse.csr_matrix
    row_low: np.ndarray
    row_high: np.ndarray
    low: np.ndarray
    high: np.ndarray
    integer: np.ndarray


def exact_distances(model: nn.Module | Layers, x: Tensor, y: Tensor, x_adv: Tensor, *, rel_gap: float = 1e-4,
                    time_limit: float = 60.0) -> list[Exact]:
    """The exact l_inf distance of every point within rel_gap, or a bracket of it after `time_limit` seconds (each point).

    x: [B, C, H, W] in [0, 1] ([B, D] with layers); y: [B]; x_adv: an adversary of each correctly classified point, from an attack.
    One thread; points one after the other, each proof being a program of its own. Raises ValueError for a network that is no chain of
    affine maps and ReLUs and for an x_adv that is not misclassified.
    """
    if highspy is None:
        warnings.warn(NEEDS_HIGHSPY, stacklevel=2)
    layers = model if isinstance(model, list) else affine_layers(model, x.shape[1:])
    images, starts = (one.flatten(1).double().cpu() for one in (x, x_adv))
    return [exact_distance(layers, *point, rel_gap, time_limit) for point in zip(images, y.tolist(), starts)]


def exact_distance(layers: Layers, x: Tensor, y: int, x_adv: Tensor, rel_gap: float = 1e-4, time_limit: float = 60.0) -> Exact:
    """`exact_distances` of one point: x and x_adv [D], float64."""
    started = time.monotonic()
    if int(forward(layers, x[None]).argmax()) != y:
        return Exact(0.0, 0.0, "misclassified", None, 0, time.monotonic() - started)
    if float(_margins(layers, x_adv, y).min()) > 1e-5:
        raise ValueError("an exact distance starts from an adversary, but the x_adv given is classified as its label")
    best, upper, rounds = x_adv, float((x_adv - x).abs().max()), 0
    while True:
        rounds += 1
        best, upper = _closest_in_pattern(layers, x, y, best, upper)
        radius = (1 - CLOSER * rel_gap) * upper
        found, proven = _search(layers, x, y, radius, started + time_limit)
        if found is None:
            lower = radius if proven else _certified(layers, x, y, radius)
            return Exact(lower, upper, "exact" if proven else "open", best.numpy(), rounds, time.monotonic() - started)
        best, upper = found, float((found - x).abs().max())


def _margins(layers: Layers, x: Tensor, y: int) -> Tensor:
    """z_y - z_k at x [D] for every other class k: [K - 1]."""
    logits = forward(layers, x[None])[0]
    return logits[y] - torch.cat([logits[:y], logits[y + 1:]])


def _certified(layers: Layers, x: Tensor, y: int, upper: float, num_steps: int = 7) -> float:
    """The largest radius below `upper` at which linear bounds alone exclude every class, by bisection."""
    lower = 0.0
    for _ in range(num_steps):
        radius = (lower + upper) / 2
        if float(_class_bounds(layers, x, y, radius)[1].min()) > 0:
            lower = radius
        else:
            upper = radius
    return lower


def _class_bounds(layers: Layers, x: Tensor, y: int, radius: float) -> tuple[list[Bounds], Tensor]:
    """(bounds of every ReLU's input, lower bounds of z_y - z_k [K]) in the ball."""
    around, label = torch.tensor([radius], dtype=torch.float64), torch.tensor([y])
    bounds = crown_bounds(layers, x[None], around)
    return bounds, margin_bounds(layers, bounds, x[None], label, around)[0]


# Closer within the activation pattern: a linear program

def _closest_in_pattern(layers: Layers, x: Tensor, y: int, x_adv: Tensor, upper: float) -> tuple[Tensor, float]:
    """The closest point to x with x_adv's activation pattern at which its class still ties with y, and its distance.

    Variables: the image and the distance. Only ReLUs that can switch in the ball give constraints.
    """
    bounds, _ = _class_bounds(layers, x, y, upper)
    (weight, bias), rows, limits = layers[0], [], []  # weight, bias: of each layer as a function of the image, within the pattern
    for (low, high), (following, shift) in zip(bounds, layers[1:]):
        active, unstable = weight @ x_adv + bias > 0, (low[0] < 0) & (high[0] > 0)
        sign = torch.where(active, -1.0, 1.0).double()[unstable]
        rows.append(sign[:, None] * weight[unstable])
        limits.append(-sign * bias[unstable])
        weight, bias = (following * active) @ weight, (following * active) @ bias + shift
    rival = int((weight @ x_adv + bias).index_fill(0, torch.tensor([y]), -torch.inf).argmax())
    rows.append((weight[y] - weight[rival])[None])
    limits.append((bias[rival] - bias[y])[None])
    found, _ = _solve(_distance_program(x.numpy(), torch.cat(rows).numpy(), torch.cat(limits).numpy(), upper), 60.0)
    if found is None:
        return x_adv, upper
    point = torch.from_numpy(found[:-1]).clamp(0, 1)
    distance = float((point - x).abs().max())
    return (point, distance) if distance < upper and float(_margins(layers, point, y).min()) <= 1e-6 else (x_adv, upper)


def _distance_program(x: np.ndarray, rows: np.ndarray, limits: np.ndarray, upper: float) -> Program:
    """minimise t subject to |x' - x| <= t, rows x' <= limits, and x' in the box: variables (x', t)."""
    one, column = sparse.identity(len(x)), -np.ones((len(x), 1))
    matrix = sparse.bmat([[one, column], [-one, column], [sparse.csr_matrix(rows), None]]).tocsr()
    return Program(cost=np.append(np.zeros(len(x)), 1.0), matrix=matrix, row_low=np.full(matrix.shape[0], -np.inf),
                   row_high=np.concatenate([x, -x, limits]), low=np.append(np.clip(x - upper, 0, 1), 0.0),
                   high=np.append(np.clip(x + upper, 0, 1), upper), integer=np.zeros(len(x) + 1, dtype=bool))


# An adversary in a ball, or the proof that there is none: integer programs

def _search(layers: Layers, x: Tensor, y: int, radius: float, deadline: float) -> tuple[Tensor | None, bool]:
    """(an adversary in the ball, False), (None, True) where there is none, (None, False) where time ran out."""
    bounds, margins = _class_bounds(layers, x, y, radius)
    for rival in margins.argsort().tolist():
        if margins[rival] > 0:
            return None, True
        found, proven = _solve(_adversary_program(layers, bounds, x, y, rival, radius), deadline - time.monotonic())
        if found is not None:
            point = torch.from_numpy(found[:len(x)])
            inside = torch.minimum(torch.maximum(point, (x - radius).clamp(min=0)), (x + radius).clamp(max=1))
            return (inside, False) if float(_margins(layers, inside, y).min()) <= 1e-6 else (None, False)
        if not proven:
            return None, False
    return None, True


def _adversary_program(layers: Layers, bounds: list[Bounds], x: Tensor, y: int, rival: int, radius: float) -> Program:
    """Feasible where some x' in the ball has z_rival >= z_y, and then minimises z_y - z_rival.

    Variables: x' and, of each ReLU that can switch, its output a and a binary d: a >= 0, a >= z, a <= z - low (1 - d), a <= high d. The
    others are linear in these. `post`, `shift`: a layer's outputs as a function of x' and the outputs a so far.
    """
    unstable = [((low[0] < 0) & (high[0] > 0)).numpy() for low, high in bounds]
    size, count = len(x), int(sum(mask.sum() for mask in unstable))
    post, shift, blocks, limits, used = np.eye(size, size + count), np.zeros(size), [], [], size
    for (weight, bias), (low, high), mask in zip(layers, bounds, unstable):
        pre, constant = weight.numpy() @ post, weight.numpy() @ shift + bias.numpy()
        low, high, number = low[0].numpy(), high[0].numpy(), int(mask.sum())
        own, binary = np.zeros((number, size + count)), np.zeros((number, count))
        own[np.arange(number), used + np.arange(number)] = 1
        binary[np.arange(number), used - size + np.arange(number)] = 1
        blocks += [np.hstack([pre[mask] - own, 0 * binary]), np.hstack([own - pre[mask], -low[mask][:, None] * binary]),
                   np.hstack([own, -high[mask][:, None] * binary])]
        limits += [-constant[mask], constant[mask] - low[mask], np.zeros(number)]
        always = low >= 0
        post, shift = pre * always[:, None], constant * always
        post[mask] = own
        used += number
    weight, bias = layers[-1]
    row = (weight[y] - weight[rival]).numpy()
    objective, constant = row @ post, row @ shift + float(bias[y] - bias[rival])
    blocks.append(np.append(objective, np.zeros(count))[None])
    limits.append([-constant])
    tops = np.concatenate([high[0].numpy()[mask] for (_, high), mask in zip(bounds, unstable)])
    matrix = sparse.csr_matrix(np.vstack(blocks))
    return Program(cost=np.append(objective, np.zeros(count)), matrix=matrix, row_low=np.full(matrix.shape[0], -np.inf),
                   row_high=np.concatenate(limits), low=np.concatenate([np.clip(x.numpy() - radius, 0, 1), np.zeros(2 * count)]),
                   high=np.concatenate([np.clip(x.numpy() + radius, 0, 1), tops, np.ones(count)]),
                   integer=np.arange(size + 2 * count) >= size + count)


# The solver

def _solve(program: Program, time_limit: float) -> tuple[np.ndarray | None, bool]:
    """(a solution, or None; whether the absence of one is proven)."""
    if time_limit <= 0:
        return None, False
    if highspy is None:
        constraint = optimize.LinearConstraint(program.matrix, program.row_low, program.row_high)
        result = optimize.milp(program.cost, integrality=program.integer, bounds=optimize.Bounds(program.low, program.high),
                               constraints=constraint, options={"time_limit": time_limit})
        return result.x, result.status == 2
    solver = highspy.Highs()
    for name, value in (OPTIONS | {"time_limit": time_limit}).items():
        solver.setOptionValue(name, value)
    lp, matrix = highspy.HighsLp(), program.matrix
    lp.num_row_, lp.num_col_ = matrix.shape
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.cost, program.low, program.high
    lp.row_lower_, lp.row_upper_ = program.row_low, program.row_high
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    if program.integer.any():
        kinds = {True: highspy.HighsVarType.kInteger, False: highspy.HighsVarType.kContinuous}
        lp.integrality_ = [kinds[bool(one)] for one in program.integer]
    solver.passModel(lp)
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        return np.array(solver.getSolution().col_value), False
    return None, status == highspy.HighsModelStatus.kInfeasible
