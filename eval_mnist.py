"""Evaluate a checkpoint with A_nat, A_rob, A_sa and A_tr (Zeng et al., "Are Adversarial Examples Created Equal?", AAAI 2021, Eq. 17-19),
by the paper's protocol on MNIST.

    A_rob          accuracy when every example is attacked: PGD on the cross-entropy, the worst of several random restarts
    A_sa(alpha)    sum_i w_i 1[correct_i] / sum_i w_i at the same adversarial examples, w_i = exp(-alpha * margin_i): an attacker who
                   picks vulnerable examples more often
    A_tr(alpha)    the same weighting at the examples of an attack that maximises w_i CE_i: an attacker who also aims at them

    python eval_mnist.py                                                      # the newest run in runs/: its last.pt and best.pt
    python eval_mnist.py --checkpoint runs/train_at_mnist/TIME/best.pt        # one file
    python eval_mnist.py --checkpoint theirs.pt --arch small_cnn              # anyone's state dict
    python eval_mnist.py --checkpoint theirs.pt --arch net.py:Net             # of a network in a file of yours
    python eval_mnist.py --num_restarts 1 --num_examples 1000                 # a quick look
    python eval_mnist.py --attacks fgsm pgd100 cw fmn100 autoattack mde       # strong attacks, the worst case over them
"""
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from attacks.catalogue import members_of, probing_attack, strong_attacks, weighted_attacks
from attacks.pgd import cross_entropy, pgd_by_index
from harness.checkpoint import model_from
from harness.config import run_script
from harness.datasets.batches import first_examples
from harness.device import choose_device
from harness.errors import RunError
from harness.evaluation import report, strong
from harness.evaluation.capacity import fitting_batch_size
from harness.evaluation.predictions import evaluate
from harness.training.precision import to_device
from losses.margin import cw_loss, margin_weights
from models import build_model

PROTOCOL = report.Protocol(dataset="mnist", channels=1, epsilon=0.3, step_ratio=30)


@dataclass(frozen=True)
class Config:
    checkpoint: str | None = None                # file, or run folder for its last.pt and best.pt; default: the newest run
    arch: str | None = None                      # network of a foreign checkpoint: a model's name, or file.py:callable
    dataset: str | None = None                   # data set or image folder; default: the checkpoint's, or the paper's
    epsilon: float | None = None                 # l_inf radius, pixels in [0, 1]; default: the checkpoint's, or the paper's
    step_size: float | None = None               # PGD step, pixels in [0, 1]; default: epsilon over the paper's ratio
    num_steps: int = 40                          # PGD steps
    num_restarts: int = 10                       # independent random starts an example; the one of largest cross-entropy counts
    start: Literal["uniform", "gaussian", "clean"] = "uniform"  # where PGD starts
    alphas: tuple[float, ...] = (1.0, 1.5, 2.0)  # the attacker's preference for small margins, in A_sa and A_tr
    attacks: tuple[str, ...] = ()                # strong attacks too: names, vir or all; an unknown name lists them
    norm: Literal["linf", "l2"] = "linf"         # norm of the ball; l2 needs --attacks and --epsilon
    num_examples: int | None = None              # evaluate the first so many test images; default: all
    num_spsa_examples: int = 1000                # SPSA costs 51,200 forward passes an image: it attacks the first so many
    batch_size: int | None = None                # images at a time, changes no verdict; default: as many as memory and speed allow
    seed: int = 0                                # of the random starts
    data_dir: str | None = None                  # folder of the data sets; default: the checkpoint's, or data
    out: str | None = None                       # JSON file to write; default: eval*.json beside the checkpoint
    record: str | None = None                    # folder of what each attack did to each image; default: OUT.record
    resume: str | None = None                    # record of an interrupted evaluation with --attacks, to be finished
    shard: str | None = None                     # i/n: attack every n-th image from the i-th (0 to n - 1); the last shard reports
    save_adversaries: bool = False               # keep the adversarial images in the record, float32
    device: str = "auto"                         # auto, cpu, or an accelerator by its name in torch


def weighted_cross_entropy(alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, y: margin_weights(logits, y, alpha) * cross_entropy(logits, y)


def main(cfg: Config) -> None:
    device, files, results, examples = choose_device(cfg.device), report.find_checkpoints(cfg.checkpoint, PROTOCOL.channels), {}, {}
    job = strong.begin(cfg, files, device, members_of, partial(strong_attacks, norm=cfg.norm, seed=cfg.seed, margin_loss=cw_loss,
                                                               num_spsa_examples=cfg.num_spsa_examples))
    for name, path in files:
        started, subject = time.monotonic(), report.open_subject(name, path, cfg, PROTOCOL)
        if report.measured_before(subject, results):
            continue                                                           # best.pt is last.pt
        data = subject.data
        model = model_from(subject.contents, path, cfg.arch, data.num_classes, data.image_shape[0], build=build_model, report=print)
        model = to_device(model, job.device)
        test = first_examples(data.test, cfg.num_examples).to(job.device)
        settings = replace(cfg, batch_size=cfg.batch_size or fitting_batch_size(model, test))
        print(f"evaluating {path} on {len(test):,} test images of {data.name}", flush=True)
        attack = partial(pgd_by_index, seed=cfg.seed, epsilon=subject.epsilon, step_size=subject.step_size, num_steps=cfg.num_steps,
                         start=cfg.start, norm=cfg.norm)
        metrics = {"attack": attack, "cross_entropy": cross_entropy, "weighted": weighted_cross_entropy, "alphas": cfg.alphas,
                   "num_restarts": cfg.num_restarts}
        if cfg.attacks:
            attacks = weighted_attacks(**metrics) | job.attacks(subject.epsilon)
            result, examples[name], certificate = strong.measure(job, model, test, subject, settings, attacks, probing_attack(cfg.seed),
                                                                 cross_entropy)
        else:
            result, examples[name], certificate = evaluate(model, test, **metrics, batch_size=settings.batch_size)
        results[name] = result | {"certificate": report.certified(certificate, subject.epsilon)}
        results[name] |= report.describe(subject, settings, len(test), job.device, time.monotonic() - started)
    if not job.whole(results):
        return                                                                 # another process reports
    report.print_table(results)
    report.write(job.out, results, examples)
    if broken := [name for name, result in results.items() if not result["certificate"]["ok"]]:
        raise RunError(f"the attack on {', '.join(broken)} left its ball or box: these figures must not be used")


if __name__ == "__main__":
    run_script(main, Config)
