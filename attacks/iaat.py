"""A radius for every example (IAAT: Balaji et al., "Instance Adaptive Adversarial Training", 2019)."""
import torch
from torch import Tensor


def iaat_epsilon(epsilon: Tensor, correct: Tensor, correct_at_epsilon: Tensor, correct_beyond: Tensor, *,
                 gamma: float, beta: float) -> Tensor:
    """The next radius of every example from its last one.

        sel = epsilon + gamma   if still correct under an attack of radius epsilon + gamma
              epsilon           else if correct under one of radius epsilon
              epsilon - gamma   otherwise
        next = beta * max(sel * 1[correct], 0) + (1 - beta) * epsilon

    epsilon: [B], pixels in [0, 1]; correct, correct_at_epsilon, correct_beyond: [B] bool, on the clean image
    and under the two attacks; gamma >= 0; beta in [0, 1]. Returns [B], at least 0 and without an upper bound:
    an example that is wrong when clean keeps 1 - beta of its radius.
    """
    selected = torch.where(correct_beyond, epsilon + gamma,
                           torch.where(correct_at_epsilon, epsilon, epsilon - gamma))
    return beta * (selected * correct).clamp_min(0.0) + (1.0 - beta) * epsilon


def iaat_step_size(epsilon: Tensor, num_steps: int, smallest: float) -> Tensor:
    """The step for every radius, max(2 * epsilon / num_steps, smallest): [B] -> [B], in the units of epsilon."""
    return (epsilon / (0.5 * num_steps)).clamp_min(smallest)
