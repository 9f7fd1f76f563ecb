"""Instance-reweighted adversarial training, Algorithm 1 of VIR (Fakorede et al., "Vulnerability-Aware
Instance Reweighting For Adversarial Training", TMLR 2023): the weights of VIR, GAIRAT (Zhang et al., ICLR
2021), MAIL (Liu et al., NeurIPS 2021) or Zeng et al. (AAAI 2021) over AT, TRADES or MART (Wang et al., ICLR
2020).

    at      min_theta  mean_i  w_i CE(f(x'_i), y_i)
    trades  min_theta  mean_i [ CE(f(x_i), y_i) + 1/lambda * w_i KL(f(x_i) || f(x'_i)) ]
    mart    min_theta  mean_i [ w_i BCE(f(x'_i), y_i) + 1/lambda * KL(f(x_i) || f(x'_i)) (1 - p_y(x_i)) ]

x' comes from PGD on CE (at, mart) or KL (trades). The weights are 1 during the burn-in, and constants after
it. Those of `margin` stay in the graph and also weight the attack's objective.

    python train_vir.py                                            # VIR-AT, ResNet-18, CIFAR-10
    python train_vir.py --recipe vir-trades-wrn                    # a method and a setting: WRN-34-10
    python train_vir.py --recipe mail-at-original                  # the setting of MAIL's authors
    python train_vir.py --recipe gairat-mnist                      # LeNet, ten epochs
    python train_vir.py --recipe vir-at --vir_terms sv             # an ablation; also --alpha --beta --gamma
    python train_vir.py --recipe vir-at --seeds 0 1 2 3            # four runs one after the other, as in VIR
    python train_vir.py --recipe vir-at-svhn --dry_run             # every value and where it comes from
    python train_vir.py --recipe vir-at --base mart --weights mail  # any base with any weights
    python train_vir.py --recipe mail-at --burn_in_from runs/vir-at  # goes on from that run's burn-in
"""
import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from attacks.frozen import predict
from attacks.kappa import pgd_kappa
from attacks.noise import example_keys
from attacks.pgd import cross_entropy, pgd_by_index
from harness.config import compose, layer, run_script
from harness.datasets.batches import load_dataset
from harness.errors import UserError
from harness.evaluation.predictions import held_out_accuracy
from harness.training.checks import check_command
from harness.training.options import CompileOptions, RunOptions
from harness.training.run import Run
from losses.divergence import kl_divergence
from losses.gairat import gairat_weights
from losses.mail import mail_weights
from losses.margin import margin_weights
from losses.mart import mart_loss
from losses.trades import trades_loss
from losses.vir import vir_weights
from models import build_model


@dataclass(frozen=True)
class Config(RunOptions, CompileOptions):
    base: Literal["at", "trades", "mart"] = "at"  # the loss that is weighted [VIR]
    weights: Literal["uniform", "vir", "gairat", "mail", "margin"] = "vir"  # the instance weights [VIR]
    burn_in_epochs: int = 76            # epochs of weight 1 at the start [VIR, Alg. 1; MAIL's code]
    burn_in_from: str | None = None     # folder of a run: go on from its burn-in, if it is the same [ours]
    inv_lambda: float = 5.0             # weight of the KL term: 1/lambda of TRADES, lambda of MART [VIR]
    alpha: float = 7.0                  # VIR: S_v = alpha * exp(-gamma * p_y) [VIR]
    beta: float = 0.007                 # VIR: w = S_v * S_d + beta [VIR]
    gamma: float = 10.0                 # VIR: S_v = alpha * exp(-gamma * p_y) [VIR]
    vir_terms: Literal["both", "sv", "sd"] = "both"  # VIR: S_v * S_d + beta, or one factor [VIR, Eq. 10]
    vir_norm: Literal["none", "batch"] = "none"  # VIR: weights as they are, or of mean 1 [VIR, Eq. 10]
    weight_forward: Literal["train", "eval"] = "train"  # VIR-AT: mode of clean pass [unstated: as MAIL, MART]
    gairat_lambda: float = -1.0         # GAIRAT: shift of the weight function, larger is flatter [GAIRAT]
    gairat_function: Literal["tanh", "sigmoid", "discrete"] = "tanh"  # GAIRAT: kappa to weight [GAIRAT]
    gairat_norm: Literal["batch", "none"] = "batch"  # GAIRAT: mean 1 or not [GAIRAT's code; VIR, Eq. 2: not]
    kappa: Literal["count", "first"] = "count"  # correct iterates: all, or before an error [GAIRAT's code]
    mail_slope: float = 10.0            # MAIL: w = 3 sigmoid(slope * (bias - margin)) [MAIL's README]
    mail_bias: float = -0.5             # MAIL: the margin of half weight [MAIL's README]
    mail_norm: Literal["x3", "batch", "none"] = "x3"  # MAIL: times 3, mean 1 (paper), or as is [MAIL's code]
    margin_alpha: float = 0.5           # margin: w = exp(-margin_alpha * margin) [Zeng et al.]
    dataset: str = "cifar10"        # cifar10, cifar100, svhn, tiny-imagenet, mnist, digits, or a folder [VIR]
    extra_data: str | None = None       # .npz file of generated images, such as EDM's [VIR, Table 8]
    extra_fraction: float = 0.7         # part of every batch drawn from extra_data [unstated]
    model: str = "resnet18"        # resnet18[_w16], wrn34_10, wrn28_10, lenet, small_cnn, file.py:name [VIR]
    normalize: bool = False             # first layer: (x - mean) / std of the training set [unstated]
    epsilon: float = 8 / 255            # l_inf radius, pixels in [0, 1] [VIR]
    step_size: float = 2 / 255          # PGD step, pixels in [0, 1] [VIR]
    num_steps: int = 10                 # PGD steps per batch [VIR]
    start: Literal["uniform", "clipped", "gaussian", "clean"] = "gaussian"  # where PGD starts [VIR, Alg. 1]
    attack_mode: Literal["train", "eval"] = "eval"  # mode during the attack [unstated: as TRADES]
    epsilon_warmup_epochs: float = 0    # epochs over which epsilon and the step rise from 0 [VIR: none]
    epochs: int = 115                   # passes over the training set [VIR]
    batch_size: int = 128               # images per step, over all processes [VIR]
    lr: float = 0.01                    # learning rate of SGD [VIR, ResNet-18]
    schedule: Literal["steps", "cosine"] = "steps"  # schedule of the learning rate [VIR]
    lr_drop_after: tuple[int, ...] = (75, 90)  # steps: epochs before each drop [VIR; counted as MAIL's code]
    lr_scales: tuple[float, ...] = (0.1, 0.01)  # steps: learning rate / lr after each drop [VIR]
    momentum: float = 0.9               # momentum of SGD [VIR]
    nesterov: bool = False              # Nesterov's momentum [VIR]
    weight_decay: float = 3.5e-3        # weight decay of SGD, on all parameters [VIR, ResNet-18]
    max_grad_norm: float = 0.0          # clip the gradient to this l_2 norm; 0 is off [ours]
    lr_warmup_epochs: float = 0         # epochs over which the learning rate rises from 0 [ours]
    ema_decay: float = 0.0              # decay of an average of the weights, measured too; 0 is off [ours]
    crop_padding: int = 4               # random crop: pixels of padding on each side; 0 is off [unstated]
    padding_mode: Literal["constant", "reflect"] = "constant"  # padding of the random crop [unstated]
    flip: bool = True                   # random horizontal flip [unstated]
    val_size: int = 1000             # training images held out to choose best.pt; 0: trains on all [unstated]
    val_step_size: float = 0.003        # PGD step on the held-out images, pixels in [0, 1] [ours]
    val_num_steps: int = 20             # PGD steps on the held-out images [ours]
    seed: int = 0                       # seed of weights, order, augmentation, starts and dropout [ours]
    dry_run: bool = False               # print every value and where it comes from, and stop


# A recipe is a method in a setting: "vir-at" (CIFAR-10), "vir-at-wrn", ... A layer: its source, its values.
METHODS = {
    "at": layer("VIR", weights="uniform"),
    "trades": layer("VIR", base="trades", weights="uniform", inv_lambda=4.0),
    "mart": layer("VIR", base="mart", weights="uniform"),
    "gairat": layer("VIR; the weights' own settings are GAIRAT's", weights="gairat"),
    "mail-at": layer("VIR; MAIL's README", weights="mail", mail_slope=10.0, mail_bias=-0.5),
    "mail-trades": layer("VIR; MAIL's README", base="trades", weights="mail", mail_slope=2.0, mail_bias=0.0),
    "vir-at": layer("VIR", weights="vir", alpha=7.0, beta=0.007, gamma=10.0),
    "vir-trades": layer("VIR", base="trades", weights="vir", alpha=8.0, beta=1.6, gamma=3.0),
}
SETTINGS = {
    "": layer("VIR"),
    "-wrn": layer("VIR, WRN-34-10", model="wrn34_10", lr=0.1, weight_decay=7e-4),
    "-cifar10-w16": layer("ours: a quarter of the channels and 20 epochs, drops and burn-in in proportion",
                          model="resnet18_w16", epochs=20, burn_in_epochs=13, lr=0.1, lr_drop_after=(13, 16),
                          weight_decay=5e-4, ema_decay=0.999),
    "-cifar100": layer("VIR", dataset="cifar100"),
    "-svhn": layer("VIR; the flip is ours: digits have none", dataset="svhn", flip=False),
    "-tiny-imagenet": layer("VIR; the crop is ours", dataset="tiny-imagenet", crop_padding=8, gamma=3.0),
    "-generated": layer("VIR, Table 8; burn-in in proportion, the fraction ours", model="wrn28_10",
                        extra_data="data/edm_cifar10.npz", epochs=400, burn_in_epochs=265, batch_size=512,
                        lr=0.2, schedule="cosine", nesterov=True, weight_decay=5e-4),
    "-mnist": layer("ours: the short recipe of train_at_mnist.py, burn-in in proportion", dataset="mnist",
                    model="lenet", epsilon=0.3, step_size=0.05, epsilon_warmup_epochs=1, epochs=10,
                    burn_in_epochs=7, lr=0.1, max_grad_norm=1.0, lr_drop_after=(6, 8), lr_scales=(0.2, 0.04),
                    weight_decay=5e-4, crop_padding=0, flip=False, val_size=0, val_step_size=0.03),
    "-digits": layer("ours: embedded digits, half a minute", dataset="digits", model="lenet", epsilon=0.1,
                     step_size=0.02, epsilon_warmup_epochs=3, epochs=20, burn_in_epochs=14, batch_size=64,
                     lr=0.1, max_grad_norm=1.0, lr_drop_after=(13,), lr_scales=(0.2,), weight_decay=5e-4,
                     crop_padding=0, flip=False, val_size=137, val_step_size=0.01),
}
ORIGINAL = partial(layer, epsilon=0.031, step_size=0.007)
MAIL = ORIGINAL("MAIL's code", epochs=120, lr_drop_after=(75, 90, 100), lr_scales=(0.1, 0.01, 0.001))
OTHERS = {
    "trades-wrn": (METHODS["trades"], SETTINGS["-wrn"], layer("VIR, WRN-34-10", inv_lambda=6.0)),
    "trades-original": (METHODS["trades"], ORIGINAL(
        "TRADES' code", model="wrn34_10", inv_lambda=6.0, epochs=76, lr=0.1, weight_decay=2e-4,
        lr_drop_after=(74,), lr_scales=(0.1,))),
    "mart-original": (METHODS["mart"], ORIGINAL(
        "MART's code", epochs=120, lr_drop_after=(74, 89, 99), lr_scales=(0.1, 0.01, 0.001))),
    "gairat-original": (METHODS["gairat"], ORIGINAL(
        "GAIRAT's code; its WRN-32-10 has the blocks of WRN-34-10", model="wrn34_10", burn_in_epochs=59,
        epochs=120, lr=0.1, weight_decay=2e-4, start="clipped", lr_drop_after=(59, 89, 109),
        lr_scales=(0.1, 0.01, 0.005))),
    "mail-at-original": (METHODS["mail-at"], MAIL),
    "mail-trades-original": (METHODS["mail-trades"], MAIL),
}
PAIRS = {name + suffix: (METHODS[name], SETTINGS[suffix]) for name in METHODS for suffix in SETTINGS}
RECIPES, SOURCES = compose(Config, PAIRS | OTHERS)


def at_loss(logits: Tensor | None, logits_adv: Tensor, y: Tensor, beta: float, weights: Tensor) -> Tensor:
    """w CE(f(x'), y) of adversarial training, [B], with the arguments of trades_loss and mart_loss."""
    return weights * cross_entropy(logits_adv, y)


ATTACK_LOSSES = {"at": cross_entropy, "trades": kl_divergence, "mart": cross_entropy}  # what PGD maximises
LOSSES = {"at": at_loss, "trades": trades_loss, "mart": mart_loss}                     # what is weighted


def instance_weights(logits: Tensor | None, logits_adv: Tensor, y: Tensor, kappa: Tensor, kind: str,
                     cfg: Config) -> Tensor:
    """The weights w of the given kind, [B]."""
    match kind:
        case "vir":
            return vir_weights(logits, logits_adv, y, cfg.alpha, cfg.beta, cfg.gamma, terms=cfg.vir_terms,
                               normalization=cfg.vir_norm)
        case "gairat":
            return gairat_weights(kappa, cfg.num_steps, cfg.gairat_lambda, function=cfg.gairat_function,
                                  normalization=cfg.gairat_norm)
        case "mail":
            return mail_weights(logits_adv, y, cfg.mail_slope, cfg.mail_bias, cfg.mail_norm)
    return margin_weights(logits_adv, y, cfg.margin_alpha if kind == "margin" else 0.0)


def clean_logits(model: nn.Module, x: Tensor, kind: str, cfg: Config) -> Tensor | None:
    """f(x), [B, K]: in the graph for the losses of trades and mart, a constant for VIR's weights over at."""
    if cfg.base != "at":
        return model(x)
    return predict(model, x, cfg.weight_forward) if kind == "vir" else None


def train_one_epoch(model: nn.Module, optimizer: Optimizer, run: Run, epoch: int, cfg: Config) -> None:
    attack_loss = ATTACK_LOSSES[cfg.base]
    kind = cfg.weights if epoch > cfg.burn_in_epochs else "uniform"
    alpha = cfg.margin_alpha if kind == "margin" else 0.0                   # the attack sees no other weights

    def objective(logits_adv: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:  # [B], for the attack
        reference, y = target
        losses = attack_loss(logits_adv, reference)
        return margin_weights(logits_adv, y, alpha) * losses if alpha else losses

    model.train()
    for batch in run.batches(epoch):
        x, y = batch.x, batch.y                                             # [B, C, H, W] in [0, 1], [B]
        ramp = run.ramp(batch, cfg.epsilon_warmup_epochs)
        reference = predict(model, x, cfg.attack_mode) if cfg.base == "trades" else y
        x_adv, kappa = pgd_kappa(model, x, y, (reference, y), loss_fn=objective, epsilon=ramp * cfg.epsilon,
                                 step_size=ramp * cfg.step_size, num_steps=cfg.num_steps, kappa=cfg.kappa,
                                 start=cfg.start, mode=cfg.attack_mode,
                                 keys=example_keys(batch.index, cfg.seed, epoch))
        logits = clean_logits(model, x, kind, cfg)                          # [B, K]
        logits_adv = model(x_adv)                                           # [B, K]
        weights = run.on_global_batch(instance_weights, batch, logits, logits_adv, y, kappa, kind, cfg)  # [B]
        losses = LOSSES[cfg.base](logits, logits_adv, y, cfg.inv_lambda, weights)  # [B]
        run.step(losses.mean(), optimizer, batch, A_rob=logits_adv.argmax(1) == y, kappa=kappa,
                 weight=weights)
        run.log_weights(weights, y)


def learning_rate(completed: int, cfg: Config) -> float:
    """The learning rate over lr after so many epochs."""
    if cfg.schedule == "cosine":
        return (1.0 + math.cos(math.pi * completed / cfg.epochs)) / 2.0
    return (1.0, *cfg.lr_scales)[bisect_right(cfg.lr_drop_after, completed)]


def main(cfg: Config) -> None:
    if len(cfg.lr_scales) != len(cfg.lr_drop_after):
        raise UserError(f"--lr_scales must have as many values as --lr_drop_after: {len(cfg.lr_drop_after)}")
    check_command(cfg, build_model)
    data = load_dataset(cfg.dataset, cfg.data_dir, cfg.val_size, cfg.extra_data)
    attack = partial(pgd_by_index, seed=cfg.seed, epsilon=cfg.epsilon, step_size=cfg.val_step_size,
                     num_steps=cfg.val_num_steps)
    with Run(cfg, data) as run:
        model = run.build(build_model)
        optimizer = SGD(model.parameters(), lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay,
                        nesterov=cfg.nesterov)
        scheduler = LambdaLR(optimizer, lambda completed: learning_rate(completed, cfg))
        for epoch in run.epochs(model, optimizer, scheduler):
            train_one_epoch(model, optimizer, run, epoch, cfg)
            scheduler.step()
            run.end_epoch(model, partial(held_out_accuracy, attack=attack, loss_fn=cross_entropy))


if __name__ == "__main__":
    run_script(main, Config, RECIPES, SOURCES)
