"""benchmarks/curve_bound.py: exact distances are not contradicted, too large ones are."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attacks.autoattack import STANDARD
from benchmarks import curve_bound
from benchmarks.curve_bound import Config, broken_within, main
from curves.store import Results
from harness.config import parse_config
from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from harness.errors import UserError
from tests.attack_models import Linear

DEVICE = torch.device("cpu")


@pytest.mark.parametrize(("norm", "dual"), (("linf", 1), ("l2", 2)))
def test_a_curve_with_too_large_distances_is_contradicted(norm, dual, monkeypatch):
    monkeypatch.setattr(curve_bound, "STANDARD", STANDARD[:1])
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(110, 146, (30, 1, 4, 4), generator=generator, dtype=torch.uint8)
    w = torch.randn(16, generator=generator)
    model = Linear(torch.stack([w, -w]), torch.tensor([-0.5, 0.5]) * (w.sum() + 0.1)).eval()
    with torch.no_grad():
        logits = model(to_unit(images))
    split = Split(images, logits.argmax(1), torch.arange(30))
    slope = 2 * torch.linalg.vector_norm(w, dual)
    distances = ((logits[:, 0] - logits[:, 1]).abs() / slope).double().numpy()
    results = Results.empty({"name": "net"}, split, (norm,), False)
    subject = SimpleNamespace(model=model, split=split)
    radius = float(np.quantile(distances, 0.5))
    for factor in (1.0, 2.0):
        results.upper(norm)[:] = factor * distances
        farther = results.upper(norm)[:20] > radius
        wrong = int((farther & (distances[:20] < 0.98 * radius)).sum())
        attacked, nearer = broken_within(results, subject, norm, radius, 20, 0, DEVICE)
        assert attacked == farther.sum() and (nearer >= wrong > 0 if factor > 1 else nearer == 0)


def test_without_results_it_is_refused():
    with pytest.raises(UserError, match="name folders"):
        main(parse_config(Config, []))
