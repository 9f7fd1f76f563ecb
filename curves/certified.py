"""Certified lower bounds of minimal distances by linear bounds of a ReLU network (CROWN: Zhang et al.,
"Efficient Neural Network Robustness Certification with General Activation Functions", NeurIPS 2018).

Everything here is float64 and works on a chain of affine maps with ReLUs between them, as `affine_layers`
reads it off a network.
"""
import copy
from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.fx
from torch import Tensor, nn

from curves import NORMS

RELUS = (nn.functional.relu, torch.relu, torch.relu_, "relu", "relu_")
ROWS_BYTES = 2**28  # of the rows that a batch pulls back through a layer; a few such tensors live at a time
Layers = list[tuple[Tensor, Tensor]]  # weight [out, in], bias [out] of each affine map; ReLUs between them
Bounds = tuple[Tensor, Tensor]        # lower and upper bounds, [B, n] each


def affine_layers(model: nn.Module, shape: Sequence[int]) -> Layers:
    """The network as affine maps with ReLUs between them, from flat images of `shape` (C, H, W) to logits.

    What stands between two ReLUs (convolution, linear, batch norm in eval mode, average pool, normalisation,
    flatten) is evaluated on the unit vectors. Raises ValueError for a network that is no such chain:
    max-pooling, branches, other activations, control flow.
    """
    model = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
    try:
        nodes = list(torch.fx.symbolic_trace(model).graph.nodes)
    except Exception as error:  # fx passes on whatever the network raises
        reason = f"the network cannot be read as affine maps and ReLUs ({type(error).__name__}: {error})"
        raise ValueError(reason.split("\n")[0]) from None
    layers, block, shape, before = [], [], torch.Size(shape), nodes[0]
    for node in [node for node in nodes[1:] if node.op != "get_attr"]:
        if [one for one in node.all_input_nodes if one.op != "get_attr"] != [before]:
            raise ValueError(f"the network is no chain of layers: {node.name} does not take just the layer "
                             "before it")
        function = model.get_submodule(node.target) if node.op == "call_module" else node.target
        if isinstance(function, nn.ReLU) or function in RELUS or node.op == "output":
            weight, bias, shape = _affine(block, shape)
            layers.append((weight, bias))
            block = []
        else:
            block.append(_callable(node, before, model))
        before = node
    return layers


def _callable(node: torch.fx.Node, before: torch.fx.Node, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The operation of a node as a function of the value of the node before it."""
    def run(value: Tensor) -> Tensor:
        """The node's value where that of the node before it is `value`."""
        def fill(one: torch.fx.Node) -> Tensor:
            return value if one is before else reduce(getattr, one.target.split("."), model)

        args, options = torch.fx.map_arg((node.args, node.kwargs), fill)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **options)
        function = model.get_submodule(node.target) if node.op == "call_module" else node.target
        return function(*args, **options)

    return run


def _affine(block: list[Callable[[Tensor], Tensor]], shape: torch.Size) -> tuple[Tensor, Tensor, torch.Size]:
    """(weight, bias, shape of the output) of the affine map that `block` is on inputs of `shape`."""
    def run(flat: Tensor) -> Tensor:
        return reduce(lambda value, step: step(value), block, flat.view(-1, *shape))

    size = shape.numel()
    origin = run(torch.zeros(1, size, dtype=torch.float64))
    bias = origin.flatten()
    weight = (run(torch.eye(size, dtype=torch.float64)).flatten(1) - bias).T.contiguous()
    probe = torch.linspace(-2, 2, 3 * size, dtype=torch.float64).view(3, size).sin() * 3
    if not torch.allclose(run(probe).flatten(1), probe @ weight.T + bias, rtol=1e-8, atol=1e-8):
        raise ValueError("the network holds something besides affine maps and ReLUs between layers "
                         "(max-pooling, another activation)")
    return weight, bias, origin.shape[1:]


def forward(layers: Layers, x: Tensor) -> Tensor:
    """Logits [B, K] of flattened images [B, D]."""
    for weight, bias in layers[:-1]:
        x = (x @ weight.T + bias).relu()
    return x @ layers[-1][0].T + layers[-1][1]


def crown_bounds(layers: Layers, x: Tensor, radius: Tensor, norm: str = "linf") -> list[Bounds]:
    """Bounds of the inputs of every ReLU layer on the l_p balls of `radius` [B] around x [B, D] in [0, 1]."""
    bounds: list[Bounds] = []
    for depth in range(len(layers) - 1):
        rows, constant = (torch.cat([part, -part]) for part in layers[depth])
        low, high = lower_bound(layers[:depth], bounds, rows, constant, x, radius, norm).chunk(2, dim=1)
        bounds.append((low, torch.maximum(-high, low)))
    return bounds


def lower_bound(layers: Layers, bounds: list[Bounds], rows: Tensor, constant: Tensor, x: Tensor,
                radius: Tensor, norm: str) -> Tensor:
    """A lower bound of rows @ h + constant on the balls, h the output of the last ReLU of `layers`: [B, R].

    Backwards through each ReLU, which lies above slope * z (slope 1 where u > -l, else 0) and below
    u / (u - l) * (z - l). rows: [R, n] or [B, R, n]; constant: [R] or [B, R].
    """
    rows = rows.expand(len(x), *rows.shape[-2:])
    for (weight, bias), (low, high) in zip(reversed(layers), reversed(bounds)):
        upper_slope = torch.where(low >= 0, 1.0, high.clamp(min=0) / (high - low).clamp(min=1e-300))
        lower_slope = ((low >= 0) | (high > -low)).to(low.dtype)
        negative = rows.clamp(max=0)
        constant = constant + (negative @ ((-low).clamp(min=0) * upper_slope)[..., None]).squeeze(-1)
        rows = rows.clamp(min=0) * lower_slope[:, None] + negative * upper_slope[:, None]
        constant = constant + rows @ bias
        rows = rows @ weight
    return constant + _least(rows, x, radius, norm)


def _least(rows: Tensor, x: Tensor, radius: Tensor, norm: str) -> Tensor:
    """A lower bound [B, R] of rows @ x' on each ball within [0, 1]: exact in l_inf, else of ball and cube."""
    low = (x - radius[:, None]).clamp(min=0)
    high = (x + radius[:, None]).clamp(max=1)
    boxed = (rows.clamp(min=0) @ low[..., None] + rows.clamp(max=0) @ high[..., None]).squeeze(-1)
    if norm == "linf":
        return boxed
    dual = rows.norm(dim=2) if norm == "l2" else rows.abs().amax(dim=2)
    return torch.maximum(boxed, (rows @ x[..., None]).squeeze(-1) - radius[:, None] * dual)


def margin_bounds(layers: Layers, bounds: list[Bounds], x: Tensor, y: Tensor, radius: Tensor,
                  norm: str = "linf") -> Tensor:
    """Lower bounds of z_y - z_k on the balls for every class k: [B, K], inf at k = y."""
    weight, bias = layers[-1]
    rows = weight[y][:, None] - weight   # [B, K, n]
    constant = bias[y][:, None] - bias  # [B, K]
    low = lower_bound(layers[:-1], bounds, rows, constant, x, radius, norm)
    return low.scatter(1, y[:, None], torch.inf)


def certified_distances(model: nn.Module | Layers, x: Tensor, y: Tensor, upper: Tensor, *, norm: str = "linf",
                        num_steps: int = 7) -> Tensor:
    """Radii [B] (float64) within which no adversary exists, by bisection between 0 and `upper` [B].

    x: [B, C, H, W] in [0, 1] (or [B, D] with layers); y: [B]; upper: distances an attack found (an infinite
    one counts as the diameter of the box). 0 for misclassified images. Raises ValueError for a network that
    `affine_layers` cannot read and for an unknown norm.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}")
    layers = model if isinstance(model, list) else affine_layers(model, x.shape[1:])
    x = x.flatten(1).double().cpu()
    diameter = {"linf": 1.0, "l2": x.shape[1] ** 0.5, "l1": float(x.shape[1])}[norm]
    widest = max(2 * len(bias) * max(earlier.shape[1] for earlier, _ in layers[:depth + 1])
                 for depth, (_, bias) in enumerate(layers))  # rows of `crown_bounds`: [B, 2 out, in], float64
    batch_size = max(1, ROWS_BYTES // (8 * widest))
    parts = (values.split(batch_size) for values in (x, y.cpu(), upper.double().cpu().clamp(max=diameter)))
    return torch.cat([_bisect(layers, *part, norm, num_steps) for part in zip(*parts)])


def _bisect(layers: Layers, x: Tensor, y: Tensor, upper: Tensor, norm: str, num_steps: int) -> Tensor:
    certified = torch.zeros_like(upper)
    upper = torch.where(forward(layers, x).argmax(dim=1) == y, upper, certified)
    for _ in range(num_steps):
        radius = (certified + upper) / 2
        bounds = crown_bounds(layers, x, radius, norm)
        safe = (margin_bounds(layers, bounds, x, y, radius, norm) > 0).all(dim=1)
        certified = torch.where(safe, radius, certified)
        upper = torch.where(safe, upper, radius)
    return certified
