"""Whether to believe an evaluation: the certificate of its adversarial examples, the rules of `sanity`."""
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from attacks.catalogue import Attack, probing_attack
from attacks.pgd import cross_entropy
from harness.datasets.batches import to_unit
from harness.evaluation import sanity
from harness.evaluation.attack_record import UNTOUCHED, AttackRecord, broken
from harness.evaluation.attacking import Task


@dataclass
class Certificate:
    """That every adversarial example that counts lies in its ball and box: the extremes over all of them."""

    max_perturbation: float = 0.0
    min_pixel: float = 1.0
    max_pixel: float = 0.0
    non_finite: int = 0  # adversarial examples with a pixel that is not finite

    def add(self, norm: Tensor, low: Tensor, high: Tensor) -> None:
        """Take the norms [M] and extreme pixels [M] of adversarial examples into account."""
        finite = torch.isfinite(norm) & torch.isfinite(low) & torch.isfinite(high)
        self.non_finite += int((~finite).sum())
        self.max_perturbation = max(self.max_perturbation, *norm[finite].tolist(), 0.0)
        self.min_pixel = min(self.min_pixel, *low[finite].tolist(), 1.0)
        self.max_pixel = max(self.max_pixel, *high[finite].tolist(), 0.0)

    def broken(self, epsilon: float) -> str:
        """What is wrong with the adversarial examples, in words; empty when nothing is."""
        faults = []
        if self.max_perturbation > epsilon + 1e-6 * max(1.0, epsilon):
            faults.append(f"a perturbation of {self.max_perturbation:.6f} exceeds epsilon {epsilon:.6f}")
        if self.min_pixel < 0 or self.max_pixel > 1:
            extremes = f"[{self.min_pixel:.6f}, {self.max_pixel:.6f}]"
            faults.append(f"pixels reach {extremes} outside [0, 1]")
        if self.non_finite:
            faults.append(f"{self.non_finite} adversarial examples are not finite")
        return ", ".join(faults)

    def as_plain(self, epsilon: float) -> dict[str, object]:
        """The extremes as plain values; `ok`: every adversarial example lies in its ball and box."""
        return asdict(self) | {"ok": not self.broken(epsilon)}


def certify(rows: dict[str, dict[str, Tensor]], attacks: dict[str, Attack], epsilon: float) -> Certificate:
    """The extremes over every adversarial example of A_rob's and A_tr's attacks, all restarts of them.

    Of the other attacks what was dropped does not count, nor what a minimal one found beyond epsilon.
    """
    tolerance, certificate = 1e-6 * max(1.0, epsilon), Certificate()
    for name, row in rows.items():
        used, norm = row["prediction"] != UNTOUCHED, row["norm"]
        if name in attacks and not attacks[name].everyone:
            used &= row["dropped"] != 1
            norm = torch.where(norm <= epsilon + tolerance, norm, 0.0)
        certificate.add(norm[used], row["low"][used], row["high"][used])
    return certificate


def probe(task: Task, record: AttackRecord, seed: int) -> dict | None:
    """`sanity.probe` on the first images that are classified correctly, None where there are none."""
    split = task.split
    correct = record.rows["clean"]["prediction"] == split.labels.cpu()
    chosen = correct.nonzero().squeeze(1)[:sanity.NUM_PROBED]
    if not len(chosen):
        return None
    part = split[chosen.to(split.images.device)]
    return sanity.probe(task.model, to_unit(part.images), part.labels, part.index, epsilon=task.epsilon,
                        norm=task.norm, attack=probing_attack(seed), loss_fn=cross_entropy)


def judge(probed: dict | None, rows: dict[str, dict[str, Tensor]], y: Tensor, attacks: dict[str, Attack],
          result: dict, fault: str) -> list[sanity.Finding]:
    """The findings of every rule that applies to what was run; fault: what the certificate says."""
    findings = [sanity.something_to_probe(probed["num_examples"] if probed else 0)]
    findings += sanity.inspect_probe(probed) if probed else []
    findings += _black_box(rows, y, attacks)
    left = {name: fact["accuracy"] for name, fact in result.get("attacks", {}).items()
            if fact["num_examples"] == len(y)}  # not of those on the first few images
    pgd = "pgd100" if "pgd100" in left else "A_rob"
    found = left.pop(pgd, result["A_rob"])
    if left:
        strongest = min(left, key=left.__getitem__)
        findings.append(sanity.pgd_is_nearly_enough(found, left[strongest], (pgd, strongest)))
    dropped = {name: int((rows[name]["dropped"] == 1).sum()) for name in attacks}
    findings.append(sanity.learned_something(result["at_chance"]))
    return [*findings, sanity.adversaries_sound(dropped, fault)]


def _black_box(rows: dict[str, dict[str, Tensor]], y: Tensor,
               attacks: dict[str, Attack]) -> list[sanity.Finding]:
    """The comparison of attacks without gradients with the others, where there are any."""
    blacks = [name for name, attack in attacks.items() if not attack.uses_gradients]
    if not blacks:
        return []
    white, black, seen = (torch.zeros_like(y, dtype=torch.bool) for _ in range(3))
    for name, attack in attacks.items():
        if attack.uses_gradients:
            white |= broken(rows[name], y)
    for name in blacks:
        black |= broken(rows[name], y)
        within = torch.arange(len(y)) < (attacks[name].limit or len(y))
        seen |= (rows[name]["prediction"] != UNTOUCHED) | (white & within)
    return [sanity.black_box_is_weaker(white, black, seen & (rows["clean"]["prediction"] == y))]
