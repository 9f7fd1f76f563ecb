"""GAIRAT (Zhang et al., "Geometry-aware Instance-reweighted Adversarial Training", ICLR 2021)."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

FUNCTIONS = ("tanh", "sigmoid", "discrete")


def gairat_weights(kappa: Tensor, num_steps: int, lam: float, *, function: str = "tanh",
                   normalization: str = "batch") -> Tensor:
    """GAIRAT weights: the fewer PGD steps an example withstands, the larger its weight.

        t = lam + 5 (h - kappa) / h,  h = floor(K / 2)
        tanh: w = (1 + tanh(t)) / 2;  sigmoid: w = 1 / (1 + exp(-t));  discrete: w = (K + 1 - kappa) / (K + 1)

    kappa: [B], how many of the K = num_steps iterates, each before its step, are classified correctly
    (`attacks.kappa`), in 0..K. Returns [B] >= 0, float32 or the wider type of kappa, a constant. lam = inf
    gives ones, plain adversarial training.
    normalization  "batch" rescales to mean 1, as the released code does (without it the step falls with the
                   weights); "none".

    Computed from log w, with (1 + tanh(t)) / 2 as sigmoid(2 t), the same function without its cancellation: in
    float32 that costs 8e-4 of a small weight at lam = -1, and gives 0 / 0 at lam = -5 for a batch that no step
    moves. (h - kappa) / h is the paper's 1 - 2 kappa / K for even K.
    """
    dtype = torch.promote_types(kappa.dtype, torch.float32) if kappa.is_floating_point() else torch.float32
    kappa = kappa.detach().to(dtype)
    if math.isinf(lam) and lam > 0:
        return torch.ones_like(kappa)
    half = max(num_steps // 2, 1)
    t = lam + 5.0 * (half - kappa) / half
    log_w = {"tanh": lambda: F.logsigmoid(2.0 * t), "sigmoid": lambda: F.logsigmoid(t),
             "discrete": lambda: torch.log((num_steps + 1 - kappa) / (num_steps + 1))}[function]()
    return len(kappa) * F.softmax(log_w, dim=0) if normalization == "batch" else log_w.exp()
