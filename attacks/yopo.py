"""The inner loop of YOPO (Zhang et al., "You Only Propagate Once", NeurIPS 2019), which attacks through the
first layer alone."""
import torch
from torch import Tensor, nn

from attacks.frozen import frozen
from attacks.geometry import projection


def yopo_inner(first_layer: nn.Module, x: Tensor, x_adv: Tensor, costate: Tensor, *, epsilon: float,
               step_size: float, num_steps: int) -> Tensor:
    """`num_steps` descents of the Hamiltonian H(x') = sum f0(clip(x', 0, 1)) * p in x', the costate p fixed.

        x' <- Pi( x' - step_size * sign( grad_x' H ) ),    p = -grad of the loss in f0's output

    Pi projects onto the l_inf ball of radius epsilon around x and then onto [0, 1]; sign(0) = 0. The clip
    passes the gradient at 0 and at 1 and not outside them, so a pixel of the given x_adv outside [0, 1] is
    only projected in its first step.

    first_layer: f0; x and x_adv: [B, C, H, W], x in [0, 1]; costate p: shaped as f0's output. Returns x_adv,
    shaped as x, without a graph; neither parameters nor their gradients are touched.
    """
    project = projection(x, epsilon, "linf")
    x_adv = x_adv.detach()
    with frozen(first_layer, None) as f0, torch.enable_grad():
        for _ in range(num_steps):
            inside = x_adv.clamp(0.0, 1.0).requires_grad_()
            gradient, = torch.autograd.grad((f0(inside) * costate).sum(), inside)
            # through the clip; that of torch.clamp at 0 and 1 differs from version to version
            gradient *= inside.detach() == x_adv
            x_adv = project(torch.sub(x_adv, gradient.sign(), alpha=step_size))
    return x_adv
