"""YOPO-m-n (Zhang et al., "You Only Propagate Once: Accelerating Adversarial Training via Maximal Principle",
NeurIPS 2019, Algorithm 1).

    f = g(f0(x)), f0 the first layer.   m times for every batch:   p = -grad_{f0} mean_i CE(g(f0(x'_i)), y_i)
        n times:    x' <- Pi( x' - step_size * sign( grad_x' H ) ),    H(x', theta_0) = sum f0(x') * p
        theta_g accumulates grad CE
        theta_0 accumulates -grad_theta_0 H (and grad CE too, as in the released ResNet-18 code)

Only m passes go through the whole network; PGD with as many steps takes m * n. Each batch has one optimiser
step, on the sum of the m gradients, with the learning rate divided by m.

    python train_yopo.py                                           # YOPO-5-3, ResNet-18, CIFAR-10
    python train_yopo.py --layer_one_grad hamiltonian              # the first layer's gradient of the paper
    python train_yopo.py --recipe wrn                              # WRN-34-10
    python train_yopo.py --recipe mnist                            # YOPO-5-10, SmallCNN, 40 epochs
    python train_yopo.py --recipe short                            # LeNet, MNIST
    python train_yopo.py --recipe digits                           # offline, under a minute
    torchrun --nproc_per_node 2 train_yopo.py                      # one process a device
"""
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from attacks.noise import example_keys
from attacks.pgd import cross_entropy, first_iterate, pgd_by_index
from attacks.yopo import yopo_inner
from harness.config import run_script
from harness.datasets.batches import load_dataset
from harness.evaluation.predictions import held_out_accuracy
from harness.training.checks import check_command
from harness.training.first_layer import FirstLayer
from harness.training.options import RunOptions
from harness.training.run import Run
from models import build_model


@dataclass(frozen=True)
class Config(RunOptions):
    dataset: str = "cifar10"            # cifar10, cifar100, svhn, tiny-imagenet, mnist, digits, or a folder
    model: str = "resnet18"             # resnet18[_w16], wrn34_10, wrn28_10, lenet, small_cnn, file.py:name
    normalize: bool = False             # make (x - mean) / std of the training set the model's first layer
    epsilon: float = 8 / 255            # l_inf radius, pixels in [0, 1]
    step_size: float = 2 / 255          # step of the inner updates, pixels in [0, 1]
    num_passes: int = 5                 # m, passes through the whole network per batch
    num_steps: int = 3                  # n, inner updates through the first layer after each of them
    layer_one_grad: Literal["both", "hamiltonian"] = "both"  # first layer's gradient: loss and H, or H alone
    epsilon_warmup_epochs: float = 0    # epochs over which epsilon and the step rise from 0
    epochs: int = 37                    # passes over the training set
    batch_size: int = 256               # images per step, over all processes
    lr: float = 0.2                     # learning rate of SGD, before it is divided by num_passes
    lr_drop_after: tuple[int, ...] = (30, 34, 36)  # epochs completed before each drop of the rate
    lr_drop_factor: float = 0.1         # factor of the learning rate at each drop
    momentum: float = 0.9               # momentum of SGD
    weight_decay: float = 5e-4          # weight decay of SGD, on all parameters
    max_grad_norm: float = 0.0          # clip the gradient (a sum over passes) to this l_2 norm; 0 is off
    lr_warmup_epochs: float = 0         # epochs over which the learning rate rises from 0
    ema_decay: float = 0.0              # decay of a moving average of the weights, measured too; 0 is off
    crop_padding: int = 4               # random crop: pixels of padding on each side; 0 is off
    padding_mode: Literal["constant", "reflect"] = "constant"  # padding of the random crop
    flip: bool = True                   # random horizontal flip
    val_size: int = 1000                # training images held out to choose best.pt; 0: best.pt is last.pt
    val_step_size: float = 0.003        # PGD step on the held-out images, pixels in [0, 1]
    val_num_steps: int = 20             # PGD steps on the held-out images
    seed: int = 2                       # seed of weights, order, augmentation, starts and dropout


RECIPES = {
    "paper": Config(),
    "wrn": Config(model="wrn34_10", lr=0.4),
    "mnist": Config(dataset="mnist", model="small_cnn", epsilon=0.3, step_size=0.01, num_steps=10,
                    epochs=40, lr=0.01, lr_drop_after=(30, 35, 39), crop_padding=0, flip=False,
                    val_step_size=0.03),
    "short": Config(dataset="mnist", model="lenet", epsilon=0.3, step_size=0.03, epsilon_warmup_epochs=2,
                    epochs=10, batch_size=128, lr=0.03, max_grad_norm=5, lr_drop_after=(6, 8),
                    lr_drop_factor=0.2, crop_padding=0, flip=False, val_size=0, val_step_size=0.03),
    "digits": Config(dataset="digits", model="lenet", epsilon=0.1, step_size=0.02, epsilon_warmup_epochs=3,
                     epochs=20, batch_size=64, lr=0.1, max_grad_norm=5, lr_drop_after=(15,), crop_padding=0,
                     flip=False, val_size=137, val_step_size=0.01),
}


def train_one_epoch(model: nn.Module, f0: FirstLayer, optimizer: Optimizer, run: Run, epoch: int,
                    cfg: Config) -> None:
    model.train()
    for batch in run.batches(epoch):
        x, y = batch.x, batch.y                                             # [B, C, H, W] in [0, 1], [B]
        ramp = run.ramp(batch, cfg.epsilon_warmup_epochs)
        x_adv = first_iterate(x, ramp * cfg.epsilon, "uniform", example_keys(batch.index, cfg.seed, epoch))
        optimizer.zero_grad(set_to_none=True)
        for _ in range(cfg.num_passes):
            features, logits_adv = f0.with_logits(x_adv, cut=cfg.layer_one_grad == "hamiltonian")  # f0(x_adv)
            losses = cross_entropy(logits_adv, y)                           # [B]
            (losses.mean() * batch.loss_scale).backward()
            p = -features.grad                                              # as features, constant from here
            x_adv = yopo_inner(f0, x, x_adv, p, epsilon=ramp * cfg.epsilon, step_size=ramp * cfg.step_size,
                               num_steps=cfg.num_steps)
            (-(f0(x_adv) * p).sum()).backward()
        run.update(losses.mean(), optimizer, batch, A_rob=logits_adv.argmax(1) == y)


def main(cfg: Config) -> None:
    check_command(cfg, build_model)
    data = load_dataset(cfg.dataset, cfg.data_dir, cfg.val_size)
    attack = partial(pgd_by_index, seed=cfg.seed, epsilon=cfg.epsilon, step_size=cfg.val_step_size,
                     num_steps=cfg.val_num_steps)
    with Run(cfg, data) as run:
        model = run.build(build_model)
        f0 = run.first_layer(model)
        optimizer = SGD(model.parameters(), lr=cfg.lr / cfg.num_passes, momentum=cfg.momentum,
                        weight_decay=cfg.weight_decay)
        scheduler = MultiStepLR(optimizer, cfg.lr_drop_after, cfg.lr_drop_factor)
        for epoch in run.epochs(model, optimizer, scheduler):
            train_one_epoch(model, f0, optimizer, run, epoch, cfg)
            scheduler.step()
            run.end_epoch(model, partial(held_out_accuracy, attack=attack, loss_fn=cross_entropy))


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
