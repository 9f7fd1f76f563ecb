"""Attackers of equal strength: the worst distribution over the examples within a KL budget, and CVaR.

An attacker chooses a distribution w over the N examples of a test set with

    KL(w || uniform) = sum_i w_i log(N w_i) <= rho    nats

(Namkoong & Duchi, "Stochastic Gradient Methods for Distributionally Robust Optimization with f-divergences",
NIPS 2016). Whatever mean under w he wants to be lowest, the best w is an exponential tilt; the proof is in
docs/evaluation.md. Everything here is float64 on the CPU.
"""
import math

import torch
from torch import Tensor

from harness.evaluation.metrics import interval
from harness.evaluation.predictions import Predictions

CVAR_SHARES = (0.1, 0.01)  # of the examples, those of largest loss


def tilt(values: Tensor, budget: float) -> tuple[Tensor, float]:
    """The distribution within a KL budget under which the mean of `values` is lowest, and its alpha.

        w_i = exp(-alpha v_i) / sum_j exp(-alpha v_j),    alpha >= 0 with KL(w || uniform) = budget

    values: [N], finite; budget: in nats, at least 0. Returns the weights [N], which sum to 1, and alpha,
    found by bisection down to two neighbouring floats. The divergence rises with alpha to log(N / number of
    minima): where the budget is not below that, the weights are uniform on the minima and alpha is inf.
    """
    excess = values.double() - values.double().min()
    if budget == 0:
        return torch.full_like(excess, 1 / len(excess)), 0.0
    minima = (excess == 0).double()
    limit = minima / minima.sum(), math.inf
    if budget >= math.log(len(excess) / float(minima.sum())):
        return limit
    low, high = 0.0, 1 / float(excess.max())
    while _divergence(excess, high) < budget:
        low, high = high, 2 * high
        if math.isinf(high):  # rounding: the budget is next to the limit
            return limit
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _divergence(excess, middle) < budget else (low, middle)
    return torch.softmax(-high * excess, 0), high


def _divergence(excess: Tensor, alpha: float) -> float:
    """KL(w || uniform) of the tilt by alpha; excess: [N], the smallest 0."""
    log_weights = torch.log_softmax(-alpha * excess, 0)
    return math.log(len(excess)) + float((log_weights.exp() * log_weights.clamp(min=-1e9)).sum())  # 0 log 0


def accuracy_at_budget(correct: Tensor, margin: Tensor, budget: float) -> dict[str, object]:
    """Accuracy under the attacker who lowers the mean margin most within a KL budget: A_sa at alpha(budget).

    correct: [N] bool and margin: [N] in [-1, 1], as in `weighted_accuracy`. Returns `accuracy` in [0, 1],
    `ci95`, `effective_size`, `terms` and `alpha`, inf where no finite one spends the budget. A budget of 0
    gives the plain accuracy, and the accuracy never rises with the budget.

    The interval is that of `weighted_accuracy`, its variance the sum of squares of the linearised terms

        w_i (c_i - A - s (m_i - mean_w m)) - (s / alpha) (w_i - 1 / N),    s = Cov_w(m, c) / Var_w(m)

    in which alpha, which was found on the same examples, moves with them.
    """
    weights, alpha = tilt(margin, budget)
    correct, margin = correct.double(), margin.double()
    accuracy = float(weights @ correct)
    effective = float(1 / (weights**2).sum())
    terms = correct - accuracy
    centred = margin - weights @ margin
    spread = float(weights @ centred**2)
    if spread and 0 < alpha < math.inf:
        slope = float(weights @ (centred * terms)) / spread
        terms = weights * (terms - slope * centred) - slope / alpha * (weights - 1 / len(weights))
    else:
        terms = weights * terms
    ci95 = interval(accuracy, float((terms**2).sum()), effective)
    return {"accuracy": accuracy, "ci95": ci95, "effective_size": effective, "terms": terms, "alpha": alpha}


def loss_at_budget(loss: Tensor, budget: float) -> float:
    """The largest mean of the losses [N] under any distribution within a KL budget.

        sup { sum_i w_i loss_i : KL(w || uniform) <= rho } = min_{t > 0}  t rho + t log mean_i exp(loss_i / t)

    (Namkoong & Duchi 2016; the dual's best t is 1 / alpha of the tilt, where the two sides meet.)
    """
    weights, _ = tilt(-loss, budget)
    return float(weights @ loss.double())


def cvar(loss: Tensor, share: float) -> float:
    """The mean of the largest losses, a share in (0, 1] of the N examples, the last of them in part.

        CVaR = sup { sum_i w_i loss_i : w_i <= 1 / (share N) }    (Rockafellar & Uryasev, J. Risk 2000)
    """
    worst = loss.double().sort(descending=True).values
    cap = 1 / (share * len(worst))
    before = cap * torch.arange(len(worst), dtype=torch.float64)  # what the larger losses have taken
    return float((1 - before).clamp(0, cap) @ worst)


def at_budgets(found: Predictions, y: Tensor, budgets: tuple[float, ...]) -> tuple[dict[str, dict], dict]:
    """`accuracy_at_budget` at each KL budget, and as plain values what else the JSON has of them.

    That is `alpha_of_kl`, None where no finite alpha spends the budget; `loss_kl`, the cross-entropy's worst
    mean at each budget; and `loss_cvar`, at each of CVAR_SHARES.
    """
    named = {str(float(budget)): budget for budget in budgets}
    measured = {name: accuracy_at_budget(found.prediction == y, found.margin, budget)
                for name, budget in named.items()}
    alphas = {name: entry["alpha"] for name, entry in measured.items()}
    return measured, {
        "alpha_of_kl": {name: float(f"{alpha:.6g}") if alpha < math.inf else None
                        for name, alpha in alphas.items()},
        "loss_kl": {name: round(loss_at_budget(found.loss, budget), 6) for name, budget in named.items()},
        "loss_cvar": {str(share): round(cvar(found.loss, share), 6) for share in CVAR_SHARES}}
