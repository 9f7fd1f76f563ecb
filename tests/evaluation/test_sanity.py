"""Each rule fires on a model built to trip it, and is silent on a plain network
and on an adversarially trained one."""
import pytest
import torch
from torch import nn

from attacks.noise import example_keys
from attacks.pgd import cross_entropy, pgd
from harness.evaluation import sanity
from harness.evaluation.predictions import BatchInvariant
from harness.evaluation.verdict import judge

EPSILON = 0.1


def data():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2
    x = (0.5 + 0.25 * (2 * y - 1)).view(-1, 1, 1, 1) + 0.1 * torch.randn((80, 1, 4, 4), generator=generator)
    return x.clamp(0, 1), y


@pytest.fixture(scope="module", params=(False, True), ids=("plain", "adversarial"))
def trained(request):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)), data()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        x_adv = pgd(model, x, y, epsilon=EPSILON, step_size=0.04, num_steps=4) if request.param else x
        optimizer.zero_grad()
        cross_entropy(model(x_adv), y).mean().backward()
        optimizer.step()
    return model.eval()


class Wrapped(nn.Module):
    def __init__(self, model, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def fired(model):
    x, y = data()
    right = model(x).argmax(1) == y
    probed = sanity.probe(BatchInvariant(model), x[right], y[right], example_keys(torch.arange(80)[right]),
                          attack=pgd, loss_fn=cross_entropy, epsilon=EPSILON, norm="linf")
    return {finding.rule for finding in sanity.inspect_probe(probed) if not finding.ok}


def test_plain_and_adversarially_trained_networks_pass(trained):
    assert fired(trained) == set()


@pytest.mark.parametrize(("rule", "changes"), (
    ("gradients", {"after": lambda z: 1000 * z}), ("gradients", {"after": lambda z: z.detach()}),
    ("gradients", {"before": lambda x: torch.round(x * 15) / 15}),
    ("unbounded attack", {"before": lambda x: torch.round(x * 15) / 15}),
    ("unbounded attack", {"after": lambda z: z.detach()}),
    ("outputs are logits", {"after": lambda z: z.softmax(1)}),
    ("outputs are logits", {"after": torch.sigmoid}),
    ("outputs are logits", {"after": lambda z: z.softmax(1) ** 0.5}),
    ("independent of the batch", {"before": lambda x: x - x.mean(0)}),
    ("independent of the batch", {"before": lambda x: (x - x.mean()) / x.std()}),
    ("independent of the batch", {"after": lambda z: z * z.abs().max()}),
    ("deterministic output", {"before": lambda x: x + 0.3 * torch.randn_like(x)})))
def test_the_rule_fires(trained, rule, changes):
    assert rule in fired(Wrapped(trained, **changes))


def test_rules_on_curves():
    probed = {"steps": {"0": 100.0, "10": 60.0, "100": 70.0}, "radii": {"0": 100.0, "1": 60.0, "2": 57.0}}
    assert not sanity.more_steps(probed).ok and "10.0 points up at 100" in sanity.more_steps(probed).evidence
    assert sanity.larger_radius(probed).ok


def test_rules_on_results():
    white, black = torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    seen = ~white
    white[:10], black[8:12] = True, True
    assert sanity.black_box_is_weaker(white, black, seen).ok
    black[8:14] = True
    assert not sanity.black_box_is_weaker(white, black, seen).ok
    assert sanity.black_box_is_weaker(white, black, ~seen).ok
    assert (sanity.pgd_is_nearly_enough(56.0, 52.0, ("a", "b")).ok
            and not sanity.pgd_is_nearly_enough(56.0, 40.0, ("a", "b")).ok)
    assert sanity.adversaries_sound({"a": 0}, "").ok
    assert (not sanity.adversaries_sound({"a": 2}, "").ok
            and not sanity.adversaries_sound({}, "pixels reach 2").ok)
    findings = [sanity.adversaries_sound({"a": 2}, ""), sanity.pgd_is_nearly_enough(1.0, 1.0, ("a", "b"))]
    assert sanity.verdict(findings) == "suspicious: certificate" and sanity.verdict(findings[1:]) == "ok"
    assert sanity.as_plain(findings)[0]["numbers"] == {"dropped": {"a": 2}}


@pytest.mark.parametrize(("columns", "gap"), [
    ({"pgd100": (45.0, 4), "cw": (32.0, 4), "apgd-t": (29.0, 4)}, 16.0), ({"apgd-t": (45.0, 4)}, 5.0),
    ({"cw": (49.0, 4), "spsa": (10.0, 2)}, 1.0), ({"pgd100": (45.0, 4)}, None), ({}, None)])
def test_pgd_is_compared_with_the_strongest_attack_on_all_images(columns, gap):
    result = {"A_rob": 50.0, "at_chance": [], "attacks": {
        name: {"accuracy": accuracy, "num_examples": count} for name, (accuracy, count) in columns.items()}}
    findings = judge(None, {}, torch.zeros(4, dtype=torch.int64), {}, result, "")
    found = [finding for finding in findings if finding.rule == "gap from PGD"]
    assert [finding.numbers["gap"] for finding in found] == ([] if gap is None else [gap])
    assert all(finding.ok == (gap <= sanity.GAP) for finding in found)
