"""One training step of AT, TRADES and VIR-AT in two other forms than ours, and the number of its operations.

    published   float32 with torch's own settings, NCHW, parameters not frozen, on a batch that is already there. AT (as
                released by Zeng et al., AAAI 2021): `backward` in the attack, which also accumulates the gradients of the parameters.
                TRADES (Zhang et al., ICML 2019): the clean prediction again at every attack step and once more for the KL term. VIR-AT
                has no released code: its Algorithm 1 with the attack as GAIRAT and MAIL release it, the input's gradient alone
    bare        the forward and backward passes alone that a step cannot do without, on tensors that are already there
"""
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from attacks.frozen import frozen, predict
from attacks.pgd import first_iterate
from harness.training.precision import bare
from losses.divergence import kl_divergence
from losses.trades import trades_loss
from losses.vir import vir_weights
from models import build_model

NUM_CLASSES = 10


# ---- the published form ----------------------------------------------------------------------------------------------------------

def published_model(model: nn.Module) -> nn.Module:
    """A copy of the network as the published code holds it: without wrappers, NCHW, float32, layer by layer."""
    return copy.deepcopy(bare(model)).to(memory_format=torch.contiguous_format)


def published_at(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, settings: object, start: str | Tensor) -> Tensor:
    """One step of adversarial training on the batch x [B, C, H, W], y [B]; returns its loss.  `start` as in `attacks.pgd.pgd`."""
    model.train()
    x_adv = first_iterate(x, settings.epsilon, start)
    for _ in range(settings.num_steps):
        x_adv = x_adv.detach().requires_grad_()
        F.cross_entropy(model(x_adv), y).backward()  # fills the gradients of x_adv and of every parameter
        x_adv = ascend(x_adv, x_adv.grad, x, settings)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x_adv), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def published_trades(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, settings: object, start: str | Tensor) -> Tensor:
    """One step of TRADES on the batch x [B, C, H, W], y [B]; returns its loss.  `start` as in `attacks.pgd.pgd`."""
    divergence = nn.KLDivLoss(reduction="sum")
    model.eval()
    x_adv = maximised(lambda x_adv: divergence(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1)), x, settings, start)
    model.train()
    optimizer.zero_grad()
    natural = F.cross_entropy(model(x), y)
    robust = divergence(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1)) / len(x)
    loss = natural + settings.beta * robust
    loss.backward()
    optimizer.step()
    return loss.detach()


def published_vir(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, settings: object, start: str | Tensor) -> Tensor:
    """One step of VIR-AT, after its burn-in, on the batch x [B, C, H, W], y [B]; returns its loss.  `start` as in `attacks.pgd.pgd`."""
    model.eval()
    x_adv = maximised(lambda x_adv: F.cross_entropy(model(x_adv), y), x, settings, start)
    model.train()
    optimizer.zero_grad()
    with torch.no_grad():
        p = F.softmax(model(x), dim=1)
    logits_adv = model(x_adv)
    with torch.no_grad():
        susceptibility = settings.alpha * torch.exp(-settings.gamma * p[range(len(y)), y])
        shift = F.kl_div(F.log_softmax(logits_adv, dim=1), p, reduction="none").sum(dim=1)
        weights = susceptibility * shift + settings.beta
    loss = (weights * F.cross_entropy(logits_adv, y, reduction="none")).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def maximised(loss_fn: Callable[[Tensor], Tensor], x: Tensor, settings: object, start: str | Tensor) -> Tensor:
    """x_adv [B, C, H, W] of PGD by the gradient of `loss_fn(x_adv)`, a scalar, with respect to the images alone."""
    x_adv = first_iterate(x, settings.epsilon, start)
    for _ in range(settings.num_steps):
        x_adv = x_adv.detach().requires_grad_()
        gradient, = torch.autograd.grad(loss_fn(x_adv), x_adv)
        x_adv = ascend(x_adv, gradient, x, settings)
    return x_adv


def ascend(x_adv: Tensor, gradient: Tensor, x: Tensor, settings: object) -> Tensor:
    """One step of size `step_size` along the gradient's sign, back into the ball of radius `epsilon` and into [0, 1]."""
    x_adv = x_adv.detach() + settings.step_size * gradient.sign()
    x_adv = torch.min(torch.max(x_adv, x - settings.epsilon), x + settings.epsilon)
    return torch.clamp(x_adv, 0.0, 1.0)


PUBLISHED = {"at": published_at, "trades": published_trades, "vir": published_vir}


# ---- the passes that no step can do without --------------------------------------------------------------------------------------

def bare_at(attacked: nn.Module, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, settings: object) -> None:
    """The forward and backward passes of one step of adversarial training.

    `attacked` is the network with frozen parameters, `model` the one with trainable ones; x_adv, which requires a gradient, stands
    for every iterate.
    """
    model.zero_grad()
    with frozen(attacked, None):
        for _ in range(settings.num_steps):
            torch.autograd.grad(F.cross_entropy(attacked(x_adv), y), x_adv)
    F.cross_entropy(model(x_adv.detach()), y).backward()


def bare_trades(attacked: nn.Module, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, settings: object) -> None:
    """The forward and backward passes of one step of TRADES, with one clean prediction for the attack; arguments as in `bare_at`."""
    model.zero_grad()
    with frozen(attacked, None):
        logits = predict(attacked, x, None)
        for _ in range(settings.num_steps):
            torch.autograd.grad(kl_divergence(attacked(x_adv), logits).sum(), x_adv)
    trades_loss(model(x), model(x_adv.detach()), y, settings.beta).mean().backward()


def bare_vir(attacked: nn.Module, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, settings: object) -> None:
    """The forward and backward passes of one step of VIR-AT, with the clean prediction for its weights; arguments as in `bare_at`."""
    model.zero_grad()
    with frozen(attacked, None):
        for _ in range(settings.num_steps):
            torch.autograd.grad(F.cross_entropy(attacked(x_adv), y), x_adv)
    logits = predict(model, x, "train")
    logits_adv = model(x_adv.detach())
    weights = vir_weights(logits, logits_adv, y, settings.alpha, settings.beta, settings.gamma)
    (weights * F.cross_entropy(logits_adv, y, reduction="none")).mean().backward()


BARE = {"at": bare_at, "trades": bare_trades, "vir": bare_vir}


def count_flops(name: str, method: str, settings: object, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of the bare step, 2 a multiply-add of convolutions and products; counted from shapes alone."""
    with torch.device("meta"):
        model = build_model(name, NUM_CLASSES, image_shape[0])
        x = torch.empty(settings.batch_size, *image_shape)
        y = torch.empty(settings.batch_size, dtype=torch.int64)
    x_adv = x.clone().requires_grad_().clone()  # no leaf: the counter's hooks do not support autograd.grad with respect to one
    with FlopCounterMode(display=False) as counter:
        BARE[method](copy.deepcopy(model).requires_grad_(False), model, x, x_adv, y, settings)
    return counter.get_total_flops()
