"""Evaluate a checkpoint by the paper's protocol on CIFAR-10 and colour images: A_nat, A_rob, A_sa and A_tr.

Zeng et al., "Are Adversarial Examples Created Equal?", AAAI 2021, Eq. 17-19.

    A_rob          accuracy when every example is attacked: PGD on the cross-entropy, the worst of several
                   random restarts
    A_sa(alpha)    sum_i w_i 1[correct_i] / sum_i w_i at the same adversarial examples, where
                   w_i = exp(-alpha * margin_i): an attacker who picks vulnerable examples more often
    A_tr(alpha)    the same weighting at the examples of an attack that maximises w_i CE_i: an attacker who
                   also aims at them
    A_sa_kl(rho)   A_sa at the alpha that spends a KL divergence of rho nats: attackers of equal strength

    python eval_cifar10.py                                                  # the newest run in runs/
    python eval_cifar10.py --checkpoint runs/train_at_cifar10/TIME/best.pt  # one file
    python eval_cifar10.py --checkpoint theirs.pt --arch resnet18           # anyone's state dict
    python eval_cifar10.py --checkpoint theirs.pt --arch net.py:Net         # with a network of yours
    python eval_cifar10.py --num_restarts 1 --num_examples 1000             # a quick look
    python eval_cifar10.py --attacks fgsm pgd100 cw fmn100 autoattack mde   # strong attacks too
    python eval_cifar10.py --resume OUT.record                              # goes on with a stopped one
"""
from dataclasses import dataclass

from curves.models import read_mat
from curves.points import load_split
from harness.config import run_script
from harness.evaluation.options import EvalConfig
from harness.evaluation.pipeline import evaluate
from harness.evaluation.subject import Protocol
from models import build_model

PROTOCOL = Protocol(dataset="cifar10", channels=3, epsilon=0.031, step_ratio=10)


@dataclass(frozen=True)
class Config(EvalConfig):
    num_steps: int = 20  # PGD steps


def main(cfg: Config) -> None:
    evaluate(cfg, PROTOCOL, build_model, load=load_split, readers={".mat": read_mat})


if __name__ == "__main__":
    run_script(main, Config)
