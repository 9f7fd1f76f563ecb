"""PGD adversarial training (Madry et al., ICLR 2018), plain or margin-weighted (Zeng et al., "Are Adversarial
Examples Created Equal?", AAAI 2021), on CIFAR-10.

    min_theta  mean_i max_{|x'_i - x_i| <= epsilon}  w_i CE(f(x'_i), y_i),    w_i = exp(-alpha * margin_i)
    margin_i = p_y - max_{k != y} p_k at x'_i

alpha = 0 is plain adversarial training. alpha > 0 weights every example by its margin, in the attack's
objective and in the loss. Gradients flow through the weight in both.

    python train_at_cifar10.py                                     # ResNet-18, plain, as in Zeng et al.
    python train_at_cifar10.py --alpha 0.1                         # margin-weighted
    python train_at_cifar10.py --dataset cifar10-jpeg              # data/cifar10-jpeg/{train,test}/CLASS/*
    python train_at_cifar10.py --recipe short                      # thirty epochs
    python train_at_cifar10.py --recipe digits                     # offline, under a minute
    torchrun --nproc_per_node 2 train_at_cifar10.py                # one process a device
"""
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from attacks.noise import example_keys
from attacks.pgd import cross_entropy, pgd, pgd_by_index
from harness.config import run_script
from harness.datasets.batches import load_dataset
from harness.evaluation.predictions import held_out_accuracy
from harness.training.checks import check_command
from harness.training.options import CompileOptions, RunOptions
from harness.training.run import Run
from losses.margin import margin_weights
from models import build_model


@dataclass(frozen=True)
class Config(RunOptions, CompileOptions):
    dataset: str = "cifar10"            # mnist, cifar10, cifar100, svhn, tiny-imagenet, digits, or a folder
    model: str = "resnet18"             # lenet, small_cnn, resnet18[_w16], wrn34_10, wrn28_10, file.py:name
    normalize: bool = False             # make (x - mean) / std of the training set the model's first layer
    alpha: float = 0.0                  # weight exp(-alpha * margin); 0 is plain adversarial training
    epsilon: float = 8 / 255            # l_inf radius, pixels in [0, 1]
    step_size: float = 2 / 255          # PGD step, pixels in [0, 1]
    num_steps: int = 10                 # PGD steps per batch
    start: Literal["uniform", "gaussian", "clean"] = "uniform"  # where PGD starts
    attack_mode: Literal["train", "eval"] = "train"  # mode of BatchNorm and dropout during the attack
    epsilon_warmup_epochs: float = 0    # epochs over which epsilon and the step rise from 0
    epochs: int = 100                   # passes over the training set
    batch_size: int = 128               # images per step, over all processes
    lr: float = 0.2                     # learning rate of SGD
    lr_drop_after: tuple[int, ...] = (60, 120, 160)  # epochs completed before each drop of the rate
    lr_drop_factor: float = 0.2         # factor of the learning rate at each drop
    momentum: float = 0.9               # momentum of SGD
    weight_decay: float = 5e-4          # weight decay of SGD, on all parameters
    max_grad_norm: float = 0.0          # clip the gradient to this l_2 norm over all parameters; 0 is off
    lr_warmup_epochs: float = 0         # epochs over which the learning rate rises from 0
    ema_decay: float = 0.0              # decay of a moving average of the weights, measured too; 0 is off
    crop_padding: int = 4               # random crop: pixels of padding on each side; 0 is off
    padding_mode: Literal["constant", "reflect"] = "reflect"  # padding of the random crop
    flip: bool = True                   # random horizontal flip
    val_size: int = 1000                # training images held out to choose best.pt; 0: best.pt is last.pt
    val_step_size: float = 0.003        # PGD step on the held-out images, pixels in [0, 1]
    val_num_steps: int = 20             # PGD steps on the held-out images
    seed: int = 2                       # seed of weights, order, augmentation, starts and dropout


RECIPES = {
    "paper": Config(),
    "short": Config(epochs=30, lr=0.1, lr_drop_after=(15, 25), lr_drop_factor=0.1),
    "digits": Config(dataset="digits", model="lenet", epochs=30, batch_size=64, epsilon=0.1, num_steps=10,
                     step_size=0.02, lr=0.05, lr_drop_after=(22,), epsilon_warmup_epochs=10, crop_padding=0,
                     flip=False, val_size=137, val_step_size=0.01),
}


def train_one_epoch(model: nn.Module, optimizer: Optimizer, run: Run, epoch: int, cfg: Config) -> None:
    def objective(logits_adv: Tensor, y: Tensor) -> Tensor:                 # [B], for the attack
        losses = cross_entropy(logits_adv, y)
        return margin_weights(logits_adv, y, cfg.alpha) * losses if cfg.alpha else losses

    model.train()
    for batch in run.batches(epoch):
        x, y = batch.x, batch.y                                             # [B, C, H, W] in [0, 1], [B]
        ramp = run.ramp(batch, cfg.epsilon_warmup_epochs)
        x_adv = pgd(model, x, y, epsilon=ramp * cfg.epsilon, step_size=ramp * cfg.step_size,
                    num_steps=cfg.num_steps, loss_fn=objective, start=cfg.start, mode=cfg.attack_mode,
                    keys=example_keys(batch.index, cfg.seed, epoch))
        logits_adv = model(x_adv)                                           # [B, K]
        weights = margin_weights(logits_adv, y, cfg.alpha)                  # [B], in the graph
        losses = weights * cross_entropy(logits_adv, y)                     # [B]
        run.step(losses.mean(), optimizer, batch, A_rob=logits_adv.argmax(1) == y, weight=weights)


def main(cfg: Config) -> None:
    check_command(cfg, build_model)
    data = load_dataset(cfg.dataset, cfg.data_dir, cfg.val_size)
    attack = partial(pgd_by_index, seed=cfg.seed, epsilon=cfg.epsilon, step_size=cfg.val_step_size,
                     num_steps=cfg.val_num_steps)
    with Run(cfg, data) as run:
        model = run.build(build_model)
        optimizer = SGD(model.parameters(), lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)
        scheduler = MultiStepLR(optimizer, cfg.lr_drop_after, cfg.lr_drop_factor)
        for epoch in run.epochs(model, optimizer, scheduler):
            train_one_epoch(model, optimizer, run, epoch, cfg)
            scheduler.step()
            run.end_epoch(model, partial(held_out_accuracy, attack=attack, loss_fn=cross_entropy))


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
