"""One training step of AT, TRADES and VIR-AT in two other forms than ours, and the number of its operations.

published   float32 with torch's own settings, NCHW, parameters not frozen, on a batch that is already there.
            AT (as released by Zeng et al., AAAI 2021): `backward` in the attack, which also accumulates the
            gradients of the parameters. TRADES (Zhang et al., ICML 2019): the clean prediction again at every
            attack step and once more for the KL term. VIR-AT has no released code: its Algorithm 1 with the
            attack as GAIRAT and MAIL release it, the input's gradient alone
bare        the forward and backward passes alone that a step cannot do without, on tensors already there
"""
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

import train_trades_mnist
import train_vir
from attacks.frozen import frozen, predict
from attacks.pgd import first_iterate
from benchmarks.common import NUM_CLASSES, TrainConfig
from harness.training.precision import bare
from losses.divergence import kl_divergence
from losses.trades import trades_loss
from losses.vir import vir_weights
from models import build_model

# ---- the published form ------------------------------------------------------------------------------------
# A step on the batch x [B, C, H, W], y [B]; returns its loss. `start` is as in `attacks.pgd.pgd`.

def published_model(model: nn.Module) -> nn.Module:
    """A copy of the network as the published code holds it: no wrappers, NCHW, float32, layer by layer."""
    return copy.deepcopy(bare(model)).to(memory_format=torch.contiguous_format)


def published_at(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, settings: TrainConfig,
                 start: str | Tensor) -> Tensor:
    """One step of adversarial training."""

    def gradient(x_adv: Tensor) -> Tensor:
        F.cross_entropy(model(x_adv), y).backward()  # fills the gradients of x_adv and of every parameter
        return x_adv.grad

    model.train()
    x_adv = maximised(gradient, x, settings, start)
    return descend(optimizer, lambda: F.cross_entropy(model(x_adv), y))


def published_trades(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor,
                     settings: train_trades_mnist.Config, start: str | Tensor) -> Tensor:
    """One step of TRADES."""

    def divergence(x_adv: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1), reduction="sum")

    model.eval()
    x_adv = maximised(lambda x_adv: torch.autograd.grad(divergence(x_adv), x_adv)[0], x, settings, start)
    model.train()
    return descend(optimizer, lambda: (
        F.cross_entropy(model(x), y) + settings.beta * (divergence(x_adv) / len(x))))


def published_vir(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, settings: train_vir.Config,
                  start: str | Tensor) -> Tensor:
    """One step of VIR-AT, after its burn-in."""

    def gradient(x_adv: Tensor) -> Tensor:
        return torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)[0]

    def loss() -> Tensor:
        with torch.no_grad():
            p = F.softmax(model(x), dim=1)
        logits_adv = model(x_adv)
        with torch.no_grad():
            susceptibility = settings.alpha * torch.exp(-settings.gamma * p[range(len(y)), y])
            shift = F.kl_div(F.log_softmax(logits_adv, dim=1), p, reduction="none").sum(dim=1)
            weights = susceptibility * shift + settings.beta
        return (weights * F.cross_entropy(logits_adv, y, reduction="none")).mean()

    model.eval()
    x_adv = maximised(gradient, x, settings, start)
    model.train()
    return descend(optimizer, loss)


def maximised(gradient: Callable[[Tensor], Tensor], x: Tensor, settings: TrainConfig,
              start: str | Tensor) -> Tensor:
    """x_adv [B, C, H, W] of PGD by the sign of gradient(x_adv), within the ball around x and [0, 1]."""
    x_adv = first_iterate(x, settings.epsilon, start)
    for _ in range(settings.num_steps):
        x_adv = x_adv.detach().requires_grad_()
        x_adv = x_adv.detach() + settings.step_size * gradient(x_adv).sign()
        x_adv = torch.min(torch.max(x_adv, x - settings.epsilon), x + settings.epsilon)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    return x_adv


def descend(optimizer: Optimizer, loss_fn: Callable[[], Tensor]) -> Tensor:
    """One step of the optimiser on loss_fn(), a scalar; returns it."""
    optimizer.zero_grad()
    loss = loss_fn()
    loss.backward()
    optimizer.step()
    return loss.detach()


PUBLISHED = {"at": published_at, "trades": published_trades, "vir": published_vir}


# ---- the passes that no step can do without ----------------------------------------------------------------
# `attacked` is the network with frozen parameters, `model` the one with trainable ones; x_adv, which requires
# a gradient, stands for every iterate.

def bare_at(attacked: nn.Module, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor,
            settings: TrainConfig) -> None:
    """The forward and backward passes of one step of adversarial training."""
    model.zero_grad()
    bare_attack(attacked, lambda logits: F.cross_entropy(logits, y), x_adv, settings.num_steps)
    F.cross_entropy(model(x_adv.detach()), y).backward()


def bare_trades(attacked: nn.Module, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor,
                settings: train_trades_mnist.Config) -> None:
    """The forward and backward passes of one step of TRADES, with one clean prediction for the attack."""
    model.zero_grad()
    with frozen(attacked, None):
        logits = predict(attacked, x, None)
    bare_attack(attacked, lambda found: kl_divergence(found, logits).sum(), x_adv, settings.num_steps)
    trades_loss(model(x), model(x_adv.detach()), y, settings.beta).mean().backward()


def bare_vir(attacked: nn.Module, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor,
             settings: train_vir.Config) -> None:
    """The forward and backward passes of one step of VIR-AT, with the clean prediction for its weights."""
    model.zero_grad()
    bare_attack(attacked, lambda logits: F.cross_entropy(logits, y), x_adv, settings.num_steps)
    logits, logits_adv = predict(model, x, "train"), model(x_adv.detach())
    weights = vir_weights(logits, logits_adv, y, settings.alpha, settings.beta, settings.gamma)
    (weights * F.cross_entropy(logits_adv, y, reduction="none")).mean().backward()


def bare_attack(attacked: nn.Module, loss_fn: Callable[[Tensor], Tensor], x_adv: Tensor,
                num_steps: int) -> None:
    """The gradient of loss_fn(logits) with respect to x_adv, `num_steps` times."""
    with frozen(attacked, None):
        for _ in range(num_steps):
            torch.autograd.grad(loss_fn(attacked(x_adv)), x_adv)


BARE = {"at": bare_at, "trades": bare_trades, "vir": bare_vir}


def count_flops(name: str, method: str, settings: TrainConfig, image_shape: tuple[int, int, int]) -> int:
    """Operations of the bare step, 2 a multiply-add of convolutions and products, from shapes alone."""
    with torch.device("meta"):
        model = build_model(name, NUM_CLASSES, image_shape[0])
        x = torch.empty(settings.batch_size, *image_shape)
        y = torch.empty(settings.batch_size, dtype=torch.int64)
    # no leaf: the counter's hooks do not support autograd.grad with respect to one
    x_adv = x.clone().requires_grad_().clone()
    with FlopCounterMode(display=False) as counter:
        BARE[method](copy.deepcopy(model).requires_grad_(False), model, x, x_adv, y, settings)
    return counter.get_total_flops()
