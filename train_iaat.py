"""Instance adaptive adversarial training, IAAT (Balaji et al., "Instance Adaptive Adversarial Training", 2019, Algorithms 1 and 2).

    min_theta  mean_i max_{|x'_i - x_i| <= epsilon_i}  CE(f(x'_i), y_i)
    epsilon_i <- beta * max(sel_i, 0) + (1 - beta) * epsilon_i
    sel_i = 0 if x_i is wrong when clean, else epsilon_i + gamma if it withstands an attack of that radius, else epsilon_i if it withstands
            one of this, else epsilon_i - gamma

Every training example has a radius of its own that goes on from epoch to epoch, without an upper bound. During the burn-in it is epsilon
where the clean image is classified correctly, and 0 elsewhere. An epoch costs about three of adversarial training.

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
from harness.training.rows import Memory
from harness.training.run import Run
from models import build_model


@dataclass(frozen=True)
class Config:
    dataset: str = "cifar10"                              # cifar10, cifar100, svhn, tiny-imagenet, mnist, digits, or a folder
    model: str = "resnet18"                               # resnet18, wrn34_10, wrn28_10, lenet, small_cnn, or file.py:callable
    normalize: bool = False                               # make (x - mean) / std of the training set the model's first layer
    epsilon: float = 8 / 255                              # l_inf radius of the burn-in and the held-out images, pixels in [0, 1]
    burn_in_epochs: int = 10                              # epochs before the examples' own radii count
    gamma: float = 1.9 / 255                              # how far beyond its radius an example is tried, pixels in [0, 1]
    beta: float = 0.1                                     # part of the newly chosen radius in the next one, at most 1
    step_size: float = 2 / 255                            # smallest PGD step, pixels in [0, 1]; else 2 / num_steps of the radius
    num_steps: int = 10                                   # PGD steps of each attack, three a batch after the burn-in
    start: Literal["uniform", "gaussian", "clean"] = "uniform"  # where PGD starts
    attack_mode: Literal["train", "eval"] = "train"       # mode of BatchNorm and dropout during the attack
    epsilon_warmup_epochs: float = 0                      # epochs over which epsilon and the step rise from 0
    epochs: int = 110                                     # passes over the training set
    batch_size: int = 256                                 # images a step, over all processes
    lr: float = 0.1                                       # learning rate of SGD
    lr_drop_after: tuple[int, ...] = (70, 90, 100)       # epochs completed before each drop of the learning rate
    lr_drop_factor: float = 0.2                           # learning rate times this at each drop
    momentum: float = 0.9                                 # of SGD
    weight_decay: float = 5e-4                          # of SGD, on all parameters
    max_grad_norm: float = 0.0                            # gradients longer than this (l_2, all parameters) are cut to it; 0 is off
    lr_warmup_epochs: float = 0                           # epochs over which the learning rate rises from 0
    ema_decay: float = 0.0                                # of a moving average of the weights, measured beside them; 0 is off
    crop_padding: int = 4                                 # random crop: pixels padded on each side; 0 for none
    padding_mode: Literal["constant", "reflect"] = "reflect"  # of the random crop
    flip: bool = True                                     # random horizontal flip
    val_size: int = 1000                                  # training images held out to choose best.pt; 0 trains on all, best.pt = last.pt
    val_step_size: float = 0.003                          # PGD step on the held-out images, pixels in [0, 1]
    val_num_steps: int = 20                               # PGD steps on the held-out images
    seed: int = 2                                         # of weights, order, augmentation, starts and dropout
    seeds: tuple[int, ...] = ()                           # train once with each of these seeds, in out_dir/seed<k>
    stop_on_collapse: bool = False                        # end with exit code 1 once the network is at chance and stays there
    data_dir: str = "data"                                # folder of the data sets
    out_dir: str | None = None                            # run folder; default runs/<script>/<time>
    resume: str | None = None                             # run folder to go on with
    device: str = "auto"                                  # auto, cpu, or an accelerator by its name in torch
    precision: Literal["auto", "bf16", "float32"] = "auto"  # of training; auto is bf16 where it is faster (harness/device.py)
    attack_view: bool = True                              # run a faster form of the network where one is recognised and checked
    compile: Literal["auto", "on", "off"] = "auto"        # torch.compile attack step and network; auto: on a GPU, if a trial is faster
    graphs: bool = True                                   # with compile, on a GPU: replay each compiled piece as one CUDA graph
    max_batches: int | None = None                        # stop every epoch after this many batches, for a trial run


RECIPES = {
    "paper": Config(model="wrn34_10"),
    "short": Config(dataset="mnist", model="lenet", epsilon=0.3, burn_in_epochs=3, gamma=0.07, step_size=0.05, epsilon_warmup_epochs=1,
                    epochs=10, batch_size=128, lr=0.1, max_grad_norm=1, lr_drop_after=(6, 8), crop_padding=0, flip=False, val_size=0,
                    val_step_size=0.03),
    "digits": Config(dataset="digits", model="lenet", epsilon=0.1, burn_in_epochs=8, gamma=0.02, step_size=0.02, epsilon_warmup_epochs=3,
                     epochs=20, batch_size=64, lr=0.1, max_grad_norm=1, lr_drop_after=(15,), crop_padding=0, flip=False, val_size=137,
                     val_step_size=0.01),
}


def train_one_epoch(model: nn.Module, optimizer: Optimizer, memory: Memory, run: Run, epoch: int, cfg: Config) -> None:
    def attack(batch: tuple[Tensor, Tensor, Tensor], epsilon: Tensor, smallest: float, number: int) -> Tensor:
        x, y, index = batch
        return pgd(model, x, y, epsilon=epsilon, step_size=iaat_step_size(epsilon, cfg.num_steps, smallest), num_steps=cfg.num_steps,
                   start=cfg.start, mode=cfg.attack_mode, keys=example_keys(index, cfg.seed, epoch, number))

    def is_correct(x: Tensor, y: Tensor) -> Tensor:
        return predict(model, x, cfg.attack_mode).argmax(1) == y               # [B]

    model.train()
    for x, y, index in run.batches(epoch):                                     # [B, C, H, W] in [0, 1], [B], [B]
        batch, ramp, last = (x, y, index), run.ramp(epoch, cfg.epsilon_warmup_epochs), memory[index]
        correct = is_correct(x, y)
        if epoch <= cfg.burn_in_epochs:
            epsilon = ramp * cfg.epsilon * correct                             # [B]
        else:
            tried = [is_correct(attack(batch, last + more, cfg.step_size, k), y) for k, more in ((1, 0.0), (2, cfg.gamma))]
            epsilon = iaat_epsilon(last, correct, *tried, gamma=cfg.gamma, beta=cfg.beta)
        memory[index] = epsilon
        logits_adv = model(attack(batch, epsilon, ramp * cfg.step_size, 0))    # [B, K]
        losses = cross_entropy(logits_adv, y)                                  # [B]
        run.step(losses.mean(), optimizer, A_rob=logits_adv.argmax(1) == y, A_nat=correct, epsilon=epsilon)


def main(cfg: Config) -> None:
    if cfg.beta > 1:
        raise UserError(f"--beta must be between 0 and 1, not {cfg.beta}")
    data = load_dataset(cfg.dataset, cfg.data_dir, cfg.val_size)
    attack = partial(pgd_by_index, seed=cfg.seed, epsilon=cfg.epsilon, step_size=cfg.val_step_size, num_steps=cfg.val_num_steps)
    with Run(cfg, data) as run:
        model = run.build(build_model)
        memory = run.remember("example_epsilon", int(data.train.index.max()) + 1)
        optimizer = SGD(model.parameters(), lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)
        scheduler = MultiStepLR(optimizer, cfg.lr_drop_after, cfg.lr_drop_factor)
        for epoch in run.epochs(model, optimizer, scheduler):
            train_one_epoch(model, optimizer, memory, run, epoch, cfg)
            scheduler.step()
            run.end_epoch(model, partial(held_out_accuracy, attack=attack, loss_fn=cross_entropy))
            run.say(f"largest radius of an example: {float(memory.values.max()):.4f}")


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
