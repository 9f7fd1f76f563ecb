"""Signs that a measured robustness is not there (after Carlini et al., "On Evaluating Adversarial
Robustness", 2019; Athalye et al., "Obfuscated Gradients Give a False Sense of Security", ICML 2018).

`probe` looks at the network on a few examples, the rules look at its numbers and at the attacks' results. A
rule that fires is a reason to look closer, not a proof; one that is silent proves nothing either.
"""
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

STEPS = (0, 1, 2, 5, 10, 20, 50, 100)   # attack steps of the curve
RADII = (0.0, 0.5, 1.0, 1.5, 2.0)       # multiples of epsilon of the curve
NUM_ALONE = 8     # of these, examples passed in a batch of their own, of COPIES of themselves
COPIES = 32
NUM_PROBED = 100                        # examples looked at: the first ones that are classified correctly
RISE = 4.0            # points by which a stronger attack may leave more standing: chance, on 100 examples
UNBOUNDED = 5.0       # % that may survive an attack without a bound
ZERO_GRADIENTS = 1.0  # % of examples whose gradient may be exactly zero
BLACK_BOX = 2.0       # % of examples that black-box attacks alone may break
GAP = 8.0             # points by which the strongest attack may be below PGD


@dataclass(frozen=True)
class Finding:
    """What one rule has found: whether all is well, the evidence in words, and the numbers behind it."""

    rule: str
    ok: bool
    evidence: str
    numbers: dict = field(default_factory=dict)


def look(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable) -> dict:
    """Numbers about the outputs and gradients of a model in eval mode at x [B, C, H, W], y [B]; no attack."""
    with torch.no_grad():
        logits, again = model(x).float(), model(x).float()
        alone = torch.cat([model(image.expand(COPIES, *image.shape))[:1].float() for image in x[:NUM_ALONE]])
    point = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        losses = loss_fn(model(point), y)
        depends = losses.requires_grad
        gradient = torch.autograd.grad(losses.sum(), point)[0] if depends else torch.zeros_like(x)
    flat = gradient.flatten(1)
    return {"num_examples": len(x), "zero_gradients": _percent((flat == 0).all(1)),
            "non_finite_gradients": _percent((~torch.isfinite(flat)).any(1)),
            "two_runs": float((logits - again).abs().max()), "largest_logit": float(logits.abs().max()),
            "alone": float((logits[:NUM_ALONE] - alone).abs().max()),
            "rows_sum_to_one": bool(((logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-4)).all()),
            "in_0_1": bool(((logits >= 0) & (logits <= 1)).all())}


def _percent(holds: Tensor) -> float:
    """The share of [N] bool that is true, by the host: some accelerators have no float64."""
    return 100 * float(holds.cpu().double().mean())


def probe(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, *, attack: Callable, loss_fn: Callable,
          epsilon: float, norm: str) -> dict:
    """`look` at examples that the model classifies correctly, and how many stand under ever more attack.

    attack(...) -> x_adv has the arguments of `attacks.pgd.pgd`. The radius "without a bound" is the diameter
    of [0, 1]^(CHW).
    """
    shared = {"norm": norm, "loss_fn": loss_fn, "keys": keys}

    def standing(x_adv: Tensor) -> float:
        with torch.no_grad():
            return round(_percent(model(x_adv).argmax(1) == y), 4)

    def pgd(radius: float, ratio: float, num_steps: int, start: str | Tensor = "uniform") -> Tensor:
        return attack(model, x, y, epsilon=radius, step_size=radius / ratio, num_steps=num_steps, start=start,
                      **shared)

    steps: dict[str, float] = {}
    x_adv: str | Tensor = "uniform"
    for before, count in zip((0, *STEPS), STEPS):
        x_adv = pgd(epsilon, 8, count - before, x_adv)
        steps[str(count)] = standing(x_adv)
    radii = {f"{ratio:g}": standing(pgd(ratio * epsilon, 8, 20)) for ratio in RADII}
    everything = 1.0 if norm == "linf" else float(x[0].numel()) ** 0.5
    free = standing(pgd(everything, 20, 100))
    return look(model, x, y, loss_fn) | {"steps": steps, "radii": radii, "unbounded": free}


def same_output_twice(probed: dict) -> Finding:
    """Two forward passes on the same images give the same logits, up to rounding."""
    change, scale = probed["two_runs"], max(1.0, probed["largest_logit"])
    text = (f"logits of two runs differ by {change:.3g}, the largest being {scale:.3g}: where that is more "
            "than rounding, attacks must average over the randomness")
    return Finding("deterministic output", change <= 1e-4 * scale, text, {"largest_difference": change})


def same_output_alone(probed: dict) -> Finding:
    """An image has the same logits whatever the others in its batch are, up to rounding."""
    change, scale = probed["alone"], max(1.0, probed["largest_logit"])
    text = (f"the logits of an image alone and among others differ by {change:.3g}, the largest being "
            f"{scale:.3g}: where that is more than rounding, as with BatchNorm without running statistics, "
            "every figure depends on the batches")
    return Finding("independent of the batch", change <= 1e-4 * scale, text, {"largest_difference": change})


def logits_not_probabilities(probed: dict) -> Finding:
    """The outputs are logits: no softmax or sigmoid is behind them, which makes losses and margins flat."""
    text = "the outputs are not probabilities"
    if probed["rows_sum_to_one"]:
        text = "the outputs of every example are >= 0 and sum to 1: a softmax at the end of the network"
    elif probed["in_0_1"]:
        text = "every output of every example is between 0 and 1: a sigmoid at the end of the network"
    return Finding("outputs are logits", not (probed["rows_sum_to_one"] or probed["in_0_1"]), text)


def something_to_probe(count: int) -> Finding:
    """An image is classified correctly, so that the network can be looked at."""
    text = f"{count} correct images were looked at"
    if not count:
        text = "no image is classified correctly: neither the network nor the attacks could be looked at"
    return Finding("probe", count > 0, text)


def gradients_alive(probed: dict) -> Finding:
    """The gradient of the cross-entropy is finite, and exactly zero for hardly any example."""
    zero, bad = probed["zero_gradients"], probed["non_finite_gradients"]
    text = (f"{zero:.1f} % of {probed['num_examples']} examples have a gradient that is exactly zero, "
            f"{bad:.1f} % one that is not finite")
    return Finding("gradients", zero <= ZERO_GRADIENTS and bad == 0, text, {"zero": zero, "non_finite": bad})


def more_steps(probed: dict) -> Finding:
    """The accuracy never rises with the number of attack steps."""
    return _never_rises("more steps", "steps", probed["steps"])


def larger_radius(probed: dict) -> Finding:
    """The accuracy never rises with epsilon."""
    return _never_rises("larger epsilon", "times epsilon", probed["radii"])


def _never_rises(rule: str, unit: str, curve: dict[str, float]) -> Finding:
    lowest, rise, worst = float("inf"), 0.0, next(iter(curve))
    for at, value in curve.items():
        lowest = min(lowest, value)
        if value - lowest > rise:
            rise, worst = value - lowest, at
    shown = ", ".join(f"{value:g} % at {at}" for at, value in curve.items())
    text = f"accuracy {shown} {unit}" + (f": {rise:.1f} points up at {worst}" if rise else "")
    return Finding(rule, rise <= RISE, text, {"rise": rise, "curve": curve})


def no_bound_no_robustness(probed: dict) -> Finding:
    """An attack that may change every pixel to anything breaks everything."""
    left = probed["unbounded"]
    text = (f"{left:.1f} % of {probed['num_examples']} examples survive 100 steps of PGD that may change "
            "every pixel to anything")
    return Finding("unbounded attack", left <= UNBOUNDED, text, {"accuracy": left})


def black_box_is_weaker(white: Tensor, black: Tensor, seen: Tensor) -> Finding:
    """Hardly an example is broken by attacks without gradients only. All [N] bool; seen: met both kinds."""
    count, only = int(seen.sum()), int((black & ~white & seen).sum())
    share = 100 * only / max(count, 1)
    text = (f"{only} of {count} examples ({share:.2f} %) are broken by an attack without gradients "
            "and by none with them")
    numbers = {"only_black_box": only, "num_examples": count}
    return Finding("black-box attacks", not (share > BLACK_BOX and only >= 2), text, numbers)


def pgd_is_nearly_enough(pgd: float, strongest: float, names: tuple[str, str]) -> Finding:
    """The strongest other attack leaves not much less than PGD.  Accuracies in percent."""
    gap = pgd - strongest
    text = (f"{names[0]} leaves {pgd:.2f} %, {names[1]} {strongest:.2f} %: a gap of {gap:.2f} points "
            f"(threshold {GAP:g})")
    return Finding("gap from PGD", gap <= GAP, text, {"gap": round(gap, 4)})


def learned_something(at_chance: list[str]) -> Finding:
    """The accuracy without an attack is better than a guess. at_chance: which of A_nat and A_rob are not."""
    learned = "A_nat" not in at_chance
    text = "A_nat is better than a guess" if learned else "A_nat is no better than a guess"
    return Finding("above chance", learned, text)


def adversaries_sound(dropped: dict[str, int], fault: str) -> Finding:
    """Every adversary lies in its ball and box and is finite. dropped: attack -> examples where not."""
    bad = {name: count for name, count in dropped.items() if count}
    shown = ", ".join(f"{count} of {name}" for name, count in bad.items())
    text = "no adversary was dropped"
    if bad:
        text = f"dropped for leaving ball or box or not being finite: {shown}"
    if fault:
        text += f"; {fault}"
    return Finding("certificate", not bad and not fault, text, {"dropped": bad})


def inspect_look(looked: dict) -> list[Finding]:
    """The findings of every rule that needs no attack."""
    rules = (same_output_twice, same_output_alone, logits_not_probabilities, gradients_alive)
    return [rule(looked) for rule in rules]


def inspect_probe(probed: dict) -> list[Finding]:
    """The findings of every rule that needs the probe alone."""
    rules = (more_steps, larger_radius, no_bound_no_robustness)
    return inspect_look(probed) + [rule(probed) for rule in rules]


def verdict(findings: list[Finding]) -> str:
    """`ok`, or `suspicious:` with the rules that fired."""
    fired = [finding.rule for finding in findings if not finding.ok]
    return f"suspicious: {', '.join(fired)}" if fired else "ok"


def as_plain(findings: list[Finding]) -> list[dict]:
    """The findings as plain values for a result file."""
    return [asdict(finding) for finding in findings]
