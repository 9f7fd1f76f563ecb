"""The flags of an evaluation."""
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EvalConfig:
    """The flags that eval_mnist.py and eval_cifar10.py share."""

    may_change_on_resume = ("kl_budgets", "out")  # no attack depends on them
    checkpoint: str | None = None    # file, or run folder (its last.pt and best.pt); default: the newest run
    arch: str | None = None          # network of a foreign checkpoint: a model's name, or file.py:callable
    ignore_extra: bool = False       # leave out parameters of the checkpoint that the network lacks
    dataset: str | None = None       # data set or image folder; default: the checkpoint's, or the paper's
    epsilon: float | None = None     # radius, pixels in [0, 1]; default: the checkpoint's, or the paper's
    step_size: float | None = None   # PGD step, pixels in [0, 1]; default: epsilon over the paper's ratio
    num_steps: int = 40              # PGD steps
    num_restarts: int = 10           # random starts an image; the one of largest cross-entropy counts
    start: Literal["uniform", "gaussian", "clean"] = "uniform"  # where PGD starts
    alphas: tuple[float, ...] = (1.0, 1.5, 2.0)  # preferences for small margins, in A_sa and A_tr
    kl_budgets: tuple[float, ...] = (0.05, 0.2, 0.5)  # of the attacker's KL divergence, in nats, for A_sa_kl
    attacks: tuple[str, ...] = ()    # strong attacks too: names, vir or all; an unknown name lists them
    norm: Literal["linf", "l2"] = "linf"  # norm of the ball; l2 needs its own --epsilon
    num_examples: int | None = None  # evaluate the first so many test images; default: all
    indices: str | None = None       # text file with the places of the test images to take, instead of all
    num_spsa_examples: int = 1000    # SPSA costs 51,200 forward passes an image: it attacks the first so many
    batch_size: int | None = None    # images at a time, changes no verdict; default: what memory allows
    seed: int = 0                    # of the random starts
    data_dir: str | None = None      # folder of the data sets; default: the checkpoint's, or data
    out: str | None = None           # JSON file, with OUT.record beside it; default: beside the checkpoint
    resume: str | None = None        # OUT.record or OUT.json of a stopped evaluation, to be finished
    shard: str | None = None         # i/n: attack every n-th image from the i-th (from 0); the last reports
    save_adversaries: bool = False   # keep the adversarial images in the record, float32
    device: str = "auto"             # auto, cpu, or an accelerator by its name in torch
