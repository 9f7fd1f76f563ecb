"""Free adversarial training (Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019, Algorithm 1).

    m times for every batch x:    delta <- clip( delta + epsilon * sign( grad_delta L ) ),    theta <- SGD( grad_theta L ),
                                  L = mean_i CE(f(x_i + delta_i), y_i)

One backward pass gives both gradients, both taken before either moves. The perturbation delta begins at zero and goes on from replay to
replay and from batch to batch; it is clipped to [-epsilon, epsilon] and so that x + delta lies in [0, 1] (a new batch takes over the last
one's delta before that). An epoch costs m steps a batch, so it takes 1/m of the usual number of epochs.

    python train_free.py                                           # ResNet-18, CIFAR-10, ten epochs of eight replays
    python train_free.py --recipe paper                            # Shafahi et al.: wide ResNet, 80,000 steps
    python train_free.py --recipe short                            # LeNet, MNIST
    python train_free.py --recipe digits                           # offline, under a minute
    torchrun --nproc_per_node 2 train_free.py                      # one process a device
"""
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from attacks.pgd import cross_entropy, pgd_by_index
from harness.config import run_script
from harness.datasets.batches import load_dataset
from harness.evaluation.predictions import held_out_accuracy
from harness.training.rows import Memory
from harness.training.run import Run
from models import build_model


@dataclass(frozen=True)
class Config:
    dataset: str = "cifar10"                              # cifar10, cifar100, svhn, tiny-imagenet, mnist, digits, or a folder
    model: str = "resnet18"                               # resnet18, wrn34_10, wrn28_10, lenet, small_cnn, or file.py:callable
    normalize: bool = False                               # make (x - mean) / std of the training set the model's first layer
    epsilon: float = 8 / 255                              # l_inf radius and step of delta, pixels in [0, 1]
    num_replays: int = 8                                  # m, steps on every batch
    epsilon_warmup_epochs: float = 0                      # epochs over which epsilon rises from 0
    epochs: int = 10                                      # passes over the training set, of num_replays steps a batch
    batch_size: int = 128                                 # images a step, over all processes
    lr: float = 0.04                                      # highest learning rate of SGD
    schedule: Literal["cyclic", "steps"] = "cyclic"       # from 0 to lr and back to 0, or lr and its drops; a step every replay
    lr_drop_after: tuple[int, ...] = ()                   # steps: epochs completed before each drop of the learning rate
    lr_drop_factor: float = 0.1                           # steps: learning rate times this at each drop
    momentum: float = 0.9                                 # of SGD
    weight_decay: float = 5e-4                          # of SGD, on all parameters
    max_grad_norm: float = 0.0                            # gradients longer than this (l_2, all parameters) are cut to it; 0 is off
    lr_warmup_epochs: float = 0                           # epochs over which the learning rate rises from 0
    ema_decay: float = 0.0                                # of a moving average of the weights, measured beside them; 0 is off
    crop_padding: int = 4                                 # random crop: pixels padded on each side; 0 for none
    padding_mode: Literal["constant", "reflect"] = "constant"  # of the random crop
    flip: bool = True                                     # random horizontal flip
    val_size: int = 1000                                  # training images held out to choose best.pt; 0 trains on all, best.pt = last.pt
    val_step_size: float = 0.003                          # PGD step on the held-out images, pixels in [0, 1]
    val_num_steps: int = 20                               # PGD steps on the held-out images
    seed: int = 2                                         # of weights, order, augmentation and dropout
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
    "paper": Config(model="wrn34_10", epochs=26, lr=0.1, schedule="steps", lr_drop_after=(13, 19), weight_decay=2e-4),
    "short": Config(dataset="mnist", model="lenet", epsilon=0.3, epsilon_warmup_epochs=2, epochs=5, lr=0.01, schedule="steps",
                    max_grad_norm=1, lr_drop_after=(3, 4), lr_drop_factor=0.2, crop_padding=0, flip=False, val_size=0, val_step_size=0.03),
    "digits": Config(dataset="digits", model="lenet", epsilon=0.1, epsilon_warmup_epochs=2, epochs=10, batch_size=64, lr=0.02,
                     max_grad_norm=1, schedule="steps", lr_drop_after=(7,), crop_padding=0, flip=False, val_size=137, val_step_size=0.01),
}
# schedule: (epochs completed, with fractions; cfg) -> the learning rate over lr
SCHEDULES = {
    "cyclic": lambda done, cfg: max(0.0, 1.0 - abs(2.0 * done / cfg.epochs - 1.0)),
    "steps": lambda done, cfg: cfg.lr_drop_factor ** bisect_right(cfg.lr_drop_after, done),
}


def train_one_epoch(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, memory: Memory, run: Run, epoch: int,
                    cfg: Config) -> None:
    model.train()
    for x, y, _ in run.batches(epoch):                                         # [B, C, H, W] in [0, 1], [B]
        epsilon = run.ramp(epoch, cfg.epsilon_warmup_epochs) * cfg.epsilon
        delta = memory[run.places(x)]                                          # [B, C, H, W], where the last batch left it
        for _ in range(cfg.num_replays):
            x_adv = (x + delta).requires_grad_()
            logits_adv = model(x_adv)                                          # [B, K]
            losses = cross_entropy(logits_adv, y)                              # [B]
            run.step(losses.mean(), optimizer, A_rob=logits_adv.argmax(1) == y)
            scheduler.step()
            delta = (delta + epsilon * x_adv.grad.sign()).clamp(-epsilon, epsilon).clamp(-x, 1 - x)
        memory[run.places(x)] = delta


def main(cfg: Config) -> None:
    data = load_dataset(cfg.dataset, cfg.data_dir, cfg.val_size)
    attack = partial(pgd_by_index, seed=cfg.seed, epsilon=cfg.epsilon, step_size=cfg.val_step_size, num_steps=cfg.val_num_steps)
    with Run(cfg, data) as run:
        model = run.build(build_model)
        memory = run.remember("delta", cfg.batch_size, data.image_shape)
        optimizer = SGD(model.parameters(), lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)
        replays = run.batches_per_epoch * cfg.num_replays                      # of an epoch
        scheduler = LambdaLR(optimizer, lambda completed: SCHEDULES[cfg.schedule](completed / replays, cfg))
        for epoch in run.epochs(model, optimizer, scheduler):
            train_one_epoch(model, optimizer, scheduler, memory, run, epoch, cfg)
            run.end_epoch(model, partial(held_out_accuracy, attack=attack, loss_fn=cross_entropy))


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
