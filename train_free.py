"""Free adversarial training (Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019, Algorithm 1).

    m times for every batch x:    delta <- clip( delta + epsilon * sign( grad_delta L ) )
                                  theta <- SGD( grad_theta L ),    L = mean_i CE(f(x_i + delta_i), y_i)

One backward pass gives both gradients, before delta or theta moves. The perturbation delta starts at zero
and is kept from replay to replay and from batch to batch. It is clipped to [-epsilon, epsilon], and so that
x + delta lies in [0, 1]; a new batch begins with the last one's delta as it is. An epoch costs m steps per
batch, so a run takes 1/m of the usual number of epochs.

    python train_free.py                                           # ResNet-18, CIFAR-10, 10 epochs, 8 replays
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
    epsilon: float = 8 / 255            # l_inf radius and step of delta, pixels in [0, 1]
    num_replays: int = 8                # m, training steps on every batch
    epsilon_warmup_epochs: float = 0    # epochs over which epsilon rises from 0
    epochs: int = 10                    # passes over the training set, of num_replays steps per batch
    batch_size: int = 128               # images per step, over all processes
    lr: float = 0.04                    # highest learning rate of SGD
    schedule: Literal["cyclic", "steps"] = "cyclic"  # 0 to lr to 0, or lr and drops; moves every replay
    lr_drop_after: tuple[int, ...] = ()  # steps: epochs completed before each drop of the rate
    lr_drop_factor: float = 0.1         # steps: factor of the learning rate at each drop
    momentum: float = 0.9               # momentum of SGD
    weight_decay: float = 5e-4          # weight decay of SGD, on all parameters
    max_grad_norm: float = 0.0          # clip the gradient to this l_2 norm over all parameters; 0 is off
    lr_warmup_epochs: float = 0         # epochs over which the learning rate rises from 0
    ema_decay: float = 0.0              # decay of a moving average of the weights, measured too; 0 is off
    crop_padding: int = 4               # random crop: pixels of padding on each side; 0 is off
    padding_mode: Literal["constant", "reflect"] = "constant"  # padding of the random crop
    flip: bool = True                   # random horizontal flip
    val_size: int = 1000                # training images held out to choose best.pt; 0: best.pt is last.pt
    val_step_size: float = 0.003        # PGD step on the held-out images, pixels in [0, 1]
    val_num_steps: int = 20             # PGD steps on the held-out images
    seed: int = 2                       # seed of weights, order, augmentation and dropout


RECIPES = {
    "paper": Config(model="wrn34_10", epochs=26, lr=0.1, schedule="steps", lr_drop_after=(13, 19),
                    weight_decay=2e-4),
    "short": Config(dataset="mnist", model="lenet", epsilon=0.3, epsilon_warmup_epochs=2, epochs=5, lr=0.01,
                    schedule="steps", lr_drop_after=(3, 4), lr_drop_factor=0.2, max_grad_norm=1,
                    crop_padding=0, flip=False, val_size=0, val_step_size=0.03),
    "digits": Config(dataset="digits", model="lenet", epsilon=0.1, epsilon_warmup_epochs=2, epochs=10,
                     batch_size=64, lr=0.02, schedule="steps", lr_drop_after=(7,), max_grad_norm=1,
                     crop_padding=0, flip=False, val_size=137, val_step_size=0.01),
}


def learning_rate(completed: float, cfg: Config) -> float:
    """The learning rate over lr after so many epochs, fractions included."""
    if cfg.schedule == "cyclic":
        return max(0.0, 1.0 - abs(2.0 * completed / cfg.epochs - 1.0))
    return cfg.lr_drop_factor ** bisect_right(cfg.lr_drop_after, completed)


def train_one_epoch(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, deltas: PersistentRows,
                    run: Run, epoch: int, cfg: Config) -> None:
    model.train()
    for batch in run.batches(epoch):
        x, y = batch.x, batch.y                                             # [B, C, H, W] in [0, 1], [B]
        epsilon = run.ramp(batch, cfg.epsilon_warmup_epochs) * cfg.epsilon
        positions = run.global_positions(batch)                             # [B]
        delta = deltas[positions]                                           # [B, C, H, W], of the last batch
        for _ in range(cfg.num_replays):
            x_adv = (x + delta).requires_grad_()
            logits_adv = model(x_adv)                                       # [B, K]
            losses = cross_entropy(logits_adv, y)                           # [B]
            run.step(losses.mean(), optimizer, batch, A_rob=logits_adv.argmax(1) == y)
            scheduler.step()
            delta = (delta + epsilon * x_adv.grad.sign()).clamp(-epsilon, epsilon).clamp(-x, 1 - x)
        deltas[positions] = delta


def main(cfg: Config) -> None:
    check_command(cfg, build_model)
    data = load_dataset(cfg.dataset, cfg.data_dir, cfg.val_size)
    attack = partial(pgd_by_index, seed=cfg.seed, epsilon=cfg.epsilon, step_size=cfg.val_step_size,
                     num_steps=cfg.val_num_steps)
    with Run(cfg, data) as run:
        model = run.build(build_model)
        deltas = run.persistent_rows("delta", cfg.batch_size, data.image_shape)
        optimizer = SGD(model.parameters(), lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)
        replays = run.batches_per_epoch * cfg.num_replays                   # of an epoch
        scheduler = LambdaLR(optimizer, lambda completed: learning_rate(completed / replays, cfg))
        for epoch in run.epochs(model, optimizer, scheduler):
            train_one_epoch(model, optimizer, scheduler, deltas, run, epoch, cfg)
            run.end_epoch(model, partial(held_out_accuracy, attack=attack, loss_fn=cross_entropy))


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
