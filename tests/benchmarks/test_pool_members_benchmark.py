"""benchmarks/pool_members.py: what each attack of the pool gains when its turn comes."""
import json
from types import SimpleNamespace

import pytest
import torch

from attacks.pool import MinimalDistances
from benchmarks import pool_members
from benchmarks.pool_members import Config, main, members
from curves.store import Results
from harness.config import parse_config
from harness.datasets.split import Split
from harness.errors import UserError
from tests.attack_models import Linear

INF = float("inf")


def test_the_gain_is_the_fall_of_the_mean_when_the_turn_comes():
    found = {"first": [0.0, 4.0, INF, INF], "second": [0.0, 2.0, 2.0, INF], "third": [0.0, 3.0, 1.0, INF],
             "fourth": [0.0, 2.0, 0.9995, INF]}
    single = {name: torch.tensor(one, dtype=torch.float64) for name, one in found.items()}
    best = torch.stack(list(single.values())).amin(0)
    result = MinimalDistances(("l2",), torch.tensor([True, False, False, False]), {"l2": best}, {}, {},
                              list(found), {"l2": single}, dict.fromkeys(found, 7), dict.fromkeys(found, 8.0))
    rows = list(members(result))
    assert [row["member"] for row in rows] == list(found) and rows[0]["norm"] == "l2"
    assert [row["nearer"] for row in rows] == [1, 2, 1, 0]
    assert [row["gain"] for row in rows] == [None, None, pytest.approx(25.0), pytest.approx(100 * 0.0005 / 3)]
    assert [row["mean"] for row in rows] == [None, 2.0, 1.5, pytest.approx(1.49975)]
    assert rows[0]["seconds"] == 2.0 and rows[0]["gradients"] == 7


def test_it_writes_a_row_for_each_attack_of_the_correctly_classified_points(monkeypatch, tmp_path):
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    model = Linear(torch.randn(3, 16), torch.zeros(3)).eval()
    with torch.no_grad():
        labels = model(images / 255).argmax(1)
    labels[2] = (labels[2] + 1) % 3
    split = Split(images, labels, torch.arange(6))
    results = Results.empty({"name": "net"}, split, ("linf", "l2"), False)
    results.columns["status"][:] = ["ok", "ok", "misclassified", "ok", "ok", "ok"]
    monkeypatch.setattr(pool_members.store, "find", lambda folders: [results])
    monkeypatch.setattr(pool_members, "reopen", lambda *_: SimpleNamespace(model=model, split=split))
    main(Config(budget="fast", num_points=4, out=str(tmp_path / "members.json"), device="cpu"))
    file = json.loads((tmp_path / "members.json").read_text())
    assert file["budget"] == "fast" and {row["norm"] for row in file["rows"]} == {"linf", "l2"}
    for norm in ("linf", "l2"):
        means = [row["mean"] for row in file["rows"] if row["norm"] == norm and row["mean"] is not None]
        assert means and means == sorted(means, reverse=True)


def test_it_needs_a_device_with_float64(monkeypatch):
    def refuse(name, wide):
        raise UserError(f"{name}, wide: {wide}")

    monkeypatch.setattr(pool_members.store, "find", lambda folders: [])
    monkeypatch.setattr(pool_members, "choose_device", refuse)
    with pytest.raises(UserError, match="mps, wide: True"):
        main(Config(device="mps"))


def test_without_results_it_is_refused():
    with pytest.raises(UserError, match="name folders"):
        main(parse_config(Config, []))
