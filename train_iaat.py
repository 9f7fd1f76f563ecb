"""Instance adaptive adversarial training, IAAT (Balaji et al., "Instance Adaptive Adversarial Training",
2019, Algorithms 1 and 2).

    min_theta  mean_i max_{|x'_i - x_i| <= epsilon_i}  CE(f(x'_i), y_i)
    epsilon_i <- beta * max(sel_i, 0) + (1 - beta) * epsilon_i
    sel_i = 0 if the clean x_i is misclassified, else epsilon_i + gamma if an attack of that radius fails,
            else epsilon_i if an attack of that radius fails, else epsilon_i - gamma

Every training example has a radius epsilon_i of its own. It is kept from epoch to epoch and has no upper
bound. During the burn-in it is epsilon where the clean image is classified correctly, and 0 elsewhere. An
epoch costs about as much as three of adversarial training.

    python train_iaat.py                                           # ResNet-18, CIFAR-10
    python train_iaat.py --recipe paper                            # Balaji et al.: wide ResNet
    python train_iaat.py --recipe short                            # LeNet, MNIST
    python train_iaat.py --recipe digits                           # offline, under a minute
    torchrun --nproc_per_node 2 train_iaat.py                      # one process a device
"""
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from attacks.frozen import predict
from attacks.iaat import iaat_epsilon, iaat_step_size
from attacks.noise import example_keys
from attacks.pgd import cross_entropy, pgd, pgd_by_index
from harness.config import run_script
from harness.datasets.batches import load_dataset
from harness.errors import UserError
from harness.evaluation.predictions import held_out_accuracy
from harness.training.batch import Batch
from harness.training.checks import check_command
from harness.training.options import CompileOptions, RunOptions
from harness.training.rows import PersistentRows
from harness.training.run import Run
from models import build_model


@dataclass(frozen=True)
class Config(RunOptions, CompileOptions):
    dataset: str = "cifar10"            # cifar10, cifar100, svhn, tiny-imagenet, mnist, digits, or a folder
    model: str = "resnet18"             # resnet18[_w16], wrn34_10, wrn28_10, lenet, small_cnn, file.py:name
    normalize: bool = False             # make (x - mean) / std of the training set the model's first layer
    epsilon: float = 8 / 255            # l_inf radius in burn-in and validation, pixels in [0, 1]
    burn_in_epochs: int = 10            # epochs before each example has a radius of its own
    gamma: float = 1.9 / 255            # how far beyond its radius an example is tried, pixels in [0, 1]
    beta: float = 0.1                   # share of the new radius in the running average, at most 1
    step_size: float = 2 / 255          # smallest PGD step, pixels in [0, 1]; else 2 / num_steps of radius
    num_steps: int = 10                 # PGD steps of each attack; three attacks per batch after the burn-in
    start: Literal["uniform", "gaussian", "clean"] = "uniform"  # where PGD starts
    attack_mode: Literal["train", "eval"] = "train"  # mode of BatchNorm and dropout during the attack
    epsilon_warmup_epochs: float = 0    # epochs over which epsilon and the step rise from 0
    epochs: int = 110                   # passes over the training set
    batch_size: int = 256               # images per step, over all processes
    lr: float = 0.1                     # learning rate of SGD
    lr_drop_after: tuple[int, ...] = (70, 90, 100)  # epochs completed before each drop of the rate
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
    "paper": Config(model="wrn34_10"),
    "short": Config(dataset="mnist", model="lenet", epsilon=0.3, burn_in_epochs=3, gamma=0.07,
                    step_size=0.05, epsilon_warmup_epochs=1, epochs=10, batch_size=128, lr=0.1,
                    max_grad_norm=1, lr_drop_after=(6, 8), crop_padding=0, flip=False, val_size=0,
                    val_step_size=0.03),
    "digits": Config(dataset="digits", model="lenet", epsilon=0.1, burn_in_epochs=8, gamma=0.02,
                     step_size=0.02, epsilon_warmup_epochs=3, epochs=20, batch_size=64, lr=0.1,
                     max_grad_norm=1, lr_drop_after=(15,), crop_padding=0, flip=False, val_size=137,
                     val_step_size=0.01),
}


def train_one_epoch(model: nn.Module, optimizer: Optimizer, radii: PersistentRows, run: Run, epoch: int,
                    cfg: Config) -> None:
    def attack(batch: Batch, epsilon: Tensor, smallest_step: float, number: int) -> Tensor:
        return pgd(model, batch.x, batch.y, epsilon=epsilon, num_steps=cfg.num_steps,
                   step_size=iaat_step_size(epsilon, cfg.num_steps, smallest_step), start=cfg.start,
                   mode=cfg.attack_mode, keys=example_keys(batch.index, cfg.seed, epoch, number))

    def is_correct(x: Tensor, y: Tensor) -> Tensor:
        return predict(model, x, cfg.attack_mode).argmax(1) == y            # [B]

    model.train()
    for batch in run.batches(epoch):
        x, y = batch.x, batch.y                                             # [B, C, H, W] in [0, 1], [B]
        ramp = run.ramp(batch, cfg.epsilon_warmup_epochs)
        correct = is_correct(x, y)
        if epoch <= cfg.burn_in_epochs:
            epsilon = ramp * cfg.epsilon * correct                          # [B]
        else:
            last = radii[batch.index]                                       # [B]
            withstands = is_correct(attack(batch, last, cfg.step_size, 1), y)
            withstands_more = is_correct(attack(batch, last + cfg.gamma, cfg.step_size, 2), y)
            epsilon = iaat_epsilon(last, correct, withstands, withstands_more, gamma=cfg.gamma, beta=cfg.beta)
        radii[batch.index] = epsilon
        logits_adv = model(attack(batch, epsilon, ramp * cfg.step_size, 0))  # [B, K]
        losses = cross_entropy(logits_adv, y)                               # [B]
        run.step(losses.mean(), optimizer, batch, A_rob=logits_adv.argmax(1) == y, A_nat=correct,
                 epsilon=epsilon)


def main(cfg: Config) -> None:
    if cfg.beta > 1:
        raise UserError(f"--beta must be between 0 and 1, not {cfg.beta}")
    check_command(cfg, build_model)
    data = load_dataset(cfg.dataset, cfg.data_dir, cfg.val_size)
    attack = partial(pgd_by_index, seed=cfg.seed, epsilon=cfg.epsilon, step_size=cfg.val_step_size,
                     num_steps=cfg.val_num_steps)
    with Run(cfg, data) as run:
        model = run.build(build_model)
        radii = run.persistent_rows("example_epsilon", int(data.train.index.max()) + 1)
        optimizer = SGD(model.parameters(), lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)
        scheduler = MultiStepLR(optimizer, cfg.lr_drop_after, cfg.lr_drop_factor)
        for epoch in run.epochs(model, optimizer, scheduler):
            train_one_epoch(model, optimizer, radii, run, epoch, cfg)
            scheduler.step()
            run.end_epoch(model, partial(held_out_accuracy, attack=attack, loss_fn=cross_entropy))
            run.say(f"largest radius of an example: {float(radii.values.max()):.4f}")


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
